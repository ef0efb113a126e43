"""Signals of a scheduler from the first moment of a training process, and SIGTERM from torchrun after a loss.

Outside a training loop there is nothing to save, and the main thread may wait inside a library for minutes: a thread
ends the process at once, with exit code 75 and RUN/REQUEUE. Inside of it `StopRequest` handles signals.

torchrun sends the same SIGTERM when it lost one of its processes. Then the survivors say so, once, and exit with 1:
before the first step at once, afterwards when the run has not ended by itself before torchrun kills it.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from openvision.errors import OpenVisionError
from openvision.training.run.signals import EXIT_REQUEUE, REQUEUE, is_of_this_session, mark_requeue
from openvision.training.run.watchdog import claim_failure, describe_loss, exit_immediately
from openvision.untrusted import printable

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# torchrun kills a process 30 seconds after its SIGTERM.
_PATIENCE = 15.0
_PROC = Path("/proc")


class SignalWatch:
    """Catches the signals of a scheduler while the context is active; made before anything slow is imported.

    A SIGTERM of torchrun about a lost process is answered after `patience` seconds, unless the run has ended by then.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self.patience = patience
        self.rank = int(os.environ.get("RANK", "0"))
        self._run: Path | None = None
        self._run_is_known = threading.Event()
        self._training = self._ending = False
        self._where = "before the first step"
        self._before: dict[int, object] = {}

    def know_run(self, run_folder: Path) -> None:
        """The run folder, where REQUEUE is written."""
        self._run = run_folder
        self._run_is_known.set()

    def begin_training(self) -> None:
        """From now on a signal is for `StopRequest`, whose handlers are in place."""
        self._training = True

    def begin_work(self, where: str) -> None:
        """From now on a signal ends the process at once; `where` says so, e.g. "after the training"."""
        self._where = where
        self._training = self._ending = False

    def end_training(self) -> None:
        """From now on processes of this run may end before this one."""
        self._ending = True

    def __enter__(self) -> "SignalWatch":
        global _active
        # Python runs a handler only when the main thread leaves a library; the pipe is written at once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _do_nothing) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        _active = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active = None
        self._ending = True
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._wakeup_before)
        self._run_is_known.set()
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] not in _SIGNALS:
                continue
            self._run_is_known.wait()
            if self._run is None:
                return
            if self._ending:
                continue
            if not self._training:
                self._leave(self._run)
            elif _lost_a_sibling():
                # The main thread learns of the loss in a collective operation; this is for one that does not.
                timer = threading.Timer(self.patience, self._report_loss, [self._run])
                timer.daemon = True
                timer.start()

    def _leave(self, run_folder: Path) -> None:
        """End a process that has nothing to save."""
        if _lost_a_sibling() and not is_of_this_session(run_folder / REQUEUE):
            self._report_loss(run_folder)
            return
        try:
            mark_requeue(run_folder, self._where)
        except OpenVisionError as error:
            _print(str(error))
        if self.rank == 0:
            _print(f"stopped {self._where}; start the same command again")
        exit_immediately(EXIT_REQUEUE)

    def _report_loss(self, run_folder: Path) -> None:
        if self._ending:
            return
        where = "before it stopped" if self._training else self._where
        message = describe_loss(where, self.rank)
        if claim_failure(run_folder, self.rank, message):
            _print(message)
        exit_immediately(1)


_active: SignalWatch | None = None


def active_watch() -> SignalWatch | None:
    """The watch of this process, which the command line made; None in other programs."""
    return _active


def _lost_a_sibling() -> bool:
    """Whether torchrun started more processes on this machine than are left; False without torchrun or /proc."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not _PROC.is_dir():
        return False
    return len(_living_ranks(os.getppid())) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _living_ranks(parent: int) -> set[bytes]:
    """LOCAL_RANK of the children of a process that have not ended."""
    found: set[bytes] = set()
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        try:
            # After the name, which may hold anything: state, parent.
            state, ppid = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(ppid) != parent or state in "ZX":
                continue
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {each for each in variables if each.startswith(b"LOCAL_RANK=")}
    return found


def _print(message: str) -> None:
    # Straight to the descriptor: what prints elsewhere may be half imported at this moment.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"openvision: {printable(message)}\n".encode())


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal does not end the process."""
