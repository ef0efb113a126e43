"""`openvision doctor`: what this machine and installation can do, and what will be slow and why.

Every finding is a line with a state: "ok", "note" (it works, with a cost or without a feature) or "problem" (something
will fail). Nothing is changed, no server is asked, and no package that is heavy is imported but torch.
"""

import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from openvision.errors import OpenVisionError
from openvision.hardware import GIB
from openvision.images.decode import BadSampleError, decode_image
from openvision.provenance import processor_name
from openvision.runtime import describe_device, device_memory, resolve_device, resolve_precision

State = Literal["ok", "note", "problem"]
# A checkpoint of the largest recipe with its optimizer state takes some 25 GiB, and two are kept.
_LOW_DISK, _LOW_SHARED, _LOW_FILES = 10 * GIB, GIB // 2, 4096
# What a package is for, where its absence is not plain from the name of the extra.
_EXTRAS = {
    "demo": "openvision demo",
    "hub": "released weights",
    "onnx": "export to ONNX",
    "parquet": "Parquet files",
    "report": "reports and figures",
    "search": "search among millions",
    "vlm": "LLaVA-style models",
}
_PHOTO = (1200, 1600)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    state: State
    text: str


def examine(folder: Path, device: str = "auto") -> Iterator[Finding]:
    """Examine this machine; disk space is that of `folder`, where runs and data will be written."""
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.platform}, {platform.machine()}")
    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield from _device(device)
    for check in (_torchvision, _decoders, _extras, lambda: _disk(folder), _shared_memory, _open_files):
        yield from check()


def _device(name: str) -> Iterator[Finding]:
    try:
        device = resolve_device(name)
    except OpenVisionError as error:
        yield Finding("device", "problem", str(error))
        return
    found = describe_device(device, resolve_precision("auto", device))
    yield Finding("device", "ok", f"{found}, {device_memory(device) / GIB:.0f} GiB")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", "ok", f"{cores} of {processor_name()}")
    if device.type == "cpu":
        yield Finding(
            "speed",
            "note",
            "no GPU: enough to embed and for the quickstart; `openvision plan` says how long a recipe takes",
        )
    elif cores < 8:
        yield Finding("speed", "note", f"{cores} cores may decode images more slowly than the GPU reads them")
    threads = os.environ.get("OMP_NUM_THREADS")
    if device.type == "cpu" and threads == "1" and cores > 1:
        yield Finding("threads", "note", f"OMP_NUM_THREADS is 1 and leaves {cores - 1} of {cores} cores idle; unset it")


def _torchvision() -> Iterator[Finding]:
    """timm, open_clip and transformers import torchvision, which fits one torch only."""
    if importlib.util.find_spec("torchvision") is None:
        return
    ours, theirs = (re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name)) for name in ("torch", "torchvision"))
    if ours and theirs and ours[1] == "2" and theirs[1] == "0" and int(ours[2]) + 15 != int(theirs[2]):
        yield Finding(
            "torchvision", "problem", f"{theirs[0]} does not fit torch {ours[0]}: install 0.{int(ours[2]) + 15}"
        )


def _decoders() -> Iterator[Finding]:
    pixels = np.random.default_rng(0).integers(0, 255, (*(side // 8 for side in _PHOTO), 3), dtype=np.uint8)
    image, missing = Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)), []
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF"):
        try:
            buffer = io.BytesIO()
            image.resize((64, 48)).save(buffer, kind)
            decode_image(buffer.getvalue())
        # Pillow raises KeyError for a format that it was built without.
        except (KeyError, OSError, BadSampleError):
            missing.append(kind)
    if importlib.util.find_spec("pillow_heif") is None:
        missing.append("HEIC (pip install 'openvision-encoders[heif]')")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    start = time.perf_counter()
    for _ in range(5):
        decode_image(buffer.getvalue())
    speed = f"a JPEG of {_PHOTO[1]} x {_PHOTO[0]} px takes {200 * (time.perf_counter() - start):.0f} ms on one core"
    yield Finding(
        "images", "note" if missing else "ok", speed + (f"; cannot read {', '.join(missing)}" if missing else "")
    )


def _extras() -> Iterator[Finding]:
    """Which extras of the package are installed, by its metadata."""
    try:
        wanted = importlib.metadata.metadata("openvision-encoders")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("extras", "note", "the package is not installed, so its extras are not known; run it from a venv")
        return
    needs = wanted.get_all("Requires-Dist") or []
    there, absent = [], []
    for extra in sorted(set(wanted.get_all("Provides-Extra") or []) - {"dev"}):
        names = [_package(line) for line in needs if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", line)]
        installed = all(_is_installed(name) for name in names if name != "openvision-encoders")
        (there if installed else absent).append(f"{extra} ({_EXTRAS[extra]})" if extra in _EXTRAS else extra)
    yield Finding("extras", "ok", f"installed: {', '.join(there) or 'none'}")
    if absent:
        yield Finding("extras", "note", f"not installed: {', '.join(absent)}; pip install 'openvision-encoders[NAME]'")


def _package(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    return match[0] if match else requirement


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK):
        yield Finding("disk", "problem", f"{there} is not writable; choose another folder for runs")
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.0f} GiB free at {there}"
    yield Finding(
        "disk", "ok" if free >= _LOW_DISK else "note", text + ("" if free >= _LOW_DISK else ", which is little")
    )


def _shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:  # noqa: S108
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    low = free < _LOW_SHARED
    remedy = "; loader workers may die: start the container with --shm-size 8g, or set data.workers=0" if low else ""
    yield Finding("shared memory", "problem" if low else "ok", f"{free / GIB:.1f} GiB free{remedy}")


def _open_files() -> Iterator[Finding]:
    if importlib.util.find_spec("resource") is None:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < _LOW_FILES
    remedy = f"; many shards and workers need more: ulimit -n {_LOW_FILES}" if low else ""
    yield Finding("open files", "note" if low else "ok", f"at most {soft} (hard limit {hard}){remedy}")
