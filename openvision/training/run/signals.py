"""Signal handling: finish the step, checkpoint, exit.

SIGTERM and SIGUSR1 come from a scheduler: exit code 75, and a file REQUEUE in the run folder that tells a job script to
queue the run again (torchrun turns every exit code into 1). SIGINT (Ctrl-C) comes from a person: exit code 130; a
second one does not wait for the end of the step.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from openvision.errors import OpenVisionError
from openvision.files import make_folder

REQUEUE = "REQUEUE"
EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: try again later."""
EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):  # noqa: N818
    """The run stopped on request, after saving a checkpoint."""

    def __init__(self, message: str, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether this process should stop. Signals are handled while the context is active."""

    def __init__(self) -> None:
        self.wanted = False
        self.requeue = False
        """Whether to queue the run again: the scheduler asked for the stop."""
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        return EXIT_REQUEUE if self.requeue else EXIT_INTERRUPTED

    def ask(self, requeue: bool = False) -> None:
        """Stop after the current step."""
        self.wanted = True
        self.requeue = self.requeue or requeue

    def __enter__(self) -> "StopRequest":
        # Only the main thread can set signal handlers; a run in another thread is stopped with `ask`.
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


def mark_requeue(run_folder: Path, where: str) -> None:
    """Write RUN/REQUEUE for the job script, empty on a full disk; `where` the run stopped, e.g. "after step 3".

    Raises OpenVisionError when it cannot be created.
    """
    path = make_folder(run_folder) / REQUEUE
    try:
        path.touch()
    except OSError as error:
        raise OpenVisionError(
            f"cannot write {path} ({error.strerror}): the job script will not queue the run again"
        ) from error
    # An empty file needs no room, and says the same to the script.
    with contextlib.suppress(OSError):
        path.write_text(f"stopped by the scheduler {where}; start the same command again\n")


def clear_requeue(run_folder: Path) -> None:
    """Remove RUN/REQUEUE of the session before: the run has been started again.

    What another process of this session has written stays.
    """
    path = run_folder / REQUEUE
    if not is_of_this_session(path):
        # A folder that cannot be written ends the start a moment later, in one sentence.
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


class _Session:
    """From when on a file in the run folder is of this session."""

    begun = time.time()
    trained = False

    @classmethod
    def restart(cls) -> None:
        cls.begun = time.time()


# A process that was forked begins then, and not when the one before it imported this.
os.register_at_fork(after_in_child=_Session.restart)


def begin_session() -> None:
    """Begin the session of this process, or its next one: what an earlier one left is no longer of this session."""
    if _Session.trained:
        _Session.restart()
    _Session.trained = True


def is_of_this_session(path: Path) -> bool:
    """Whether a file exists that is not older than this process, or the session it has begun."""
    try:
        return path.stat().st_mtime >= _Session.begun
    except OSError:
        return False
