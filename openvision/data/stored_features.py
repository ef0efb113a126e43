"""Features of the fixed views of samples, computed once and read by the loader: an array for each shard.

    HASH.NAME.npy    float16 (samples, views, ...), of the shard whose index has this SHA-256

A shard that changes has another hash, so features of other images are never read. Files are written from front to back
under a temporary name and renamed when they are complete; rows are read without the rest of their file.
"""

import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvision.errors import OpenVisionError
from openvision.files import make_folder

DTYPE = np.dtype("<f2")
"""Of the stored numbers: unit vectors and normalised patches lose no more than 1 in 2,000."""
_OPEN_FILES = 256


@dataclass(frozen=True)
class Layout:
    """An array of features: its name in the file names, and the shape of what is stored of one view."""

    name: str
    shape: tuple[int, ...]
    views: int

    def path(self, folder: Path, digest: str) -> Path:
        """File of the shard with this hash."""
        return folder / f"{digest}.{self.name}.npy"

    def bytes_for(self, samples: int) -> int:
        """Bytes of the features of so many samples."""
        return samples * self.views * int(np.prod(self.shape)) * DTYPE.itemsize


class StoredFeatures:
    """Reads one array of features. Picklable and thread-safe."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self._open: OrderedDict[str, NDArray[np.float16]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["StoredFeatures"], tuple[Path, Layout]]:
        return StoredFeatures, (self.folder, self.layout)

    def read(self, digest: str, row: int, view: int) -> NDArray[np.float16]:
        """What is stored of a view of the sample in `row` of a shard; raises OpenVisionError for a damaged file."""
        with self._lock:
            array = self._open.pop(digest, None)
            array = self._map(digest) if array is None else array
            self._open[digest] = array
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return np.array(array[row, view])

    def check(self, digest: str, samples: int) -> None:
        """Raise OpenVisionError when the file of a shard of so many samples is damaged; it is not read."""
        array = self._map(digest)
        if len(array) != samples:
            raise self._damaged(digest, f"{len(array)} rows for {samples} samples")

    def _map(self, digest: str) -> NDArray[np.float16]:
        path = self.layout.path(self.folder, digest)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(digest, str(error).splitlines()[0]) from error
        if array.dtype != DTYPE or array.shape[1:] != (self.layout.views, *self.layout.shape):
            raise self._damaged(digest, f"it holds {array.dtype} {array.shape}")
        return array

    def _damaged(self, digest: str, reason: str) -> OpenVisionError:
        path = self.layout.path(self.folder, digest)
        return OpenVisionError(f"features {path} are damaged ({reason}); delete the file and make it again")


@contextmanager
def writing_features(folder: Path, digest: str, samples: int, layouts: Sequence[Layout]) -> Iterator["Writer"]:
    """Write the files of one shard; they get their names when the block ends without an error."""
    make_folder(folder)
    paths = [layout.path(folder, digest) for layout in layouts]
    temporary = [path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in paths]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb")) for path in temporary]
            for file, layout in zip(files, layouts, strict=True):
                shape = (samples, layout.views, *layout.shape)
                header = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            yield Writer(files, layouts)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for old, new in zip(temporary, paths, strict=True):
            os.replace(old, new)
    except OSError as error:
        raise OpenVisionError(
            f"cannot write features into {folder}: {error.strerror or error}; give a folder with more room"
        ) from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Writer:
    """The open files of one shard."""

    files: Sequence[BufferedWriter]
    layouts: Sequence[Layout]

    def append(self, features: Sequence[NDArray[np.floating]]) -> None:
        """The next views, in the order of samples and then of views: (n, ...) of each array."""
        for file, layout, values in zip(self.files, self.layouts, features, strict=True):
            assert values.shape[1:] == layout.shape, f"{layout.name}: {values.shape}"
            file.write(np.ascontiguousarray(values, dtype=DTYPE).tobytes())
