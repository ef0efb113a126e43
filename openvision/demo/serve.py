"""Serve the page on this machine only."""

import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from openvision.demo.checkpoint import DemoCheckpoint
from openvision.demo.collection import Collection
from openvision.demo.page import CSS, build_page
from openvision.errors import OpenVisionError, require

if TYPE_CHECKING:
    from openvision.demo.chat import DemoChat

HOST = "127.0.0.1"
_MOST_BYTES = 100 * 2**20


def check_port(port: int) -> None:
    """Raise OpenVisionError when another program listens on `port`, or it may not be opened."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OpenVisionError(
                f"port {port} cannot be opened: {error.strerror}; give another one with --port"
            ) from error


@contextmanager
def serving(
    checkpoints: Sequence[DemoCheckpoint],
    collection: Collection | None,
    port: int,
    cache: Path | None = None,
    chat: "DemoChat | None" = None,
) -> Iterator[str]:
    """Serve until the block ends; yields the address. Uploads are removed with their temporary folder."""
    check_port(port)
    with tempfile.TemporaryDirectory(prefix="openvision-demo-") as uploads:
        # Read when Gradio is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_OFFLINE": "1"}
        gradio = require("gradio", extra="demo")
        blocks = build_page(checkpoints, collection, cache, chat)
        blocks.queue(default_concurrency_limit=2)
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        _, address, _ = blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            ssr_mode=False,
            max_file_size=_MOST_BYTES,
            theme=theme,
            css=CSS,
        )
        try:
            yield address
        finally:
            blocks.close(verbose=False)
