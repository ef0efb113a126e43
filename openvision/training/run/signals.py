"""Being asked to stop: SIGTERM and SIGUSR1 (the scheduler wants the machine), SIGINT (a person pressed Ctrl-C).

The step that is under way is finished, the state is saved and the process leaves: with exit code 75 and a file REQUEUE
in the run folder when the scheduler asked, so that a job script knows to queue the run again (torchrun turns every
exit code into 1); with 130 when a person did. A second Ctrl-C does not wait for the step.
"""

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType

REQUEUE = "REQUEUE"
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has saved its state."""

    def __init__(self, message: str, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether this process was asked to stop; signals are taken while the context lasts."""

    def __init__(self) -> None:
        self.wanted = False
        self.requeue = False
        """Whether the run wants to be queued again: a scheduler asked, not a person."""
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """What the process leaves with."""
        return EXIT_REQUEUE if self.requeue else EXIT_INTERRUPTED

    def ask(self, requeue: bool = False) -> None:
        """Stop after the step that is under way."""
        self.wanted = True
        self.requeue = self.requeue or requeue

    def __enter__(self) -> "StopRequest":
        # Python lets only the main thread take signals; a run in another thread is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.wanted:
            raise KeyboardInterrupt
        self.ask(requeue=number != signal.SIGINT)


def mark_requeue(run_folder: Path, step: int) -> None:
    """Leave the file that a job script looks for."""
    (run_folder / REQUEUE).write_text(f"stopped by the scheduler after step {step}; start the same command again\n")


def clear_requeue(run_folder: Path) -> None:
    """The run has started: whoever looks now must not queue it once more."""
    (run_folder / REQUEUE).unlink(missing_ok=True)
