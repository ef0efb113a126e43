"""The demonstration's table, with the machine it was made on: encoders inside a small language model.

    python benchmarks/vlm_demo.py --encoder runs/quickstart/model --other clip=runs/clip/model \
        --data runs/openmoji --runs runs/vlm_demo -o benchmarks/results/vlm_demo.json

Does what `openvision vlm demo` does and writes the results where they are committed. A run that is finished is not
repeated: the table can be made again from the folder.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from openvision.multimodal.compare import parse_contestants, tables
from openvision.multimodal.demo import HELD_OUT, Demo, default_contestants, demonstrate
from openvision.multimodal.recipe import load_vlm_recipe
from openvision.provenance import processor_name


def main() -> None:
    """Run the demonstration and write JSON and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="runs/quickstart/model")
    parser.add_argument("--other", action="append", default=[], help="NAME=ENCODER")
    parser.add_argument("--data", type=Path, default=Path("runs/openmoji"))
    parser.add_argument("--recipe", type=Path, default=Path("recipes/vlm/demo.toml"))
    parser.add_argument("--runs", type=Path, default=Path("runs/vlm_demo"))
    parser.add_argument("--split", action="append", help="validation, or both held-out sets by default")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/vlm_demo.json"))
    options = parser.parse_args()
    demo = Demo(
        shards=options.data,
        contestants=default_contestants(options.encoder, parse_contestants(options.other) if options.other else ()),
        recipe=load_vlm_recipe(options.recipe, options.overrides),
        splits=tuple(options.split or HELD_OUT),
    )
    result = demonstrate(demo, options.runs, lambda line: print(line, flush=True))
    day, threads = datetime.now(UTC).date().isoformat(), torch.get_num_threads()
    # Where the language model lay on this machine is nobody's business.
    result |= {"date": day, "threads": threads, "llm": Path(result["llm"]).name}
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    head = f"{day}, {processor_name()}, {threads} threads, torch {torch.__version__}; intervals of 95 %.\n\n"
    text = f"# Encoders inside SmolLM2-135M-Instruct\n\n{head}{tables(result)}"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
