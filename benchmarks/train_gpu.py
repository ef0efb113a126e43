"""Images a second, MFU and peak memory of whole training steps on one GPU, beside what `openvision plan` expects.

    python benchmarks/train_gpu.py -o benchmarks/results/train_gpu.json

- The step is the trainer's own (forward, losses, backward, check, update) on random images and captions of 60 tokens on
  average that already lie on the device: no loader.
- `clip` is the contrastive part alone, one text an image. `open_clip` is ViT-L-14 of open_clip_torch with the step of
  its own training code (autocast in bfloat16, its loss, AdamW), uncompiled as is its default and compiled as its option
  is: the same towers, 77 ids a text where ours have 80. Left out where open_clip_torch is not installed.
- `loader` is `openvision train` itself, from JPEG shards that it makes first, through our loader.
- Every case has a process of its own. Of several batches it takes the first that fits. Cases are run in order until the
  minutes are used up, and written as they come.
- Steps follow each other as in training: the clock is read before the first and after the last.

`--sweep` doubles batches until memory ends. `--smoke` runs the same code on shrunken models, on a CPU if need be: it
proves that the script works and measures nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from openvision.data.batch import Batch
from openvision.hardware import GIB, model_flops_utilisation
from openvision.models.flops import training_flops
from openvision.models.kernels import gpu
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import AnyModel, ModelConfig, build_model
from openvision.planning.memory import Setting, peak_bytes
from openvision.planning.parameters import count_parameters
from openvision.provenance import processor_name
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe
from openvision.recipe.sections import Loss
from openvision.runtime import SINGLE_PROCESS, use_float32_matmul
from openvision.training.checkpoint.folders import Progress
from openvision.training.guards import DeferredGuard
from openvision.training.objective import build_objective
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.profile import profile_recipe
from openvision.training.randomness import SampleRandomness
from openvision.training.run.throughput import peak_flops, peak_memory
from openvision.training.setup.compile import prepare_blocks
from openvision.training.setup.parallel import DistributedModel
from openvision.training.step import forward_backward

RECIPES = Path(__file__).parents[1] / "recipes"
CAPTION_TOKENS = (40, 80)
"""Shortest and longest caption; 60 on average."""
BOS = 1
WARM_UP = 4
"""Steps that do not count; the first compiles."""
IDLE_STEPS = 8
"""Steps in which pauses of the device are counted."""


@dataclass(frozen=True)
class Case:
    """One model at one resolution, and how it is run."""

    recipe: str
    """A recipe without ending, or `clip`, `open_clip` or `loader`: see above."""
    resolution: int
    batches: tuple[int, ...] = (256, 128, 64, 32)
    checkpointing: str = "none"
    compiled: bool = True
    steps: int = 12
    device: str = "cuda"
    smoke: bool = False
    matmul: str = "high"
    """torch's float32 matrix products: "high" is TF32 on a GPU, "highest" is float32 to the last bit."""
    sweep: bool = False
    """Whether all of `batches` are measured, until memory ends."""
    kernels: bool = True
    """Whether compiled blocks take the project's attention kernels, as eager ones do, or torch's attention."""
    whole: bool = False
    """Whether the model, from images and ids to embeddings and states, is compiled as one graph, not block by block."""


# In order of worth.
CASES = (
    Case("openvision/l14", 224),
    Case("clip", 224),
    Case("open_clip", 224, compiled=False),
    Case("open_clip", 224),
    Case("openvision2/l14", 224),
    Case("openvision/l14", 84, (1024, 512, 256, 128)),
    Case("loader", 224),
    Case("openvision/l14", 224, whole=True),
    Case("clip", 224, whole=True),
    Case("openvision/l14", 224, (128, 64, 32), compiled=False),
    Case("openvision/h14", 224, (128, 64, 32)),
    Case("openvision/so400m14", 224, (128, 64, 32)),
    Case("openvision/b16", 224, (512, 256, 128)),
    Case("clip", 224, compiled=False),
    Case("openvision2/l14", 84, (1024, 512, 256, 128)),
)


def measure(case: Case) -> list[dict[str, Any]]:
    """A row for each batch size; run in a fresh process."""
    torch.manual_seed(0)
    use_float32_matmul(case.matmul)
    gpu.IN_COMPILED_CODE = case.kernels
    if case.recipe == "loader":
        return [loader_fed(case)]
    rows: list[dict[str, Any]] = []
    for size in case.batches:
        try:
            row = open_clip_row(case, size) if case.recipe == "open_clip" else own_row(case, size)
        except torch.OutOfMemoryError:
            print(f"{case.recipe} at {case.resolution} px: batch {size} does not fit", file=sys.stderr)
            if case.sweep:
                break
            continue
        rows.append({**described(case), **row})
        if not case.sweep:
            break
    return rows


def described(case: Case) -> dict[str, Any]:
    """What a row says about how it was run."""
    names = ("recipe", "resolution", "checkpointing", "compiled", "matmul", "kernels", "whole")
    return {name: getattr(case, name) for name in names}


def recipe_of(case: Case) -> Recipe:
    """The recipe of a case, shrunken for a smoke test."""
    recipe = load_recipe(RECIPES / ("openvision/l14.toml" if case.recipe == "clip" else f"{case.recipe}.toml"))
    if case.recipe == "clip":
        assert isinstance(recipe.model, OpenVisionConfig)
        recipe = recipe.model_copy(
            update={
                "model": replace(recipe.model, decoder=None),
                "loss": Loss(contrastive=1, caption=0, texts=("alt",)),
            }
        )
    return recipe.model_copy(update={"model": shrunken(recipe.model)}) if case.smoke else recipe


def shrunken(config: ModelConfig) -> ModelConfig:
    """The same model with towers of two narrow blocks and few words."""
    small: dict[str, Any] = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 2}
    towers: dict[str, Any] = {"vision": replace(config.vision, **small)}
    if config.decoder is not None:
        towers["decoder"] = replace(config.decoder, **small, vocab_size=256)
    if config.text is not None:
        towers["text"] = replace(config.text, **small, vocab_size=256)
    return replace(config, **towers)


def own_row(case: Case, size: int) -> dict[str, Any]:
    """Ours at one batch size."""
    recipe, device = recipe_of(case), torch.device(case.device)
    resolution = 2 * recipe.model.vision.patch_size if case.smoke else case.resolution
    _, step = build_step(recipe, case, device)
    batch = random_batch(recipe, size, resolution, device)
    seconds = time_steps(lambda: step(batch), case.steps, device)
    texts = len(recipe.loss.texts)
    flops = training_flops(recipe.model, resolution, texts, batch.label_mask.sum().item() / size)
    setting = Setting(gpu=device.type == "cuda", checkpointing=case.checkpointing)  # pyright: ignore[reportArgumentType]
    expected = peak_bytes(recipe.model, count_parameters(recipe.model), resolution, texts, setting, size, size)
    low, high = (end / GIB for end in expected)
    return {"resolution": resolution, "planned_gib": [low, high], **rates(size, seconds, flops, device)}


def rates(size: int, seconds: float, flops: float | None, device: torch.device) -> dict[str, Any]:
    """What follows from the seconds of a step."""
    rate, peak = size / seconds, peak_flops(device)
    return {
        "batch": size,
        "images_per_second": rate,
        "step_seconds": seconds,
        "training_gflop_a_sample": None if flops is None else flops / 1e9,
        "mfu": None if peak is None or flops is None else model_flops_utilisation(flops, rate, peak),
        "peak_gib": peak_memory(device) / GIB,
    }


def build_step(recipe: Recipe, case: Case, device: torch.device) -> tuple[AnyModel, Callable[[Batch], None]]:
    """A new model and the computation of the trainer's step on it, in bf16."""
    model = build_model(recipe.model).to(device).train()
    blocks = case.compiled and not case.whole and not case.smoke
    prepare_blocks(model, case.checkpointing, blocks)  # pyright: ignore[reportArgumentType]
    optimizer, distributed = build_optimizer(model, recipe.optimizer), DistributedModel(model)
    objective = build_objective(distributed, recipe.loss, BOS)
    if case.whole:
        # In one graph or not at all; on a CPU captions are computed in groups of their lengths, which break it.
        model.compile(fullgraph=not case.smoke, backend="aot_eager" if case.smoke else "inductor")
    progress = Progress()
    guard = DeferredGuard(recipe.guards, progress, replace(SINGLE_PROCESS, device=device))

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        randomness = SampleRandomness(recipe.seed, batch.positions.cpu().numpy())
        losses = forward_backward(distributed, objective, batch, randomness, torch.bfloat16)
        norm = gradient_norm(optimizer)
        # As on an accelerator: the device selects the update, the host hears of a loss that is not finite later.
        guard.learn()
        apply_update(optimizer, 1e-5, norm, selected=guard.select(losses, norm))
        progress.step += 1

    return model, step


def open_clip_row(case: Case, size: int) -> dict[str, Any]:
    """open_clip's ViT-L-14 in a step as its training code takes it, mixed precision `amp_bf16`."""
    import open_clip  # pyright: ignore[reportMissingImports]

    device = torch.device(case.device)
    name, resolution = ("ViT-S-32", 64) if case.smoke else ("ViT-L-14", case.resolution)
    model = open_clip.create_model(name, device=device, force_image_size=resolution, output_dict=True).train()
    call = torch.compile(model) if case.compiled and not case.smoke else model
    loss = open_clip.ClipLoss()
    matrices = [p for n, p in model.named_parameters() if p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    images = torch.randn(size, 3, resolution, resolution, device=device)
    texts = torch.randint(1, 1000, (size, model.context_length), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            losses: dict[str, torch.Tensor] = loss(**call(images, texts), output_dict=True)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    seconds = time_steps(step, case.steps, device)
    return {"resolution": resolution, **rates(size, seconds, None, device)}


def time_steps(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of a step, the mean of `steps` that follow each other, after some that do not count."""
    for _ in range(WARM_UP):
        step()
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_batch(recipe: Recipe, size: int, resolution: int, device: torch.device) -> Batch:
    """Noise for images, random ids for texts, captions of 40 to 80 tokens; all but the targets' mask on the device."""
    decoder, vocabulary = recipe.model.decoder, recipe.vocab_size
    context, caption = recipe.context_length or 0, decoder.caption_length if decoder else 0

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (size, length), device=device)

    lengths = torch.linspace(*CAPTION_TOKENS, size).round().clamp(max=caption)
    return Batch(
        images=torch.randint(0, 256, (size, 3, resolution, resolution), dtype=torch.uint8, device=device),
        alt_ids=ids(context),
        sentence_ids=ids(context),
        labels=ids(caption),
        label_mask=torch.arange(caption) < lengths[:, None],
        positions=torch.arange(size),
        keys=[""] * size,
        rejects=(),
        texts_cut=0,
        captions_missing=0,
    )


def loader_fed(case: Case) -> dict[str, Any]:
    """`openvision train` of L/14 with all losses, one stage, from JPEG shards; the last lines of its log count.

    `data_wait` is the share of time that the host waits for batches, `idle` that in which the device does nothing.
    """
    size, resolution = (4, 28) if case.smoke else (case.batches[0], case.resolution)
    steps, images = (4, 2000) if case.smoke else (40, 8192)
    values = {
        "model.vision.image_size": resolution,
        "stages.0.resolution": resolution,
        "stages.0.batch_size": size,
        "stages.0.samples": size * steps,
        "stages.0.warmup_samples": 0,
        "data.train": "train",
        "data.synthetic_key": "synthetic",
        "run.device": case.device,
        "run.compile": str(not case.smoke).lower(),
        "run.log_every": 2 if case.smoke else 10,
        "run.loader_workers": 2 if case.smoke else 12,
        "run.loader_threads": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(loader_recipe(case))
        data, run = Path(folder) / "data", Path(folder) / "run"
        command = [sys.executable, "-m", "openvision.cli.main"]
        make = [
            "data",
            "scenes",
            data,
            "--train",
            images,
            "--held-out",
            100,
            "--objects",
            20,
            "--size",
            max(96, resolution),
        ]
        subprocess.run([*command, *map(str, make)], check=True, stdout=subprocess.DEVNULL)
        changes = [f"{key}={value}" for key, value in values.items()]
        train = ["train", recipe, "--run", run, "--data", data, *(f"--set={change}" for change in changes)]
        subprocess.run([*command, *map(str, train)], check=True, stdout=sys.stderr)
        idle = profile_recipe(load_recipe(recipe, changes), str(data), Path(folder) / "profile", steps=IDLE_STEPS).idle
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "images_per_second" in line][1:]
    mean = {key: sum(line[key] for line in timed) / len(timed) for key in ("images_per_second", "data_wait")}
    return {
        **described(case),
        "resolution": resolution,
        "batch": size,
        **mean,
        "idle": idle,
        "step_seconds": size / mean["images_per_second"],
        "mfu": timed[-1].get("mfu"),
        "peak_gib": timed[-1]["memory_gib"],
    }


def loader_recipe(case: Case) -> str:
    """L/14 with one stage and a learned vocabulary of 8,000: the released one is not at hand everywhere."""
    recipe = recipe_of(replace(case, recipe="openvision/l14"))
    model, vocabulary = recipe.model, 256 if case.smoke else 8000
    assert isinstance(model, OpenVisionConfig)
    assert model.decoder is not None
    towers = {name: replace(getattr(model, name), vocab_size=vocabulary) for name in ("text", "decoder")}
    data = recipe.data.model_copy(update={"tokenizer": None, "vocab_size": vocabulary})
    update = {"model": replace(model, **towers), "data": data, "stages": recipe.stages[:1]}
    return dump_recipe(recipe.model_copy(update=update))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row, and its speed over the row that it is compared with."""
    head = ["what", "px", "checkpointing", "compiled", "batch", "images/s", "MFU", "peak GiB", "planned GiB"]
    head += ["data wait", "idle", "compared"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        planned = "{:.1f} to {:.1f}".format(*row["planned_gib"]) if "planned_gib" in row else ""
        wait = f"{row['data_wait']:.2%}" if "data_wait" in row else ""
        compiled = "no" if not row["compiled"] else "one graph" if row.get("whole") else "by block"
        compiled += ", stock attention" if row["compiled"] and not row["kernels"] else ""
        cells = [row["recipe"], row["resolution"], row["checkpointing"], compiled]
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        idle = f"{row['idle']:.2%}" if row.get("idle") is not None else ""
        cells += [row["batch"], f"{row['images_per_second']:.0f}", mfu, peak, planned, wait, idle]
        lines.append("| " + " | ".join(map(str, [*cells, compared(row, rows)])) + " |")
    return "\n".join(lines)


def compared(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Speed of the contrastive part over open_clip's fastest, and of OpenVision 2 over version 1's fastest."""
    if row["recipe"] == "clip":
        rival = "open_clip"
    elif row["recipe"].startswith("openvision2/"):
        rival = row["recipe"].replace("openvision2/", "openvision/")
    else:
        return ""
    speeds = [other["images_per_second"] for other in rows if _rivals(other, rival, row["resolution"])]
    return f"{row['images_per_second'] / max(speeds):.2f}x {rival}" if speeds else ""


def _rivals(row: dict[str, Any], recipe: str, resolution: int) -> bool:
    return row["recipe"] == recipe and row["resolution"] == resolution


def in_own_process(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Run `measure` in a fresh interpreter: no case inherits memory or compiled code. No rows where it fails."""
    command = [sys.executable, __file__, "--one", json.dumps(vars(case))]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{case.recipe} at {case.resolution} px: left out ({type(error).__name__})", file=sys.stderr)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every case and write JSON and Markdown as they come."""
    arguments = parse()
    if arguments.one:
        given = json.loads(arguments.one)
        print(json.dumps(measure(Case(**given | {"batches": tuple(given["batches"])}))))
        return
    if arguments.device == "cpu" and not arguments.smoke:
        sys.exit("no GPU: this benchmark needs one; try --smoke")
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + 60 * arguments.minutes
    for case in chosen(arguments):
        if (left := end - time.monotonic()) < 20:
            print(f"{case.recipe} at {case.resolution} px: no time left", file=sys.stderr)
            continue
        rows += in_own_process(case, left)
        if arguments.output and rows:
            write(arguments, rows)
        print(table(rows[-1:]).splitlines()[-1] if rows else "", file=sys.stderr, flush=True)
    print(table(rows))


def chosen(arguments: argparse.Namespace) -> Iterator[Case]:
    """The cases of a command line, in order."""
    for case in CASES:
        if arguments.only and case.recipe not in arguments.only:
            continue
        if case.recipe == "open_clip" and find_spec("open_clip") is None:
            print("open_clip_torch is not installed: no comparison with it", file=sys.stderr)
            continue
        case = replace(case, device=arguments.device, smoke=arguments.smoke, matmul=arguments.matmul)
        case = replace(case, kernels=arguments.kernels)
        if arguments.smoke:
            case = replace(case, batches=(2,), steps=1)
        if arguments.sweep and case.recipe not in ("open_clip", "loader"):
            case = replace(case, sweep=True, batches=tuple(2**power for power in range(4, 13)))
            yield replace(case, checkpointing="selective")
        yield case


def parse() -> argparse.Namespace:
    """The command line."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({case.recipe for case in CASES}))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--sweep", action="store_true", help="double batches until memory ends, selective too")
    parser.add_argument("--matmul", choices=["high", "highest"], default="high", help="float32 products: TF32 or exact")
    parser.add_argument(
        "--stock-attention", dest="kernels", action="store_false", help="torch's attention in compiled blocks"
    )
    parser.add_argument("--device", default=found)
    parser.add_argument("--smoke", action="store_true", help="shrunken models, two images, no compiler")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far as JSON and Markdown."""
    cuda = arguments.device.startswith("cuda")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": ["benchmarks/train_gpu.py", *sys.argv[1:]],
        "smoke": arguments.smoke,
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name() if cuda else None,
            "driver": driver() if cuda else None,
        },
        "versions": {name: version(name) for name in ("torch", "triton", "open_clip_torch")},
        "cuda": torch.version.cuda,
        "results": rows,
    }
    output: Path = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    output.with_suffix(".md").write_text(table(rows) + "\n")


def version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


if __name__ == "__main__":
    main()
