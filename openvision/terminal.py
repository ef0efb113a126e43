"""Printing: every line that the package prints goes through `echo` or `Console`, which spell out control characters.

Names, keys, labels and messages come from data and from files of strangers; an escape character in them could retitle
the window, move the cursor or hide lines.
"""

from collections.abc import Iterable
from typing import Any

import rich.console
import typer
from rich.segment import Segment
from rich.text import Text

from openvision.untrusted import printable


def echo(message: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a line on standard output, or on standard error with `err`."""
    typer.echo(printable(str(message)), err=err, nl=nl)


def counted(count: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Console(rich.console.Console):
    """Rich's console; its own colours and cursor movements pass, those within texts do not."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Markup as text, printable before it is measured."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of a renderable, their texts printable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
