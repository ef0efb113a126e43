"""A store that reads large pieces and keeps the latest ones: few requests for samples that lie side by side."""

import threading
from collections import OrderedDict
from typing import IO, Any

from openvision.data.shards.store import Store

PIECE = 8 * 2**20
_PIECES = 32


class ReadAhead:
    """Wraps a store; ranges are cut out of pieces of 8 MiB, of which the 32 used last are kept."""

    def __init__(self, store: Store, piece: int = PIECE, pieces: int = _PIECES) -> None:
        self.store = store
        self.piece = piece
        self.pieces = pieces
        self._start()

    def _start(self) -> None:
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "piece": self.piece, "pieces": self.pieces}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return self.store.name

    def join(self, file: str) -> str:
        """Path or URL of a file in it."""
        return self.store.join(file)

    def sizes(self, suffix: str) -> dict[str, int]:
        """As of the store."""
        return self.store.sizes(suffix)

    def exists(self, file: str) -> bool:
        """As of the store."""
        return self.store.exists(file)

    def size(self, file: str) -> int:
        """As of the store."""
        return self.store.size(file)

    def open(self, file: str) -> IO[bytes]:
        """As of the store."""
        return self.store.open(file)

    def write(self, file: str, data: bytes) -> None:
        """As of the store."""
        self.store.write(file, data)

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes of a file; a whole file is read past the pieces."""
        if size is None:
            return self.store.read(file, start)
        first, last = start // self.piece, (start + size - 1) // self.piece
        joined = b"".join(self._piece(file, number) for number in range(first, last + 1))
        begin = start - first * self.piece
        return joined[begin : begin + size]

    def _piece(self, file: str, number: int) -> bytes:
        # Fetched under the lock: threads that want the same piece wait for one request instead of making several.
        with self._lock:
            data = self._kept.pop((file, number), None)
            if data is None:
                data = self.store.read(file, number * self.piece, self.piece)
            self._kept[file, number] = data
            if len(self._kept) > self.pieces:
                self._kept.popitem(last=False)
            return data
