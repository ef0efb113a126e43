"""When a process hangs or dies: its stack, one clear message, and an end for all.

- A process that makes no progress for a stated time writes the stacks of all its threads to RUN/hangs/, with the step
  and what it was doing. The process that hangs shows the place; the others show that they wait.
- When one process fails the others fail with it at their next exchange. The first to say why claims RUN/FAILED; the
  rest stay silent, so that the log ends with one message.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from openvision.errors import OpenVisionError
from openvision.training.run.signals import Interrupted

FAILED = "FAILED"
HANGS = "hangs"
# How much later a lost process is reported than it was noticed: the one that knows why goes first.
_GRACE = 1.0


class LostProcessError(OpenVisionError):
    """Another process of the run failed, and this one cannot go on without it."""


class AlreadyToldError(Exception):
    """The run failed and another process has said why."""


class Watchdog:
    """Reports the stacks of this process when `beat` is not called for `limit` seconds; None is off."""

    def __init__(self, folder: Path, rank: int, limit: float | None, say: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.rank = rank
        self.limit = limit
        self.say = say
        self.reported = 0
        self._what, self._step = "starting", 0
        self._beaten = time.monotonic()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """Where stacks are written."""
        return self.folder / HANGS / f"process-{self.rank:05d}.txt"

    def beat(self, step: int, what: str) -> None:
        """This process is alive, after `step` updates, and now begins `what`."""
        self._beaten, self._step, self._what = time.monotonic(), step, what

    def __enter__(self) -> "Watchdog":
        if self.limit is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
            self._beaten = time.monotonic()
            self._thread = threading.Thread(target=self._watch, args=(self.limit,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self.reported:
                self.path.unlink(missing_ok=True)

    def _watch(self, limit: float) -> None:
        while True:
            # Armed anew every round: it fires by itself when a library keeps the interpreter's lock from this thread.
            faulthandler.dump_traceback_later(2 * limit, file=self._file)
            if self._stopped.wait(limit / 10):
                return
            silent = time.monotonic() - self._beaten
            if silent > limit:
                self._report(silent)
                self._beaten = time.monotonic()

    def _report(self, silent: float) -> None:
        self.reported += 1
        where = f"process {self.rank} has made no progress for {silent:.0f} s: step {self._step + 1}, {self._what}"
        self._file.write(f"{where}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file)
        self.say(f"{where}; its stacks are in {self.path}")


def clear_failure(run_folder: Path) -> None:
    """Forget how the run ended the last time."""
    (run_folder / FAILED).unlink(missing_ok=True)


@contextmanager
def told_once(run_folder: Path, rank: int, size: int, where: Callable[[], str]) -> Iterator[None]:
    """Let the first failure among the processes pass and silence those that follow from it.

    `where` says how far the run is. Raises AlreadyToldError in the processes that have nothing to add, LostProcessError
    when a process went without a word.
    """
    if size == 1:
        yield
        return
    try:
        yield
    except (Interrupted, AlreadyToldError):
        raise
    except OpenVisionError as error:
        if _claim(run_folder, rank, str(error)):
            raise
        raise AlreadyToldError(str(error)) from None
    except RuntimeError as error:
        if not _is_loss(error):
            _claim(run_folder, rank, repr(error))
            raise
        time.sleep(_GRACE)
        message = (
            f"a process of this run was lost or hung ({where()}, seen by process {rank}); all stop. Look for what "
            "ended it, e.g. its memory; the same command goes on from the newest checkpoint"
        )
        if _claim(run_folder, rank, message):
            raise LostProcessError(message) from error
        raise AlreadyToldError(message) from None
    except Exception as error:
        _claim(run_folder, rank, repr(error))
        raise


def _claim(run_folder: Path, rank: int, message: str) -> bool:
    """Whether this process is the first to say what went wrong."""
    try:
        descriptor = os.open(run_folder / FAILED, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError:
        return False
    record: dict[str, Any] = {"process": rank, "message": message}
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return True


def _is_loss(error: RuntimeError) -> bool:
    """Whether an exchange failed because another process is gone or late, as the backends put it."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("gloo", "connection closed", "connection reset", "timed out", "nccl"))


def leave_at_once(code: int) -> None:
    """End this process without waiting for threads that wait for processes which are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
