"""Read tensors from files without running code: safetensors, torch files as weights only, npz."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openvision.errors import OpenVisionError

TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.bin`, `.pt` or `.pth` file by name, memory-mapped where possible.

    A torch file may hold the tensors under `state_dict`, and each name may begin with `module.`, as training
    checkpoints of open_clip do. Raises OpenVisionError for a missing, truncated or unsafe file.
    """
    if not path.is_file():
        raise OpenVisionError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise OpenVisionError(f"{path} is not a weights file: supported are .safetensors, .bin, .pt, .pth and .npz")


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a flat `.npz`; raises OpenVisionError when it is broken or contains pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise OpenVisionError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OpenVisionError(f"{path} is not a readable npz of plain arrays: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise OpenVisionError(f"{path} is not a readable safetensors file, truncated? {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Only zip archives can be mapped; older files are read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # The unpickler's refusals, zip errors and read errors have no common base.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OpenVisionError(
            f"{path} is not a file of plain tensors: it is truncated, or contains objects that could run code "
            f"({reason})"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise OpenVisionError(f"{path} is not a mapping from names to tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
