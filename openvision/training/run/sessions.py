"""Session history of a run: RUN/sessions.json has one entry for each time that the run was started.

An entry holds the time, host, device, number of processes, mode, first and last step, code, recipe, data, libraries,
duration, an estimate of the energy, and the differences that --force accepted. The provenance of the model has a
summary.
"""

import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text, read_text
from openvision.hardware import DEVICES
from openvision.provenance import describe_run, dirty_diff
from openvision.runtime import Processes

SESSIONS = "sessions.json"
CODE = "code"
# What the provenance of a model keeps of a session.
_SUMMARY = ("started", "device", "processes", "mode", "from_step", "to_step", "accepted")
# Assumed power of a CPU thread: a core of a server processor under load, with its share of the machine.
_WATTS_PER_THREAD = 10.0
# Assumed power of an accelerator that openvision.hardware does not list.
_WATTS_PER_ACCELERATOR = 400.0


def read_sessions(run_folder: Path) -> list[JsonObject]:
    """Sessions of a run, oldest first; empty before its first start. Raises OpenVisionError when unreadable."""
    path = run_folder / SESSIONS
    if not (path.is_symlink() or path.exists()):
        return []
    try:
        sessions: object = json.loads(read_text(path))
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            raise ValueError("it is no list of sessions")
    except (OpenVisionError, ValueError, RecursionError) as error:
        raise OpenVisionError(f"{path} cannot be read ({error}); remove it to resume without the history") from error
    return sessions


class SessionHistory:
    """Appends the current session to the history of a run; only the main process has one."""

    def __init__(self, run_folder: Path, processes: Processes, mode: str) -> None:
        self.run_folder = run_folder
        self.processes = processes
        self.mode = mode
        self.sessions = read_sessions(run_folder)
        self._begun = time.monotonic()

    def begin(
        self,
        recipe_toml: str,
        data: JsonObject,
        seed: int,
        step: int,
        accepted: list[str],
        moved: str | None = None,
        started: list[str] | None = None,
    ) -> None:
        """Start a session after `step` updates.

        `accepted` are the differences that --force accepted; `moved` says that another kind of device wrote the
        checkpoint; `started` says what came from the recipe's `start`.
        """
        described = describe_run(recipe_toml, data["manifest_sha256"], seed, sys.argv)
        self._keep_diff(described)
        self.sessions.append(
            {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "device": self.processes.device.type,
                "moved": moved,
                "processes": self.processes.size,
                "mode": self.mode,
                "from_step": step,
                "to_step": step,
                "seconds": 0.0,
                "energy": self._energy(0.0),
                "accepted": accepted,
                "start": started or [],
                "data": data,
                **described,
            }
        )
        self._write()

    def reached(self, step: int, ended: str | None = None) -> None:
        """Record a checkpoint after `step` updates; `ended` is the reason when the session is over."""
        session = self.sessions[-1]
        seconds = time.monotonic() - self._begun
        session |= {"to_step": step, "seconds": round(seconds, 1), "energy": self._energy(seconds)}
        if ended is not None:
            session["ended"] = ended
        self._write()

    def summary(self) -> JsonObject:
        """Summary of all sessions for the provenance of a model."""
        return {
            "sessions": [{key: each.get(key) for key in _SUMMARY} for each in self.sessions],
            "wall_clock_seconds": round(sum(each["seconds"] for each in self.sessions), 1),
            "energy_kwh": round(sum(each["energy"]["kwh"] for each in self.sessions), 6),
            "energy_method": self.sessions[-1]["energy"]["method"] if self.sessions else "",
        }

    def _write(self) -> None:
        try:
            atomic_write_text(self.run_folder / SESSIONS, json.dumps(self.sessions, indent=1) + "\n")
        except OpenVisionError:
            # A full disk must not stop training; the next save writes the history again.
            return

    def _keep_diff(self, described: JsonObject) -> None:
        """Save the uncommitted changes of the code to RUN/code/."""
        git = described["git"]
        if not git or not git["dirty_diff_sha256"]:
            return
        path = self.run_folder / CODE / f"{git['dirty_diff_sha256'][:12]}.diff"
        if not path.exists():
            atomic_write_text(path, dirty_diff())

    def _energy(self, seconds: float) -> JsonObject:
        """Estimate of the energy from power limits; nothing is measured."""
        size, threads = self.processes.size, torch.get_num_threads()
        device = self.processes.device
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device).lower()
            known = next((one for key, one in DEVICES.items() if one.gpu and key in name), None)
            watts = known.watts if known else _WATTS_PER_ACCELERATOR
            method = f"power limit of {size} accelerators, {watts:.0f} W each; host and cooling not counted"
        else:
            watts = _WATTS_PER_THREAD * threads
            method = f"{_WATTS_PER_THREAD:.0f} W for each of {size * threads} threads, assumed"
        return {"kwh": round(watts * size * seconds / 3.6e6, 6), "method": method}
