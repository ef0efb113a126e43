"""Progress of a long job on standard error: a line rewritten in a terminal, a new line every 10 s elsewhere."""

import sys
import time

import typer

from openvision.terminal import counted


class ProgressLine:
    """Prints the count, the rate and the time left."""

    def __init__(self, unit: str) -> None:
        """`unit` is what is counted, e.g. "image"."""
        self.unit = unit
        self.start = self.said = time.monotonic()
        self.first: tuple[int, float] | None = None

    def __call__(self, done: int, share: float | None = None) -> None:
        """Report `done` units; `share` of the work, 0 to 1, if the total is known.

        The rate excludes the units of the first call, which may come from an interrupted job.
        """
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self.first is None:
            self.first, self.start = (done, share or 0.0), now
        last = share is not None and share >= 1
        if not last and now - self.said < (0.2 if terminal else 10):
            return
        self.said = now
        line = self._line(done, share, max(now - self.start, 1e-6))
        typer.echo(f"\r{line}  " if terminal else line, err=True, nl=not terminal or last)

    def _line(self, done: int, share: float | None, seconds: float) -> str:
        assert self.first is not None
        line = f"{counted(done, self.unit)}  {(done - self.first[0]) / seconds:.0f} {self.unit}s/s"
        if share is None:
            return line
        gained = share - self.first[1]
        if gained <= 0:
            return f"{line}  {share:.0%}"
        minutes, rest = divmod(round(seconds * (1 - share) / gained), 60)
        return f"{line}  {share:.0%}  {minutes}:{rest:02d} left"
