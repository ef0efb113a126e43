"""`openvision vlm`: build, train and chat with LLaVA-style models around an encoder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Device, EncoderOption, Offline, Revision
from openvision.errors import OpenVisionError
from openvision.terminal import echo

app = typer.Typer(help="LLaVA-style models around an encoder: build, train, score, chat.", no_args_is_help=True)


@app.command()
def build(
    encoder: EncoderOption,
    llm: Annotated[str, typer.Option(help="Causal language model: folder, .gguf file or Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    framework: Annotated[str, typer.Option(help="llava-1.5, llava-next or llava-native.")] = "llava-1.5",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="llava-native: patches of an image, at most; by default those of the encoder's square.", min=1
        ),
    ] = None,
    feature_layer: Annotated[int, typer.Option(help="Hidden state for the projector; -1 is the last block's.")] = -2,
    pad_token: Annotated[
        str | None, typer.Option(help="Existing token for padding, for a tokenizer without one.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, for a tokenizer without a chat template.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the saved weights: float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the projector.", min=0)] = 0,
    revision: Revision = None,
    offline: Offline = False,
) -> None:
    """Build a model from an encoder and a language model; stock transformers loads it."""
    from openvision.multimodal.model.build import BuildOptions
    from openvision.multimodal.model.build import build as run
    from openvision.multimodal.model.llm import TokenizerOptions
    from openvision.weights.load import Request

    options = BuildOptions(
        framework=framework,  # pyright: ignore[reportArgumentType]
        max_tokens=max_tokens,
        feature_layer=feature_layer,
        seed=seed,
        dtype=dtype,
        tokenizer=TokenizerOptions(pad_token, chat_template),
    )
    geometry = run(encoder, llm, output, options, Request(vision_only=True, revision=revision, offline=offline))
    side = geometry.grid
    tokens = f"{side} x {side} = {geometry.patches} tokens a square"
    if geometry.native is not None:
        tokens = f"up to {geometry.native.max_tokens} patches an image in native shapes, a line break behind each row"
    if geometry.pinpoints:
        most = max(geometry.tokens(height, width) for height, width in geometry.pinpoints)
        tokens += f", up to {most} an image in tiles"
    echo(f"{geometry.image_size} px, {tokens}; {geometry.prefix_tokens} prefix tokens dropped")
    echo(f"model: {output}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/vlm/llava-1.5.toml.")],
    model: Annotated[Path, typer.Option(help="Folder written by `openvision vlm build`.")],
    data: Annotated[Path, typer.Option(help="Folder of the files named in the recipe.")],
    run: Annotated[Path, typer.Option(help="Folder for checkpoints, metrics and the trained model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a model by a recipe; the same command resumes an interrupted run. Works under torchrun."""
    from openvision.training.run.startup import active_watch

    if (watch := active_watch()) is not None:
        watch.know_run(run)
    from openvision.multimodal.recipe import load_vlm_recipe
    from openvision.multimodal.training.run import train as train_model

    folder = train_model(load_vlm_recipe(recipe, overrides), model, data, run, typer.echo, device)
    echo(f"trained model: {folder}")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/vlm/llava-1.5.toml.")],
    encoder: EncoderOption,
    llm_parameters: Annotated[
        float,
        typer.Option(help="Parameters of the language model without its embeddings, e.g. 7e9.", min=1),
    ],
    samples: Annotated[list[int], typer.Option(help="Samples in a stage's data set; once for each stage.", min=1)],
    devices: Annotated[int, typer.Option(help="Number of devices.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="h100, h200, a100, 4090 or cpu (a machine of two cores).")] = "h100",
    text_tokens: Annotated[int, typer.Option(help="Mean text tokens of a sample.", min=0)] = 200,
) -> None:
    """Estimate FLOPs, hours and the size of cached features for each stage of a recipe; trains nothing."""
    from dataclasses import replace

    from openvision.hardware import device_named
    from openvision.multimodal.cost import plan_stages
    from openvision.multimodal.model.geometry import Geometry, anyres_pinpoints
    from openvision.multimodal.model.native import native_shapes
    from openvision.multimodal.recipe import load_vlm_recipe
    from openvision.weights.load import vision_shape

    read, vision, which = load_vlm_recipe(recipe), vision_shape(encoder), device_named(device)
    if len(samples) != len(read.stages):
        raise OpenVisionError(f"{recipe} has {len(read.stages)} stages; give --samples once for each stage")
    geometry = Geometry(vision.image_size, vision.patch_size, 1, vision.width, vision.depth)
    if read.framework == "llava-next":
        geometry = replace(geometry, pinpoints=anyres_pinpoints(vision.image_size))
    if read.framework == "llava-native":
        geometry = replace(geometry, native=native_shapes(vision.patch_size, read.max_tokens or geometry.patches))
    for cost in plan_stages(read.stages, vision, geometry, llm_parameters, samples, text_tokens, which, devices):
        sample = cost.sample
        echo(
            f"{cost.stage.name}: {cost.samples:,} samples of {sample.visual_tokens} + {text_tokens} tokens, "
            f"{sample.total / 1e12:.2f} TFLOP each ({sample.encoder / sample.total:.0%} in the encoder); "
            f"{cost.hours[0]:.2g} to {cost.hours[1]:.2g} h on {devices} {which.name}"
        )
        if cost.stage.learning_rate.encoder is None:
            squares = geometry.squares(2 * vision.image_size, 2 * vision.image_size)
            size = cost.samples * squares * geometry.most_patches * geometry.width * 2
            gain = (
                f"make a step {sample.cached_speedup:.2f} times as fast" if sample.llm else "leave only the projector"
            )
            echo(f"{cost.stage.name}: cached features {gain} and take {size / 1e9:,.0f} GB in bfloat16")


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="Folder of a built or trained model.")],
    image: Annotated[Path, typer.Argument(help="Image to talk about.")],
    prompt: Annotated[str | None, typer.Option(help="One question; prints its answer and exits.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0)] = 0.0,
    device: Device = "auto",
) -> None:
    """Talk about an image; an empty line or Ctrl-D ends, /new starts a new conversation."""
    from openvision.multimodal.data.images import ImageFile
    from openvision.multimodal.model.generate import Decoding, converse, load_assistant
    from openvision.runtime import resolve_device

    opened, where = ImageFile(image).open(), resolve_device(device)
    assistant = load_assistant(model, where)
    decoding = Decoding(max_new_tokens, temperature, batch_size=1)
    questions = _typed() if prompt is None else iter([prompt])
    converse(assistant, opened, questions, decoding, lambda text: echo(text, nl=False))


def _typed() -> Iterator[str]:
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
