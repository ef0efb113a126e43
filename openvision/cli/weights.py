"""`openvision models`, `info`, `convert`, `export` and `verify`: checkpoints in and out."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from openvision.cli.options import Checkpoint, Decoder, ImageSize, Offline, Resolution, Revision, Vocabulary
from openvision.errors import OpenVisionError


def models() -> None:
    """List every released checkpoint, with size, resolution and reported accuracy."""
    from openvision.weights.registry import available_models, released

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    for column in ("parameters", "patch", "pixels", "tokens", "embedding", "ImageNet"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("Hub", no_wrap=True)
    for name in available_models():
        entry = released(name)
        table.add_row(
            name,
            f"{entry.parameters / 1e6:.1f} M",
            str(entry.vision.patch_size),
            str(entry.vision.image_size),
            str(entry.tokens),
            str(entry.embed_dim or "-"),
            f"{entry.imagenet_top1:.1f}" if entry.imagenet_top1 is not None else "-",
            entry.repository,
        )
    # Wider than most terminals, and piped into grep: never wrapped.
    Console(width=None if Console().width > 150 else 150).print(table)
    typer.echo(
        "\nparameters: vision tower and head; tokens: patches at that resolution; ImageNet: zero-shot accuracy as\n"
        "reported. Pictures: shorter side and centre crop as trained, or --squash as the released configurations say.\n"
        "openvision2 models hold a vision tower only: use openvision.load_vision."
    )


def info(
    checkpoint: Checkpoint,
    image_size: ImageSize = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Say what a checkpoint holds: shape, parameters, tokens, where it came from."""
    from openvision.weights.load import Request, load_checkpoint

    loaded = load_checkpoint(checkpoint, Request(image_size=image_size, revision=revision, offline=offline))
    vision = loaded.vision.config
    rows, columns = vision.grid()
    lines = [("source", loaded.source), ("vision", _shape(loaded.vision, vision))]
    lines.append(("pictures", f"{vision.image_size} px, patch {vision.patch_size}: {rows} x {columns} patch tokens"))
    if loaded.model is not None:
        config = loaded.model.config
        lines.append(("text", f"{_shape(loaded.model.text, config.text)}, {config.text.context_length} ids"))
        lines.append(("vocabulary", _vocabulary(loaded.tokenizer, config.text.vocab_size)))
        if loaded.model.decoder is not None and config.decoder is not None:
            lines.append(("decoder", _shape(loaded.model.decoder, config.decoder)))
        lines.append(("logit scale", f"{float(loaded.model.logit_scale.detach().exp()):.2f}"))
    if loaded.captioner is not None:
        decoder = loaded.captioner.decoder
        lines.append(("decoder", f"{_shape(decoder, decoder.config)}, {decoder.config.caption_length} ids, one by one"))
        lines.append(("vocabulary", _vocabulary(loaded.tokenizer, decoder.config.vocab_size)))
    head = loaded.vision.head
    lines.append(("embedding", f"{head.out_features} wide" if head is not None else "none: no trained head"))
    lines += [(name.replace("_", " "), str(value)) for name, value in _plain(loaded.provenance).items()]
    for name, value in lines:
        typer.echo(f"{name:<18} {value}")


def _shape(module: Any, config: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{config.depth} blocks of width {config.width}, {config.heads} heads, {count / 1e6:.2f} M parameters"


def _vocabulary(tokenizer: Any, size: int) -> str:
    return f"{tokenizer.vocab_size} of {size} entries" if tokenizer is not None else f"{size} entries, none came along"


def _plain(provenance: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if isinstance(value, (str, int, float))}


def convert(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    vision_only: Annotated[bool, typer.Option("--vision-only", help="Keep the vision tower alone.")] = False,
    vocabulary: Vocabulary = None,
    image_size: ImageSize = None,
    decoder: Decoder = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Turn any checkpoint into a folder of ours: safetensors, shape, tokenizer."""
    from openvision.weights.export.targets import export
    from openvision.weights.load import Request, load_checkpoint

    loaded = load_checkpoint(checkpoint, Request(vision_only, vocabulary, image_size, decoder, revision, offline))
    if loaded.model is not None and loaded.tokenizer is None:
        raise OpenVisionError(
            f"{checkpoint} brings no vocabulary, and a model folder needs one: give bert-base-uncased's vocab.txt with "
            "--vocabulary, or keep the vision tower alone with --vision-only"
        )
    for result in export(loaded, "safetensors", output):
        typer.echo(result)
    typer.echo(f"model folder: {output}")


def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option(help="safetensors, open_clip, timm, transformers, beit, siglip or onnx.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    precision: Annotated[str, typer.Option(help="Of ONNX graphs: fp32, fp16 or int8.")] = "fp32",
    dynamic_resolution: Annotated[
        bool, typer.Option("--dynamic-resolution", help="ONNX graph for any resolution.")
    ] = False,
    resolution: Resolution = None,
    vision_only: Annotated[bool, typer.Option("--vision-only", help="Export the vision tower alone.")] = False,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Write the SigLIP form although it cannot be exact.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Load the result and compare it with the model.")] = True,
    vocabulary: Vocabulary = None,
    image_size: ImageSize = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Write an encoder for another library, load it there and compare."""
    from typing import get_args

    from openvision.weights.export.onnx import Precision
    from openvision.weights.export.targets import TARGETS, ExportOptions
    from openvision.weights.export.targets import export as run
    from openvision.weights.load import Request, load_checkpoint

    if to not in TARGETS:
        raise OpenVisionError(f"unknown export target {to!r}; there are {', '.join(TARGETS)}")
    if precision not in get_args(Precision):
        raise OpenVisionError(f"unknown precision {precision!r}; there are {', '.join(get_args(Precision))}")
    options = ExportOptions(
        precision=precision,  # pyright: ignore[reportArgumentType]
        dynamic_resolution=dynamic_resolution,
        resolution=resolution,
        accept_drift=accept_drift,
        check=check,
    )
    request = Request(vision_only, vocabulary, image_size, revision=revision, offline=offline)
    for result in run(load_checkpoint(checkpoint, request), to, output, options):
        typer.echo(f"{to}  {result}")
    typer.echo(f"written: {output}")


def verify(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Check a released checkpoint: strict loading, its numbers, and zero-shot on a few drawn pictures."""
    from openvision.inference.verify import verify as run

    report = run(checkpoint, vocabulary, revision, offline)
    for line in report.lines():
        typer.echo(line)
    if not report.passed:
        raise OpenVisionError(f"{checkpoint} does not behave like a trained OpenVision encoder: see the lines above")
