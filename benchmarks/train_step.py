"""Images a second of a training step on this CPU: ours and open_clip's own, and what the caption decoder costs.

    .venv-oracle/bin/python benchmarks/train_step.py -o benchmarks/results/train_step.json

Contrastive: the same towers with the same weights, batch and precision; open_clip with its loss and AdamW as its
training script builds them, ours through `openvision.training.step`. They take turns in one process, so that whatever
slows the machine slows both; a number is the median of the turns. Beside them the best product of the tower's shapes.

Caption: the full objective (two texts, caption decoder) as trained here, and in its naive form: one square of prefix
and queries under a mask, logits for every position. Each has a process of its own, for its memory.

Needs open_clip: `make test` builds that environment.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision_operators as torchvision_operators
from torch import Tensor

from openvision.data.batch import Batch
from openvision.errors import require
from openvision.models.decoders.parallel import ParallelCaptionDecoder
from openvision.models.flops import training_flops
from openvision.models.kernels.dispatch import causal_mask
from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.variants import variant
from openvision.models.vision import normalize
from openvision.provenance import processor_name
from openvision.recipe.sections import Loss, Optimizer
from openvision.training.objective import Embeds, ImageTextObjective, Terms
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.compile import Checkpointing, prepare_blocks
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward
from openvision.weights.export.targets import ExportOptions, export
from openvision.weights.load import Checkpoint

RESOLUTION, PATCH = 160, 16
CAPTION_TOKENS = 60
BASELINE = "open_clip"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], float]


def batch_of(config: OpenVisionConfig, size: int) -> Batch:
    """Random pictures and texts; captions of 60 tokens on average, 40 to 80, each counted to its [eos]."""
    generator = torch.Generator().manual_seed(0)
    context, length = config.text.context_length, config.decoder.caption_length if config.decoder else 0

    def ids(columns: int) -> Tensor:
        return torch.randint(200, 30000, (size, columns), generator=generator)

    alt, sentence = ids(context), ids(context)
    alt[:, -1] = sentence[:, -1] = 101
    lengths = torch.linspace(CAPTION_TOKENS - 20, CAPTION_TOKENS + 20, size).round().long()
    return Batch(
        images=torch.randint(0, 256, (size, 3, RESOLUTION, RESOLUTION), generator=generator).to(torch.uint8),
        alt_ids=alt,
        sentence_ids=sentence,
        labels=ids(length),
        label_mask=torch.arange(length) < lengths[:, None],
        positions=torch.arange(size),
        keys=[],
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


def our_step(
    model: OpenVision,
    batch: Batch,
    loss: Loss,
    precision: torch.dtype,
    compiled: bool = False,
    recompute: Checkpointing = "none",
) -> Run:
    """A step of the trainer, without the data."""
    prepare_blocks(model.train(), recompute, compiled)
    return step_of(model, ImageTextObjective(model, loss), batch, precision)


def step_of(model: OpenVision, objective: ImageTextObjective, batch: Batch, precision: torch.dtype) -> Run:
    """Forward, backward and update; returns the loss."""
    distributed, optimizer = DistributedModel(model), build_optimizer(model, Optimizer())
    randomness = SampleRandomness(0, batch.positions.numpy())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        losses = forward_backward(distributed, objective, batch, randomness, precision)
        apply_update(optimizer, 1e-4, gradient_norm(optimizer))
        return losses.values()["loss"]

    return step


def their_step(model: OpenVision, size: str, batch: Batch, precision: torch.dtype) -> Run:
    """open_clip's step: its towers, loss, groups of AdamW, autocast and limit of the temperature."""
    open_clip = require("open_clip", extra="open_clip")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(model.vision, model, None, size, {})
        export(checkpoint, "open_clip", Path(folder) / "model", ExportOptions(check=False))
        theirs = open_clip.create_model(f"local-dir:{folder}/model").train()
    named = list(theirs.named_parameters())
    spared = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    decayed = [p for _, p in named if not any(p is other for other in spared)]
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)
    contrast = open_clip.ClipLoss()

    def step() -> float:
        images = normalize(batch.images)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = contrast(*theirs(images, batch.alt_ids)[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            theirs.logit_scale.clamp_(0, 4.6052)
        return loss.item()

    return step


def contrastive(size: str, name: str, batch_size: int, seconds: float, compiled: bool) -> dict[str, Any]:
    """One row: images a second of both, from the same weights; asserts that both compute the same loss."""
    full = variant(size, PATCH, RESOLUTION)
    config = OpenVisionConfig(full.embed_dim, full.vision, full.text)
    torch.manual_seed(0)
    model, precision = OpenVision(config), DTYPES[name]
    batch, loss = batch_of(config, batch_size), Loss(texts=("alt",), caption=0)
    runs = {BASELINE: their_step(model, size, batch, precision)}
    if compiled:
        twin = OpenVision(config)
        twin.load_state_dict(model.state_dict())
        runs["ours compiled"] = our_step(twin, batch, loss, precision, compiled=True)
    runs["ours"] = our_step(model, batch, loss, precision)
    first = {name: run() for name, run in runs.items()}
    assert max(first.values()) - min(first.values()) < 0.02, f"not the same model: {first}"
    rates = take_turns(runs, batch_size, seconds)
    operations = training_flops(config, RESOLUTION, texts=1)
    return {
        "size": size,
        "precision": name,
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "images_per_second": rates,
        "gflops_per_image": operations / 1e9,
        "product_gflops_per_second": {**best_product(full.vision.width, precision)},
    }


def take_turns(runs: dict[str, Run], batch_size: int, seconds: float) -> dict[str, float]:
    """Median rate of each over three turns or more, until all have had `seconds` each on average."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[BASELINE]) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: batch_size / statistics.median(values) for name, values in times.items()}


def best_product(width: int, precision: torch.dtype) -> dict[str, float]:
    """GFLOP/s of the tower's largest product, as the stock linear map computes it and by oneDNN."""
    tokens = 32 * ((RESOLUTION // PATCH) ** 2 + 1)
    shapes = ((tokens, width), (4 * width, width), (4 * width,))
    x, weight, bias = (torch.randn(*shape).to(precision) for shape in shapes)
    ways: dict[str, Callable[[], Tensor]] = {
        "stock": lambda: F.linear(x, weight, bias),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    }
    operations = 2 * tokens * width * 4 * width
    best = {}
    with torch.no_grad():
        for name, way in ways.items():
            times = []
            for _ in range(20):
                start = time.perf_counter()
                way()
                times.append(time.perf_counter() - start)
            best[name] = operations / min(times) / 1e9
    return best


class NaiveDecoder(ParallelCaptionDecoder):
    """The decoder as one sequence of prefix and queries under a mask, scores in one tensor, as the original has it."""

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As in ParallelCaptionDecoder, but whatever the captions' lengths: every position is computed."""
        prefix = torch.cat([self.image_proj(image_tokens), self.text_proj(text_tokens)], dim=1)
        queries = self.queries.expand(len(prefix), -1, -1).to(prefix.dtype)
        x, start = torch.cat([prefix, queries], dim=1), prefix.shape[1]
        whole = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
        whole[:start, :start] = True
        whole[start:] = causal_mask(queries.shape[1], x.shape[1], x.device)
        for block in self.blocks:
            q, k, v = block.attn.split_heads(block.attn.qkv(block.norm1(x)), 3)  # pyright: ignore
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            scores = scores.masked_fill(~whole, torch.finfo(scores.dtype).min)
            x = x + block.attn.project(scores.softmax(dim=-1) @ v)  # pyright: ignore
            x = x + block.mlp(block.norm2(x))  # pyright: ignore
        return self.norm(x[:, start:].to(self.norm.weight.dtype))


class NaiveObjective(ImageTextObjective):
    """Cross-entropy of every position's logits, masked afterwards."""

    def forward(self, batch: Batch, randomness: SampleRandomness, target_tokens: Tensor) -> tuple[Embeds, Terms]:
        """As in ImageTextObjective."""
        output = self.model(normalize(batch.images), *self.texts(batch))
        assert self.model.decoder is not None
        assert output.caption_states is not None
        logits = self.model.decoder.logits(output.caption_states)
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        caption = (losses * batch.label_mask.flatten()).sum() / target_tokens
        return (output.image_embeds, output.text_embeds), {"caption": caption}


def caption(form: str, name: str, batch_size: int, seconds: float) -> dict[str, Any]:
    """One row: rate, first loss and peak memory above idle of one form of the step; run in a process of its own."""
    config = variant("tiny", PATCH, RESOLUTION)
    if "without decoder" in form:
        config = OpenVisionConfig(config.embed_dim, config.vision, config.text)
    torch.manual_seed(0)
    model = OpenVision(config)
    if form == "naive" and model.decoder is not None:
        model.decoder.__class__ = NaiveDecoder
    batch = batch_of(config, batch_size)
    loss = Loss() if config.decoder else Loss(caption=0)
    recompute: Checkpointing = "selective" if "selective" in form else "none"
    run = our_step(model, batch, loss, DTYPES[name], recompute=recompute)
    if form == "naive":
        run = step_of(model, NaiveObjective(model, loss), batch, DTYPES[name])
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = run()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "form": form,
        "precision": name,
        "batch": batch_size,
        "threads": torch.get_num_threads(),
        "loss": first,
        "images_per_second": batch_size / statistics.median(times),
        "peak_mib_above_idle": (peak - idle) / 1024,
    }


FORMS = ("naive", "ours", "ours, selective recomputation", "ours without decoder")


def tables(report: dict[str, Any]) -> str:
    """Markdown of both measurements."""
    lines = [
        "| model | precision | batch | threads | open_clip, images/s | ours | ratio | compiled | ratio "
        "| GFLOP/s ours | best product, stock / oneDNN |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["contrastive"]:
        rates, product = row["images_per_second"], row["product_gflops_per_second"]
        base, ours, compiled = rates[BASELINE], rates["ours"], rates.get("ours compiled")
        told = (f"{compiled:.1f}", f"{compiled / base:.2f}x") if compiled else ("", "")
        lines.append(
            f"| {row['size']}/16 | {row['precision']} | {row['batch']} | {row['threads']} | {base:.1f} | {ours:.1f} | "
            f"{ours / base:.2f}x | {told[0]} | {told[1]} | {ours * row['gflops_per_image']:.0f} | "
            f"{product['stock']:.0f} / {product['oneDNN']:.0f} |"
        )
    lines += [
        "",
        f"Full objective, tiny/16, captions of {CAPTION_TOKENS} tokens on average:",
        "",
        "| step | precision | batch | threads | loss | images/s | MiB above idle | speed to naive | memory to naive |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    naive = {row["precision"]: row for row in report["caption"] if row["form"] == "naive"}
    for row in report["caption"]:
        against = naive.get(row["precision"])
        speed = f"{row['images_per_second'] / against['images_per_second']:.2f}x" if against else ""
        memory = f"{row['peak_mib_above_idle'] / against['peak_mib_above_idle']:.2f}x" if against else ""
        lines.append(
            f"| {row['form']} | {row['precision']} | {row['batch']} | {row['threads']} | {row['loss']:.4f} | "
            f"{row['images_per_second']:.1f} | {row['peak_mib_above_idle']:.0f} | {speed} | {memory} |"
        )
    return "\n".join(lines)


def in_own_process(arguments: argparse.Namespace, *one: str) -> dict[str, Any]:
    """Measure one row in a fresh interpreter, whose OpenMP has just the threads asked for."""
    command = [sys.executable, __file__, "--one", *one, "--batch", str(arguments.batch)]
    command += ["--seconds", str(arguments.seconds), "--compile" if arguments.compile else "--no-compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(output: Path | None, report: dict[str, Any]) -> None:
    """Write what has been measured so far as JSON and Markdown."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(tables(report) + "\n")


def main() -> None:
    """Measure every row and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small"])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each candidate, on average")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        kind, which, precision = arguments.one
        if kind == "contrastive":
            row = contrastive(which, precision, arguments.batch, arguments.seconds, arguments.compile)
        else:
            row = caption(which, precision, arguments.batch, arguments.seconds)
        print(json.dumps(row))
        return
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": sys.argv,
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm")},
        "contrastive": [],
        "caption": [],
    }
    for kind, names in (("contrastive", arguments.sizes), ("caption", arguments.forms)):
        for precision in arguments.precisions:
            for name in names:
                report[kind].append(in_own_process(arguments, kind, name, precision))
                write(arguments.output, report)
    print(tables(report))


if __name__ == "__main__":
    main()
