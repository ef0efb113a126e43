"""Shards as strangers may make them: good samples, and whatever a test adds."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

Member = tuple[str, bytes]


def encoded(kind: str = "PNG", side: int = 24) -> bytes:
    """A small image with some structure."""
    image = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def sample(
    key: str, meta: bytes = b'{"synthetic": "A ramp. It is grey."}', text: bytes = b"ramp", image: bytes | None = None
) -> list[Member]:
    """Members of one sample."""
    return [(f"{key}.png", encoded() if image is None else image), (f"{key}.txt", text), (f"{key}.json", meta)]


def good(count: int = 10) -> list[Member]:
    """Members of samples without fault."""
    return [member for number in range(count) for member in sample(f"g{number:03d}")]


def write_tar(folder: Path, members: Sequence[Member], name: str = "000000.tar") -> Path:
    """A tar as another program writes it: names are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / name
