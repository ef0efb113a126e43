"""Training on the screen: a progress bar in a terminal, log lines elsewhere; nobody has to read them."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO, cast

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openvision.terminal import Console, echo


class TrainingDisplay:
    """Shows losses, throughput and the time left."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total_steps = total_steps
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.total_steps, status="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Print one line above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, description: str) -> None:
        """Move the bar to `step` finished steps."""
        if self._task is not None:
            self._bar.update(self._task, completed=step, description=description)

    def log(self, step: int, values: dict[str, float], seconds_left: float) -> None:
        """Show the metrics of a step: losses and throughput beside a bar, all of them in a log line."""
        terms = [f"{name} {values[name]:.3f}" for name in _LOSSES if name in values]
        terms.append(f"{values['images_per_second']:.0f} images/s")
        if self._task is not None:
            self._bar.update(self._task, status="  ".join(terms))
        if not self.console.is_terminal:
            told = "  ".join([*terms[:-1], *_further(values), *_state(values), terms[-1], *_machine(values)])
            self.say(f"step {step}/{self.total_steps}  {told}  {duration(seconds_left)} left")


class _Lasting:
    """A stream whose errors of writing are told once, on standard error, and stop nothing."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._told = False

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            # Nobody reads any more. What is still in the buffer would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not self._told:
            self._told = True
            lost = f"openvision: {self._name} cannot be written ({error.strerror}); training continues without it"
            echo(lost, err=True)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Training goes on when its output is closed, as by `| head`, or is a file on a full disk."""
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    sys.stdout, sys.stderr = (cast(TextIO, _Lasting(each, name)) for each, name in zip(before, names, strict=True))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


# Losses worth a place in a line; the metrics file has all.
_LOSSES = ("loss", "contrastive", "caption", "pixels", "latents", "perceptual", "dense")
# A teacher's terms begin with its name.
_OF_TEACHERS = ("_pooled", "_patches", "_similarity")


def _further(values: dict[str, float]) -> list[str]:
    """Losses that only a log line has room for: what teachers add to the total."""
    return [f"{name} {value:.3f}" for name, value in values.items() if name.endswith(_OF_TEACHERS)]


def _state(values: dict[str, float]) -> list[str]:
    scale = [f"logit scale {values['logit_scale']:.2f}"] if "logit_scale" in values else []
    return [*scale, f"lr {values['lr']:.2e}", f"gradient {values['gradient_norm']:.2f}"]


def _machine(values: dict[str, float]) -> list[str]:
    """MFU, or TFLOP/s where the peak of the device is unknown; time spent waiting for data; peak memory."""
    speed = f"MFU {values['mfu']:.1%}" if "mfu" in values else f"{values['tflops_per_second']:.3g} TFLOP/s"
    return [speed, f"data {values['data_wait']:.0%}", f"{values['memory_gib']:.1f} GiB"]


def duration(seconds: float) -> str:
    """Format seconds: 3:07, 2:15:00, 4 d 03:20:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
