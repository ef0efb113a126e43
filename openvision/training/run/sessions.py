"""How a run came about: RUN/sessions.json, one entry each time it was started.

An entry says when, on which machines, with how many processes and in which mode, from which step to which, with what
code, recipe, data and libraries, how long it took and what it may have cost in energy. What differs from the session
before, and was accepted with --force, stands in it too. The trained model carries all of it.
"""

import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text
from openvision.hardware import DEVICES
from openvision.provenance import describe_run, dirty_diff
from openvision.runtime import Processes

SESSIONS = "sessions.json"
CODE = "code"
# Taken where a device's power is not known: a core of a server processor under load, with its share of the machine.
_WATTS_A_THREAD = 10.0


def read_sessions(run_folder: Path) -> list[dict[str, Any]]:
    """All sessions of a run, oldest first; none before its first start."""
    path = run_folder / SESSIONS
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OpenVisionError(f"{path} cannot be read ({error}); remove it to go on without the history") from error


class Record:
    """The history of a run; only the main process has one."""

    def __init__(self, run_folder: Path, processes: Processes, mode: str) -> None:
        self.run_folder = run_folder
        self.processes = processes
        self.mode = mode
        self.sessions = read_sessions(run_folder)
        self._begun = time.monotonic()

    def begin(self, recipe_toml: str, data: dict[str, Any], seed: int, step: int, accepted: list[str]) -> None:
        """The run has been opened and stands after `step` updates; `accepted` are differences let through."""
        described = describe_run(recipe_toml, data["manifest_sha256"], seed, sys.argv)
        self._keep_diff(described)
        self.sessions.append(
            {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "host": platform.node(),
                "processes": self.processes.size,
                "mode": self.mode,
                "from_step": step,
                "to_step": step,
                "seconds": 0.0,
                "energy": self._energy(0.0),
                "accepted": accepted,
                "data": data,
                **described,
            }
        )
        self._write()

    def reached(self, step: int, ended: str | None = None) -> None:
        """The run stands after `step` updates, all saved; `ended` says why the session is over."""
        session = self.sessions[-1]
        seconds = time.monotonic() - self._begun
        session |= {"to_step": step, "seconds": round(seconds, 1), "energy": self._energy(seconds)}
        if ended is not None:
            session["ended"] = ended
        self._write()

    def summary(self) -> dict[str, Any]:
        """What an artefact should carry of the whole history."""
        return {
            "sessions": [
                {key: each.get(key) for key in ("started", "processes", "mode", "from_step", "to_step", "accepted")}
                for each in self.sessions
            ],
            "wall_clock_seconds": round(sum(each["seconds"] for each in self.sessions), 1),
            "energy_kwh": round(sum(each["energy"]["kwh"] for each in self.sessions), 6),
            "energy_method": self.sessions[-1]["energy"]["method"] if self.sessions else "",
        }

    def _write(self) -> None:
        try:
            atomic_write_text(self.run_folder / SESSIONS, json.dumps(self.sessions, indent=1) + "\n")
        except OpenVisionError:
            # A full disk must not end the training that the record is about; the next save writes it again.
            return

    def _keep_diff(self, described: dict[str, Any]) -> None:
        """Put what differs from the commit beside the record."""
        git = described["git"]
        if not git or not git["dirty_diff_sha256"]:
            return
        path = self.run_folder / CODE / f"{git['dirty_diff_sha256'][:12]}.diff"
        if not path.exists():
            atomic_write_text(path, dirty_diff())

    def _energy(self, seconds: float) -> dict[str, Any]:
        """An estimate from the power limits of the devices; nothing is measured."""
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name().lower()
            known = next((device for key, device in DEVICES.items() if device.gpu and key in name), None)
            watts = known.watts if known else 400.0
            method = (
                f"power limit of {self.processes.size} accelerators, {watts:.0f} W each; host and cooling not counted"
            )
        else:
            watts = _WATTS_A_THREAD * torch.get_num_threads()
            method = (
                f"{_WATTS_A_THREAD:.0f} W for each of {self.processes.size * torch.get_num_threads()} threads, assumed"
            )
        return {"kwh": round(watts * self.processes.size * seconds / 3.6e6, 6), "method": method}
