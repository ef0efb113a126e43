"""What a number was computed from, so that anybody can compute it again."""

import hashlib
from pathlib import Path
from typing import Any

from openvision.errors import OpenVisionError
from openvision.provenance import git_state, library_versions


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
        "git": git_state(),
        "command": command,
        "libraries": library_versions(),
    }
