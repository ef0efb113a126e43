"""`openvision demo`: try checkpoints in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import (
    DEFAULT_CHECKPOINT,
    MODEL_HELP,
    Device,
    Native,
    Offline,
    preprocessing_of,
    tell_shapes,
)
from openvision.cli.progress import ProgressLine
from openvision.terminal import echo

PORT = 7860
# What `openvision quickstart` draws, where it has run.
QUICKSTART_IMAGES = Path("runs/scenes/heldout_combinations")


def demo(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help=f"{MODEL_HELP} Several stand side by side. By default runs/quickstart."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="What to search: a folder of images, of shards, or of vectors by `openvision encode`."),
    ] = None,
    vlm: Annotated[
        Path | None, typer.Option(help="Multimodal model to chat with: a folder of `openvision vlm build` or `train`.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = PORT,
    device: Device = "auto",
    native: Native = False,
    offline: Offline = False,
) -> None:
    """Try checkpoints in the browser: classify, search, caption, chat. Reachable from this machine only."""
    import threading

    from openvision.demo.checkpoint import distinct_names, load_demo
    from openvision.demo.collection import open_collection
    from openvision.demo.serve import check_port, serving
    from openvision.errors import require
    from openvision.inference.embed import images_of
    from openvision.inference.vector_folder import is_vector_folder
    from openvision.runtime import resolve_device

    # What is wrong is told before weights are read and images are encoded.
    where = resolve_device(device)
    require("gradio", extra="demo")
    check_port(port)
    if images is None and QUICKSTART_IMAGES.is_dir():
        images = QUICKSTART_IMAGES
    if images is not None and not is_vector_folder(images):
        images_of(images)
    chat = None
    if vlm is not None:
        from openvision.demo.chat import load_chat

        chat = load_chat(vlm, where)
    how = preprocessing_of(squash=False, native=native)
    sources = checkpoints or [DEFAULT_CHECKPOINT]
    loaded = distinct_names([load_demo(source, where, offline, how) for source in sources])
    for one in loaded:
        tell_shapes(one.encoder.vision.config.aspects, how)
    collection = None
    if images is not None:
        line = ProgressLine("image")
        collection = open_collection(images, loaded, lambda done, total: line(done, done / total))
    with serving(loaded, collection, port, chat=chat) as address:
        echo(f"open {address} in a browser; Ctrl-C ends the demo")
        threading.Event().wait()
