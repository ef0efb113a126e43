"""Attention kernels beside stock attention, and the caption loss by the logits made at a time, on one CUDA GPU.

    python benchmarks/gpu_kernels.py -o benchmarks/results/gpu_kernels.json

Milliseconds of forward and backward pass apart, the mean of twenty calls that follow each other after five that do not
count, on random data. Stock attention is what `scaled_dot_product_attention` chooses. Shapes are those of L/14 with a
batch of 256: the vision tower at 224 px, two texts, the decoder's prefix and its queries.
"""

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from openvision.models.kernels.dispatch import causal_mask
from openvision.models.kernels.gpu import HAS_TRITON
from openvision.objectives.caption import caption_loss
from openvision.runtime import use_float32_matmul

CALLS, WARM_UP = 20, 5
WIDTH = 64
# Samples, heads, queries, keys, whether causal at the end.
SHAPES = ((256, 16, 257, 257, False), (512, 12, 80, 80, False), (256, 12, 335, 335, False), (256, 12, 128, 463, True))
CAPTIONS, TOKENS, WORDS, STATES = 256, 128, 32000, 768
CHUNKS = (22, 25, 26, 27, 28)
Row = dict[str, object]


def milliseconds(call: Callable[[], object]) -> float:
    """Mean time of a call on the device."""
    for _ in range(WARM_UP):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def attention_row(samples: int, heads: int, queries: int, keys: int, causal: bool) -> Row:
    """Both passes of both ways for one shape, bfloat16."""
    from openvision.models.kernels import triton_attention

    inputs = [_random(samples, length, heads) for length in (queries, keys, keys)]
    mask = causal_mask(queries, keys, torch.device("cuda")) if causal else None
    ways: dict[str, Callable[[], Tensor]] = {
        "stock": lambda: F.scaled_dot_product_attention(*inputs, attn_mask=mask),
        "ours": lambda: triton_attention.attention(*inputs, causal)[0],
    }
    row: Row = {"samples": samples, "heads": heads, "queries": queries, "keys": keys, "causal": causal}
    for name, forward in ways.items():
        out = forward()
        grad = torch.randn_like(out)
        row[f"{name}_forward"] = milliseconds(forward)
        row[f"{name}_backward"] = milliseconds(lambda out=out, grad=grad: _gradients(out, inputs, grad))
    return row


def _random(samples: int, length: int, heads: int) -> Tensor:
    x = torch.randn(samples, length, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def _gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad, retain_graph=True)


def caption_row(power: int) -> Row:
    """Both passes of the caption loss together, captions of 40 to 80 tokens, 2^`power` logits at a time."""
    states = torch.randn(CAPTIONS, TOKENS, STATES, device="cuda", requires_grad=True)
    head = (torch.randn(WORDS, STATES, device="cuda") * STATES**-0.5).requires_grad_()
    labels = torch.randint(WORDS, (CAPTIONS, TOKENS), device="cuda")
    mask = torch.arange(TOKENS) < torch.linspace(40, 80, CAPTIONS).round()[:, None]
    count = mask.sum()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    time = milliseconds(lambda: caption_loss(states, labels, mask, head, 2**power, count).backward())
    return {
        "logits": f"2^{power}",
        "milliseconds": time,
        "gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
    }


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = list(rows[0])
    cells = ([f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in head] for row in rows)
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---:|" * len(head), *map(_line, cells)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not HAS_TRITON:
        sys.exit("this benchmark needs a CUDA GPU and Triton")
    torch.manual_seed(0)
    use_float32_matmul("high")
    attention = [attention_row(*shape) for shape in SHAPES]
    captions = [caption_row(power) for power in CHUNKS]
    text = f"{table(attention)}\n\n{table(captions)}\n"
    print(text)
    if arguments.output:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": ["benchmarks/gpu_kernels.py", *sys.argv[1:]],
            "accelerator": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "attention": attention,
            "captions": captions,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
