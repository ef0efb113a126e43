"""What a number was computed from, so that anybody can compute it again."""

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError

_LIBRARIES = ("openvision-encoders", "torch", "numpy", "pillow", "tokenizers")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; raises OpenVisionError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; train a model first") from error


def describe_artefact(model_folder: Path, manifests: dict[str, str], command: list[str]) -> dict[str, Any]:
    """Hashes of checkpoint, recipe and data (`manifests`: split -> hash), commit, command line, library versions."""
    recipe = model_folder / "recipe.toml"
    return {
        "checkpoint_sha256": file_sha256(model_folder / "model.safetensors"),
        "recipe_sha256": file_sha256(recipe) if recipe.is_file() else None,
        "data_manifest_sha256": manifests,
        "git_commit": _commit(),
        "command": command,
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def _commit() -> str | None:
    """Commit of this code, with "+" when files differ from it; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit.strip() + ("+" if (_git("status", "--porcelain", "--untracked-files=no") or "").strip() else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
