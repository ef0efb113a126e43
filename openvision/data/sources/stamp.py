"""Stamps: a JSON file in a generated data set that records how it was made, so that it is made once."""

import json
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.files import JsonObject


def has_stamp(folder: Path, file: str, stamp: JsonObject) -> bool:
    """Whether `folder` holds the data set of `stamp`; one of another stamp may be replaced.

    Raises OpenVisionError when `folder` holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise OpenVisionError(f"{folder} is a file; choose a folder for these shards")
    path = folder / file
    if path.is_file():
        try:
            return json.loads(path.read_text()) == stamp
        except ValueError as error:
            raise OpenVisionError(f"{path} is damaged ({error}); remove {folder} or choose another folder") from error
    if folder.exists() and any(folder.iterdir()):
        raise OpenVisionError(f"{folder} holds other files; choose another folder for these shards")
    return False


def write_stamp(folder: Path, file: str, stamp: JsonObject) -> None:
    """Write the stamp of a finished data set."""
    (folder / file).write_text(json.dumps(stamp) + "\n")
