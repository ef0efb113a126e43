"""Runs side by side: groups of processes that train at the same time on one machine, until a deadline."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ablations.runs import Task
from openvision.files import JsonObject

_POLL = 0.2
SCRIPT = Path(__file__).parents[1] / "claims.py"


@dataclass(frozen=True)
class Machine:
    """What the runs share."""

    device: str
    at_once: int
    """Runs that train at the same time."""
    workers: int
    """Decoding processes of each."""
    evaluation_threads: int
    work: Path
    """Folder of data and runs."""


def grouped(tasks: Sequence[Task], machine: Machine) -> Iterator[list[Task]]:
    """Tasks in groups of `at_once`, each told of the others in its group."""
    for start in range(0, len(tasks), machine.at_once):
        group = tasks[start : start + machine.at_once]
        names = tuple(task.name for task in group)
        folder = machine.work / "groups" / f"{int(time.time())}-{start}"
        yield [replace(task, group=str(folder), members=names) for task in group]


def run_group(
    tasks: Sequence[Task], deadline: float | None, done: Callable[[JsonObject], None], say: Callable[[str], None]
) -> bool:
    """Make the runs of a group at the same time and hand over each row as soon as it is there.

    Returns whether all came to their end. What is left at `deadline` (of `time.monotonic()`) is stopped; the row of a
    run that is trained is handed over as far as it is measured.
    """
    running = {task.name: (task, _start(task)) for task in tasks}
    complete = True
    try:
        while running:
            time.sleep(_POLL)
            for name, (task, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode == 0:
                    done(_row(task))
                else:
                    complete = False
                    task.meeting.leave()
                    say(f"{name} failed (exit code {process.returncode}):\n{_tail(_log_of(task))}")
            if deadline is not None and time.monotonic() > deadline and running:
                say(f"the time is up: {', '.join(running)} not finished")
                for task, process in running.values():
                    _stop(process)
                    if task.row.is_file():
                        done(_row(task))
                return False
    finally:
        for _, process in running.values():
            _stop(process)
    return complete


def _row(task: Task) -> JsonObject:
    return json.loads(task.row.read_text(encoding="utf-8"))


def _log_of(task: Task) -> Path:
    return Path(task.group) / f"{task.name}.log"


def _start(task: Task) -> subprocess.Popen[bytes]:
    file = Path(task.group) / f"{task.name}.json"
    task.write(file)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(_log_of(task), "wb") as log:
        # A session of its own: its loader's workers are stopped with it.
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "run", str(file)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(path: Path, lines: int = 12) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
