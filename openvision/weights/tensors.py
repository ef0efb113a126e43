"""Read tensors from files without running code: safetensors, torch files as weights only, npz."""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openvision.errors import OpenVisionError
from openvision.files import check_file

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
TORCH_SUFFIXES = frozenset({".bin", ".pt", ".pth"})


def read_tensors(path: Path, ignored: Callable[[str], object] = lambda name: False) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.bin`, `.pt` or `.pth` file by name, memory-mapped where possible.

    A torch file may hold the tensors under `state_dict`, and each name may begin with `module.`, as training
    checkpoints of open_clip do. Names for which `ignored` is true are left out, whatever they hold. Raises
    OpenVisionError for a missing, truncated or unsafe file.
    """
    check_file(path)
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path)
    else:
        raise OpenVisionError(f"{path} is not a weights file: supported are .safetensors, .bin, .pt, .pth and .npz")
    tensors = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise OpenVisionError(
                f"{path}: {name!r:.100} is {tensor.dtype}, {tensor.layout}; weights are float32, float16, bfloat16 or "
                "float64"
            )
    return tensors


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a flat `.npz`; raises OpenVisionError when it is broken or contains anything but numbers."""
    check_file(path)
    if not zipfile.is_zipfile(path):
        raise OpenVisionError(f"{path} is not a readable npz of plain arrays: it is no zip archive; download it again")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zip, zlib, numpy's header parser and memory have no common base.
        reason = "it holds pickled objects" if "allow_pickle" in str(error) else (str(error) or type(error).__name__)
        raise OpenVisionError(f"{path} is not a readable npz of plain arrays: {reason}") from error
    for name, array in arrays.items():
        # Optimizer state beside the parameters counts in integers.
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise OpenVisionError(f"{path}: {name!r:.100} is {kind}; a JAX tree holds arrays of float32")
    return arrays


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise OpenVisionError(f"{path} is not a readable safetensors file, truncated? {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        # Only zip archives can be mapped; older files are read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # The unpickler's refusals, zip errors and read errors have no common base.
        # torch's own message says how to load the file all the same, which would run its code.
        refused = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        reason = (
            f"it contains {refused[1]}, which could run code" if refused else "it is truncated, or of another format"
        )
        raise OpenVisionError(
            f"{path} is not a file of plain tensors: {reason}; ask its author for .safetensors"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise OpenVisionError(f"{path} is not a mapping from names to tensors")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
