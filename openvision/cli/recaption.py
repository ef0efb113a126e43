"""`openvision recaption`: new captions for the images of shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from openvision.cli.options import Device
from openvision.terminal import echo

_BATCHES_AHEAD = 16


def recaption(
    shards: Annotated[str, typer.Argument(help="Folder of shards, which is not changed.")],
    captioner: Annotated[
        str, typer.Option(help="Model with a caption decoder, or URL of an OpenAI-compatible endpoint.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for captions tars and links to the shards.")],
    model: Annotated[str | None, typer.Option(help="Model of the endpoint; default: the only one it has.")] = None,
    key: Annotated[str, typer.Option(help="Name of the new caption.")] = "recaption",
    template: Annotated[str, typer.Option(help="Prompt: v1, v2 (with the alt-text) or a text file.")] = "v1",
    per_image: Annotated[int, typer.Option(help="Captions an image; several need a temperature.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Images decoded, or requests sent, at once.", min=1, max=1024)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Longest caption of an endpoint, tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling of an endpoint; 0 is greedy.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    on_bad: Annotated[Literal["drop", "keep"], typer.Option(help="What to do with bad captions.")] = "drop",
    device: Device = "auto",
) -> None:
    """Caption the images of shards; start it several times to share the work, and again after a stop."""
    from openvision.errors import OpenVisionError
    from openvision.recaption.captioner import load_decoder
    from openvision.recaption.endpoint import Endpoint
    from openvision.recaption.job import Options, recaption_shards
    from openvision.recaption.prompts import load_prompt

    prompt = load_prompt(template)
    if captioner.startswith(("http://", "https://")):
        if per_image > 1 and temperature == 0:
            raise OpenVisionError("--per-image above 1 gives equal captions at temperature 0; set --temperature 0.7")
        source = Endpoint(captioner, model, temperature, max_tokens, parallel=batch_size)
        # While some requests wait to be repeated, the others of a batch go on.
        batch_size *= _BATCHES_AHEAD
    else:
        from openvision.runtime import resolve_device

        source = load_decoder(captioner, resolve_device(device))
    options = Options(key, per_image, batch_size, seed, on_bad)
    counts = recaption_shards(shards, source, prompt, output, options, echo)
    for name, count in sorted(counts.items()):
        echo(f"{name}\t{count}")
