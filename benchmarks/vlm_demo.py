"""Table of the demonstration, with the machine that it ran on: encoders inside a small language model.

    python benchmarks/vlm_demo.py --encoder runs/quickstart_openmoji/model --other clip=runs/clip/model \
        --data runs/openmoji --runs runs/vlm_demo -o benchmarks/results/vlm_demo.json

Runs `openvision vlm demo`, writes the committed results, and adds the lead of each encoder over those after it,
paired over the images of all sets. A finished run is not repeated, so the table can be written again from its folder.

`--from-scratch` trains a small Llama from random weights (`recipes/vlm/scratch.toml`) instead of SmolLM2: it sees fifty
times as many conversations in the same time, and knows nothing but these.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, make_folder, read_json_lines
from openvision.multimodal.benchmarks.benchmark import Marks, tabulate
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.experiments.compare import parse_contestants, tables
from openvision.multimodal.experiments.demo import Demo, default_contestants, demonstrate, source_of
from openvision.multimodal.experiments.demo_data import CONVERSATIONS, DemoOptions
from openvision.multimodal.model.toy import write_small_llm
from openvision.multimodal.recipe import load_vlm_recipe
from openvision.provenance import processor_name


def read_marks(runs: Path, name: str, splits: tuple[str, ...]) -> Marks:
    """Marks of one encoder on all sets together."""
    parts = []
    for split in splits:
        given = read_json_lines(runs / name / "scores" / split / "answers.jsonl")
        said = {row["id"]: row["answer"] for row in given}
        parts.append(tabulate(PICTURES, PICTURES.read(runs / "data" / split), said))
    columns = {key: np.concatenate([part.columns[key] for part in parts]) for key in parts[0].columns}
    starts = np.cumsum([0, *(part.clusters.max() + 1 for part in parts[:-1])])
    clusters = np.concatenate([part.clusters + start for part, start in zip(parts, starts, strict=True)])
    return Marks(columns, np.concatenate([part.groups for part in parts]), clusters)


def ahead(first: Marks, other: Marks, resamples: int = 1000) -> dict[str, list[float]]:
    """Lead of `first` in points, with the 95 % interval of a bootstrap over images, for each headline metric."""
    clusters = int(first.clusters.max()) + 1
    draws = np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    weights = [np.ones(len(first)), *(draw[first.clusters].astype(np.float64) for draw in draws)]
    pairs = [(PICTURES.metrics(first, weight), PICTURES.metrics(other, weight)) for weight in weights]
    found = {}
    for metric in PICTURES.headline:
        value, *samples = [a[metric] - b[metric] for a, b in pairs]
        found[metric] = [float(value), *np.percentile(samples, (2.5, 97.5)).tolist()]
    return found


def paired_table(paired: dict[str, dict[str, list[float]]], first: str) -> str:
    """Markdown table with one row for each encoder."""
    lines = [
        "| " + " | ".join([f"{first} ahead of", *PICTURES.headline]) + " |",
        "|---" * (1 + len(PICTURES.headline)) + "|",
    ]
    for name, metrics in paired.items():
        cells = [f"{value:.1f} ({low:.1f}, {high:.1f})" for value, low, high in metrics.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "Points ahead, paired over the images of all sets:\n\n" + "\n".join(lines) + "\n"


def options_of(images: int, questions: int) -> DemoOptions:
    """Conversations about so many images, in which a yes-or-no question is asked as often as by default."""
    usual = DemoOptions()
    pairs = usual.pairs * images // usual.images
    return DemoOptions(images=images, pairs=pairs, yes_no=questions, open_=questions)


def small_llm(shards: Path, runs: Path, options: DemoOptions) -> str:
    """A small Llama with random weights and a tokenizer of the conversations about `shards`."""
    data = source_of(shards).make(shards, make_folder(runs) / "data", options)
    rows = json.loads((data / CONVERSATIONS).read_text(encoding="utf-8"))
    folder = runs / "llm"
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            write_small_llm(temporary, (turn["value"] for row in rows for turn in row["conversations"]))
    return str(folder)


def main() -> None:
    """Run the demonstration and write JSON and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="runs/quickstart_openmoji/model")
    parser.add_argument("--other", action="append", default=[], help="NAME=ENCODER")
    parser.add_argument("--data", type=Path, default=Path("runs/openmoji"))
    parser.add_argument("--from-scratch", action="store_true", help="a small language model with random weights")
    parser.add_argument("--recipe", type=Path, help="recipes/vlm/demo.toml, or scratch.toml, by default")
    parser.add_argument("--images", type=int, default=DemoOptions().images, help="training images")
    parser.add_argument("--questions", type=int, default=DemoOptions().open_, help="of each form in a split")
    parser.add_argument("--no-baselines", action="store_true", help="without an untrained encoder and without blind")
    parser.add_argument("--runs", type=Path, default=Path("runs/vlm_demo"))
    parser.add_argument("--split", action="append", help="validation; the held-out sets by default")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/vlm_demo.json"))
    options = parser.parse_args()
    others = parse_contestants(options.other) if options.other else ()
    contestants = default_contestants(options.encoder, others)
    if options.no_baselines:
        contestants = tuple(one for one in contestants if one.name not in ("untrained", "blind") or one in others)
    recipe = options.recipe or Path("recipes/vlm") / ("scratch.toml" if options.from_scratch else "demo.toml")
    data = options_of(options.images, options.questions)
    demo = Demo(
        shards=options.data,
        contestants=contestants,
        recipe=load_vlm_recipe(recipe, options.overrides),
        llm=small_llm(options.data, options.runs, data) if options.from_scratch else None,
        splits=tuple(options.split or source_of(options.data).held_out),
        data=data,
    )
    result = demonstrate(demo, options.runs, lambda line: print(line, flush=True))
    day, threads = datetime.now(UTC).date().isoformat(), torch.get_num_threads()
    # Without the path of this machine.
    result["llm"] = Path(result["llm"]).name
    marks = {row["name"]: read_marks(options.runs, row["name"], demo.splits) for row in result["rows"]}
    leads: dict[str, dict[str, dict[str, list[float]]]] = {}
    for one, other in combinations(marks, 2):
        leads.setdefault(one, {})[other] = ahead(marks[one], marks[other])
    content = {**result, "date": day, "threads": threads, "ahead": leads}
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    head = f"{day}, {processor_name()}, {threads} threads, torch {torch.__version__}; intervals of 95 %.\n\n"
    name = "a small Llama that is trained from scratch" if options.from_scratch else "SmolLM2-135M-Instruct"
    paired = "\n".join(paired_table(lead, first) for first, lead in leads.items())
    text = f"# Encoders inside {name}\n\n{head}{tables(result)}\n{paired}"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except OpenVisionError as error:
        sys.exit(f"error: {error}")
