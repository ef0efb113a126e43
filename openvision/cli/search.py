"""`openvision search`: find images by a text or by an image, in a folder of images or in vectors of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openvision.cli.options import (
    DEFAULT_CHECKPOINT,
    CheckpointOption,
    Device,
    Native,
    Squash,
    preprocessing_of,
    tell_shapes,
)
from openvision.cli.progress import ProgressLine
from openvision.errors import OpenVisionError
from openvision.terminal import echo
from openvision.untrusted import one_line

if TYPE_CHECKING:
    from openvision.images.preprocess import Preprocessing


def search(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images, including subfolders, or of vectors by `openvision encode`.")
    ],
    query: Annotated[str | None, typer.Argument(help='Text to search for, e.g. "a red car".')] = None,
    image: Annotated[Path | None, typer.Option(help="Search for images like this one, in a folder of vectors.")] = None,
    top: Annotated[int, typer.Option(help="Number of images to show.", min=1)] = 5,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector, whatever was indexed.")] = False,
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    squash: Squash = False,
    native: Native = False,
    device: Device = "auto",
) -> None:
    """Find the images that match a text, or another image, best."""
    from openvision.inference.vector_folder import is_vector_folder

    if (query is None) == (image is None):
        raise OpenVisionError('give either a text, e.g. "a red car", or an image with --image')
    how = preprocessing_of(squash, native)
    if is_vector_folder(folder):
        _search_vectors(folder, query, image, top, exact, checkpoint, device)
    elif query is None:
        raise OpenVisionError(f"--image searches in vectors; run: openvision encode {folder} -o INDEX")
    else:
        _search_images(folder, query, top, checkpoint, how, device)


def _search_images(
    folder: Path, query: str, top: int, checkpoint: str, preprocessing: "Preprocessing", device: str
) -> None:
    from openvision.inference.load import load
    from openvision.inference.vision import image_files

    # Check the folder before loading the model.
    image_files(folder)
    encoder = load(checkpoint, device=device, preprocessing=preprocessing)
    tell_shapes(encoder.vision.config.aspects, preprocessing)
    result = encoder.search_folder(folder, query, top, progress=ProgressLine("image"))
    for path, score in result.hits:
        echo(f"{score:6.3f}  {path}")
    for _, reason in result.skipped:
        echo(f"skipped: {reason}", err=True)


def _search_vectors(
    folder: Path,
    query: str | None,
    image: Path | None,
    top: int,
    exact: bool,
    checkpoint: str,
    device: str,
) -> None:
    from openvision.inference.index import VectorIndex
    from openvision.inference.load import load, load_vision

    index = VectorIndex.open(folder, exact)
    # Images of queries are prepared as those of the vectors were.
    (height, width), preprocessing = index.vectors.job.resolution, index.vectors.job.preprocessing
    if query is not None:
        encoder = load(checkpoint, device=device, resolution=(height, width), preprocessing=preprocessing)
        index.check_encoder(encoder)
        if not query.strip():
            raise OpenVisionError('the query is empty; give a text, e.g. "a red car"')
        vector = encoder.encode_texts([query])[0]
    else:
        assert image is not None
        encoder = load_vision(checkpoint, device=device, resolution=(height, width), preprocessing=preprocessing)
        index.check_encoder(encoder)
        vector = encoder.encode_unit([image])[0]
    for hit in index.search(vector.numpy(), top):
        echo(f"{hit.cosine:6.3f}  {one_line(hit.name)}")
