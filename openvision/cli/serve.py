"""`openvision serve`: a captioner behind OpenAI's protocol."""

from pathlib import PurePath
from typing import Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, Device, Native
from openvision.terminal import echo

PORT = 8000


def serve(
    captioner: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Model with a caption decoder, or transformers:FOLDER or ID.")
    ] = DEFAULT_CHECKPOINT,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0: any free one.", min=0, max=65535)] = PORT,
    name: Annotated[str | None, typer.Option(help="Name for clients; default: that of the folder.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images decoded at once.", min=1, max=1024)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Longest caption that a client may ask for, tokens.", min=1)] = 512,
    native: Native = False,
    device: Device = "auto",
) -> None:
    """Answer OpenAI's chat requests with captions of the image in them; other programs and machines may ask."""
    from openvision.cli.recaption import local_captioner
    from openvision.errors import OpenVisionError
    from openvision.recaption.captioners.captioner import Sampling
    from openvision.recaption.serving.server import KEY_VARIABLE, CaptionServer, is_local

    if captioner.startswith(("http://", "https://")):
        raise OpenVisionError(f"{captioner} is an endpoint already; name a model to serve")
    loaded = local_captioner(captioner, Sampling(), batch_size, device, native)
    served = name or PurePath(captioner).name or captioner
    with CaptionServer(loaded, served, host, port, max_tokens) as server:
        if not (is_local(host) or server.key):
            echo(f"whoever reaches {host} may ask; set a key in {KEY_VARIABLE}", err=True)
        echo(f"serving {served} at {server.url}; Ctrl-C ends it")
        server.serve_forever()
