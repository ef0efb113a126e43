"""Hung and lost processes: stack traces, and one error message for all processes of a run.

- A process without progress for `run.hang_seconds` writes the stack traces of its threads to RUN/hangs/, with the step
  and the activity: the hung process shows where it hangs, the others that they wait for it.
- When one process fails, the others fail at their next collective. The first to report claims RUN/FAILED; the others
  stay silent, so that the log ends with one message.
"""

import contextlib
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
from typing import TextIO

from openvision.errors import OpenVisionError
from openvision.files import locked_folder
from openvision.training.run.signals import Interrupted, is_of_this_session

FAILED = "FAILED"
HANGS = "hangs"
# Seconds between noticing a lost process and reporting it: a process that knows the cause reports first.
_GRACE = 1.0


class LostProcessError(OpenVisionError):
    """Another process of the run was lost, and this one cannot continue without it."""


class AlreadyReportedError(Exception):
    """The run failed, and another process has reported why."""


class Watchdog:
    """Writes the stack traces of this process when `beat` is not called for `limit` seconds; None is off."""

    def __init__(self, folder: Path, rank: int, limit: float | None, say: Callable[[str], None]) -> None:
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
        """File of the stack traces of this process."""
        return self.folder / HANGS / f"process-{self.rank:05d}.txt"

    def beat(self, step: int, what: str) -> None:
        """Report progress: `step` updates are done, and `what` begins now."""
        self._beaten, self._step, self._what = time.monotonic(), step, what

    def __enter__(self) -> "Watchdog":
        if self.limit is not None:
            self._file = self._open()
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
            with contextlib.suppress(OSError):
                self._file.close()
            if not self.reported:
                self.path.unlink(missing_ok=True)

    def _open(self) -> TextIO:
        """The file of the stack traces; standard error where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path, "a", encoding="utf-8")
        except OSError as error:
            self.say(f"cannot write {self.path} ({error.strerror}): stack traces go to standard error")
            return os.fdopen(os.dup(2), "a", encoding="utf-8")

    def _watch(self, limit: float) -> None:
        while True:
            # Set again in every round; it fires on its own when a library holds the GIL and blocks this thread.
            faulthandler.dump_traceback_later(2 * limit, file=self._file)
            if self._stopped.wait(limit / 10):
                return
            silent = time.monotonic() - self._beaten
            if silent > limit:
                self._report(silent)
                self._beaten = time.monotonic()

    def _report(self, silent: float) -> None:
        where = f"process {self.rank} has made no progress for {silent:.0f} s: step {self._step + 1}, {self._what}"
        with contextlib.suppress(OSError):
            # On a full disk the line below still says it.
            self._file.write(f"{where}\n")
            self._file.flush()
        faulthandler.dump_traceback(self._file)
        self.reported += 1
        self.say(f"{where}; its stack traces are in {self.path}")


def clear_failure(run_folder: Path) -> None:
    """Remove RUN/FAILED of the session before."""
    (run_folder / FAILED).unlink(missing_ok=True)


@contextmanager
def report_once(run_folder: Path, rank: int, size: int, where: Callable[[], str]) -> Iterator[None]:
    """Re-raise the first failure among the processes of a run, and silence the failures that follow from it.

    `where` names the current step. Raises LostProcessError when another process was lost without an error of its own,
    and AlreadyReportedError in the processes that have nothing to add.
    """
    if size == 1:
        yield
        return
    try:
        yield
    except (Interrupted, AlreadyReportedError):
        raise
    except OpenVisionError as error:
        if claim_failure(run_folder, rank, str(error)):
            raise
        raise AlreadyReportedError(str(error)) from None
    except RuntimeError as error:
        if not _is_loss(error):
            claim_failure(run_folder, rank, repr(error))
            raise
        time.sleep(_GRACE)
        message = describe_loss(where(), rank)
        if claim_failure(run_folder, rank, message):
            raise LostProcessError(message) from error
        raise AlreadyReportedError(message) from None
    except Exception as error:
        claim_failure(run_folder, rank, repr(error))
        raise


def describe_loss(where: str, rank: int) -> str:
    """The message about a process that is gone, as process `rank` reports it."""
    return (
        f"a process of this run was lost or hung ({where}, seen by process {rank}); all processes stop. Find the "
        "cause, e.g. out of memory, then run the same command: it resumes from the newest checkpoint"
    )


def claim_failure(run_folder: Path, rank: int, message: str) -> bool:
    """Whether this process is the first of the session to report a failure; also where that cannot be known.

    A message that appears twice is better than none.
    """
    path = run_folder / FAILED
    # Nobody removes as stale what another process has just claimed.
    with locked_folder(run_folder):
        if path.exists() and not is_of_this_session(path):
            with contextlib.suppress(OSError):
                path.unlink()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError:
            return True
    with contextlib.suppress(OSError), os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps({"process": rank, "message": message}) + "\n")
    return True


def _is_loss(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or late, by the errors of the backends."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("gloo", "connection closed", "connection reset", "timed out", "nccl"))


def exit_immediately(code: int) -> None:
    """Exit without joining threads, which may wait for lost processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
