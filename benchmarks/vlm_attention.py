"""Eager attention against the fused kernel in SmolLM2-135M, forward and backward as under LoRA.

    python benchmarks/vlm_attention.py --llm SmolLM2-135M-Instruct.Q4_1.gguf -o benchmarks/results/vlm_attention.json

Evidence for `SHORT_SAMPLE` in openvision/multimodal/training/run.py: 1,024 tokens a step in samples of several lengths,
with both kernels in turn; the fastest of several steps.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from openvision.multimodal.model.huggingface import Pretrained
from openvision.multimodal.model.llm import load_llm
from openvision.provenance import processor_name

LENGTHS, TOKENS, STEPS = (64, 128, 256, 512, 1024), 1024, 3


def step_seconds(model: Pretrained, length: int, kind: str) -> float:
    """Seconds of a forward and backward pass in bfloat16 autocast, with gradients of inputs only, as under LoRA."""
    model.set_attn_implementation(kind)
    inputs = torch.randn(TOKENS // length, length, model.config.hidden_size, requires_grad=True)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        states = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    states.float().square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure every length and write JSON and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/vlm_attention.json"))
    options = parser.parse_args()
    model = load_llm(options.llm).model.base_model
    model.requires_grad_(False)
    rows = []
    for length in LENGTHS:
        times: dict[str, list[float]] = {"sdpa": [], "eager": []}
        for _ in range(STEPS + 1):
            for kind, seconds in times.items():
                seconds.append(step_seconds(model, length, kind))
        # The first of each warms up.
        fused, written = (min(times[kind][1:]) for kind in ("sdpa", "eager"))
        rows.append({"tokens": length, "fused": fused, "written_out": written, "ratio": fused / written})
    day, threads = datetime.now(UTC).date().isoformat(), torch.get_num_threads()
    content = {"date": day, "processor": processor_name(), "threads": threads, "torch": torch.__version__, "rows": rows}
    options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = ["| tokens a sample | fused, s | written out, s | fused / written out |", "|---:|---:|---:|---:|"]
    lines += [f"| {r['tokens']} | {r['fused']:.2f} | {r['written_out']:.2f} | {r['ratio']:.2f} |" for r in rows]
    machine = f"{day}, {processor_name()}, {threads} threads, torch {torch.__version__}"
    head = f"{machine}, bfloat16, {TOKENS} tokens a step.\n\n"
    text = f"# Attention of a small language model on a CPU\n\n{head}" + "\n".join(lines) + "\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
