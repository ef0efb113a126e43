"""`openvision models`, `info`, `convert`, `export` and `verify`: released and own checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from openvision.cli.options import Checkpoint, Decoder, Device, ImageSize, Offline, Resolution, Revision, Vocabulary
from openvision.errors import OpenVisionError
from openvision.terminal import Console, echo

if TYPE_CHECKING:
    from torch import Tensor, nn

    from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
    from openvision.models.decoders.parallel import DecoderConfig
    from openvision.models.openvision3 import ReconstructionConfig
    from openvision.models.text import TextConfig
    from openvision.models.vision import VisionConfig
    from openvision.text.tokenizer import Tokenizer

    TowerConfig = VisionConfig | TextConfig | DecoderConfig | AutoregressiveDecoderConfig | ReconstructionConfig


def models() -> None:
    """List the released checkpoints with size, resolution and reported accuracy."""
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
    # Wider than most terminals; not wrapped, so that grep works.
    Console(width=None if Console().width > 150 else 150).print(table)
    echo(
        "\nparameters: vision tower and head. tokens: patches at that resolution. ImageNet: reported zero-shot top-1.\n"
        "Preprocessing: resize the shorter side and centre-crop, as in training; --squash as in the released "
        "configurations.\nopenvision2 models are vision towers only: load them with openvision.load_vision."
    )


def info(
    checkpoint: Checkpoint,
    image_size: ImageSize = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Show the shape, parameters, tokens and provenance of a checkpoint."""
    from openvision.frozen.autoencoder import describe_autoencoder
    from openvision.models.genlip import GenLipTextConfig
    from openvision.weights.load import Request, load_checkpoint

    loaded = load_checkpoint(checkpoint, Request(image_size=image_size, revision=revision, offline=offline))
    vision = loaded.vision.config
    rows, columns = vision.grid()
    lines = [("source", loaded.source), ("vision", _shape(loaded.vision, vision))]
    lines.append(("images", f"{vision.image_size} px, patch {vision.patch_size}: {rows} x {columns} patch tokens"))
    if loaded.model is not None:
        config = loaded.model.config
        lines.append(("text", f"{_shape(loaded.model.text, config.text)}, {config.text.context_length} ids"))
        lines.append(("vocabulary", _vocabulary(loaded.tokenizer, config.text.vocab_size)))
        if loaded.model.decoder is not None and config.decoder is not None:
            lines.append(("decoder", _shape(loaded.model.decoder, config.decoder)))
        lines.append(("logit scale", f"{float(loaded.model.logit_scale.detach().exp()):.2f}"))
    if loaded.unified is not None:
        unified = loaded.unified
        lines.append(("autoencoder", describe_autoencoder(unified.config.vision.autoencoder)))
        lines.append(("text", f"{_shape(unified.text, unified.config.text)}, {unified.config.text.context_length} ids"))
        lines.append(("reconstruction", _shape(unified.reconstruction, unified.config.reconstruction)))
    if (writer := loaded.captioner or loaded.unified) is not None:
        decoder = writer.decoder
        if isinstance(decoder.config, GenLipTextConfig):
            lines.append(("captions", f"by the same transformer, {decoder.config.caption_length} ids, causal"))
        else:
            lines.append(("decoder", f"{_shape(decoder, decoder.config)}, {decoder.config.caption_length} ids, causal"))
        lines.append(("vocabulary", _vocabulary(loaded.tokenizer, decoder.config.vocab_size)))
    head = loaded.vision.head
    lines.append(("embedding", f"{head.out_features} dimensions" if head is not None else "none: no trained head"))
    plain = {name: value for name, value in loaded.provenance.items() if isinstance(value, (str, int, float))}
    lines += [(name.replace("_", " "), str(value)) for name, value in plain.items()]
    for name, value in lines:
        echo(f"{name:<18} {value}")


def _shape(module: "nn.Module", config: "TowerConfig") -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{config.depth} blocks of width {config.width}, {config.heads} heads, {count / 1e6:.2f} M parameters"


def _vocabulary(tokenizer: "Tokenizer | None", size: int) -> str:
    return f"{tokenizer.vocab_size} of {size} entries" if tokenizer is not None else f"{size} entries, not included"


def convert(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    vision_only: Annotated[bool, typer.Option("--vision-only", help="Convert only the vision tower.")] = False,
    vocabulary: Vocabulary = None,
    image_size: ImageSize = None,
    decoder: Decoder = False,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Convert any checkpoint to a model folder: safetensors, config, tokenizer."""
    from openvision.weights.export.targets import export
    from openvision.weights.load import Request, load_checkpoint

    loaded = load_checkpoint(checkpoint, Request(vision_only, vocabulary, image_size, decoder, revision, offline))
    if loaded.model is not None and loaded.tokenizer is None:
        raise OpenVisionError(
            f"{checkpoint} comes without a vocabulary, which a model folder needs; give the vocab.txt of "
            "bert-base-uncased with --vocabulary, or convert only the vision tower with --vision-only"
        )
    for result in export(loaded, "safetensors", output):
        echo(result)
    echo(f"model folder: {output}")


def export(
    checkpoint: Checkpoint,
    to: Annotated[str, typer.Option(help="safetensors, open_clip, timm, transformers, beit, siglip or onnx.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder.")],
    precision: Annotated[str, typer.Option(help="Precision of ONNX graphs: fp32, fp16 or int8.")] = "fp32",
    dynamic_resolution: Annotated[
        bool, typer.Option("--dynamic-resolution", help="ONNX graph that accepts any resolution.")
    ] = False,
    resolution: Resolution = None,
    vision_only: Annotated[bool, typer.Option("--vision-only", help="Export only the vision tower.")] = False,
    accept_drift: Annotated[
        bool, typer.Option("--accept-drift", help="Export to SigLIP although the result is not exact.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Load the result in the other library and compare.")] = True,
    images: Annotated[
        Path | None, typer.Option(help="With --to onnx: folder of images like those to come, to compare on as well.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="With --precision int8: folder of images like those to come, on which the scales of the image graph's "
            "activations are chosen once; without it they are computed from each batch."
        ),
    ] = None,
    least_cosine: Annotated[
        float | None,
        typer.Option(
            help="Smallest cosine of an embedding of fp16 or int8 with the model's; 0.9999 and 0.98 by default.",
            min=0,
            max=1,
        ),
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="With --to onnx: add run.py, which needs numpy, Pillow and onnxruntime.")
    ] = False,
    labels: Annotated[
        str | None, typer.Option(help='With --bundle: labels that run.py tells apart, "a cat,a dog".')
    ] = None,
    vocabulary: Vocabulary = None,
    image_size: ImageSize = None,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Export an encoder to another library, load it there and compare."""
    from typing import get_args

    from openvision.inference.encoder import distinct_labels
    from openvision.weights.export.onnx_precision import Precision
    from openvision.weights.export.targets import TARGETS, ExportOptions
    from openvision.weights.export.targets import export as run
    from openvision.weights.load import Request, load_checkpoint

    if to not in TARGETS:
        raise OpenVisionError(f"unknown export target {to!r}; choose one of {', '.join(TARGETS)}")
    if precision not in get_args(Precision):
        raise OpenVisionError(f"unknown precision {precision!r}; choose one of {', '.join(get_args(Precision))}")
    if to != "onnx" and images is not None:
        raise OpenVisionError(f"--images compares ONNX graphs, not {to}; leave it out, or export with --to onnx")
    if bundle and to != "onnx":
        raise OpenVisionError(f"--bundle goes with ONNX graphs, not {to}; leave it out, or export with --to onnx")
    if labels is not None and not bundle:
        raise OpenVisionError("--labels are for the script of a bundle; add --bundle")
    names = tuple(distinct_labels(labels.split(","))) if labels is not None else ()
    request = Request(vision_only, vocabulary, image_size, revision=revision, offline=offline)
    loaded = load_checkpoint(checkpoint, request)
    side = resolution or loaded.vision.config.image_size
    options = ExportOptions(
        precision=precision,  # pyright: ignore[reportArgumentType]
        dynamic_resolution=dynamic_resolution,
        resolution=resolution,
        accept_drift=accept_drift,
        check=check,
        images=_sample(images, side, "--images") if images is not None else None,
        calibration=_sample(calibration, side, "--calibration") if calibration is not None else None,
        least_cosine=least_cosine,
        bundle=bundle,
        labels=names,
    )
    for result in run(loaded, to, output, options):
        echo(f"{to}  {result}")
    echo(f"written: {output}")


def _sample(folder: Path, resolution: int, option: str) -> "Tensor":
    """At most 256 images spread over a folder, prepared: uint8 (n, 3, R, R); unreadable ones are left out."""
    from openvision.images.decode import BadSampleError
    from openvision.images.preprocess import prepare, to_batch
    from openvision.inference.vision import image_files

    files, prepared = image_files(folder), []
    for path in files[:: -(-len(files) // 256)]:
        try:
            prepared.append(prepare(path.read_bytes(), resolution))
        except BadSampleError as error:
            echo(f"skipped: {path}: {error}", err=True)
    if not prepared:
        raise OpenVisionError(f"no image in {folder} can be read; give another folder with {option}")
    return to_batch(prepared)


def verify(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary = None,
    revision: Revision = None,
    offline: Offline = False,
    device: Device = "auto",
) -> None:
    """Verify a checkpoint: strict loading, finite numbers, and zero-shot accuracy on a few drawn images."""
    from openvision.inference.verify import verify as run
    from openvision.runtime import resolve_device

    report = run(checkpoint, vocabulary, revision, offline, resolve_device(device))
    for line in report.lines():
        echo(line)
    if not report.passed:
        raise OpenVisionError(f"{checkpoint} does not behave like a trained OpenVision encoder; see the lines above")
