"""`openvision data scenes`: composed images with texts like the web's."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.progress import ProgressLine
from openvision.terminal import echo


def scenes(
    folder: Annotated[Path, typer.Argument(help="Folder to write the shards into.")],
    train: Annotated[int, typer.Option(help="Scenes to train on.", min=1)] = 20_000,
    held_out: Annotated[int, typer.Option(help="Scenes of each other split.", min=1)] = 1_000,
    size: Annotated[int, typer.Option(help="Side of the images, pixels; 96 or more.", max=1024)] = 96,
    objects: Annotated[int, typer.Option(help="Kinds of objects.")] = 80,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.", min=0)] = 0,
    words: Annotated[float, typer.Option(help="Share of scenes with a printed word.")] = 0.5,
    word_size: Annotated[float, typer.Option(help="Size of printed words, a share of the side.")] = 0.27,
    caption_errors: Annotated[float, typer.Option(help="Probability of a wrong name, number or colour.")] = 0.05,
    alt_nothing: Annotated[float, typer.Option(help="Share of alt-texts that say nothing of the image.")] = 0.2,
    alt_word: Annotated[float, typer.Option(help="Share that is the printed word alone.")] = 0.08,
    alt_one: Annotated[float, typer.Option(help="Share that names one group of objects.")] = 0.47,
    alt_everything: Annotated[float, typer.Option(help="Share that names all objects.")] = 0.25,
    alt_junk: Annotated[float, typer.Option(help="Share with words of web pages around.")] = 0.6,
    aspect: Annotated[
        list[float] | None, typer.Option(help="Width over height of the images; several times: equally many of each.")
    ] = None,
    drawings: Annotated[
        bool, typer.Option("--drawings", help="Also write heldout_drawings, by another artist; fetched by npm.")
    ] = False,
    packages: Annotated[
        Path | None, typer.Option(help="With --drawings: folder of the package. Default: in your cache folder.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="With --drawings: fetch nothing.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that paint; all cores by default.", min=1)] = None,
) -> None:
    """Compose scenes of objects, backgrounds and printed words, with alt-texts, captions and exact masks."""
    from openvision.data.sources.scenes.make import Options, make_scenes
    from openvision.data.sources.scenes.texts import AltTexts

    alt = AltTexts(alt_nothing, alt_word, alt_one, alt_everything, alt_junk)
    options = Options(
        train, held_out, size, objects, seed, words, word_size, caption_errors, alt, drawings, tuple(aspect or [1.0])
    )
    line = ProgressLine("scene")
    make_scenes(folder, options, workers, lambda done, total: line(done, done / total), packages, offline)
    echo(f"shards: {folder}")
