"""What a run reads: one folder of shards, or several by weight."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from openvision.data.order import BlockShuffle, GlobalShuffle, Interleaved, Order
from openvision.data.shards.dataset import ShardDataset, all_texts
from openvision.errors import OpenVisionError

OrderName = Literal["global", "blocks"]


@dataclass(frozen=True)
class Ordering:
    """How positions become samples."""

    name: OrderName = "global"
    block: int = 64
    """Samples side by side in a shard that are read together (order "blocks")."""
    window: int = 4096
    """Samples among which blocks are shuffled once more (order "blocks")."""

    def of(self, length: int, seed: int) -> Order:
        """The order of `length` samples."""
        if self.name == "global":
            return GlobalShuffle(length, seed)
        return BlockShuffle(length, seed, self.block, self.window)


GLOBAL = Ordering()


@dataclass
class Mixture:
    """Sources with weights; a single folder is a mixture of one."""

    sources: Sequence[ShardDataset]
    weights: Sequence[float] = ()
    names: Sequence[str] = field(default=())
    """What keys of several sources begin with; the folders by default."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise OpenVisionError("there is no source to read; name at least one folder of shards")
        self.weights = tuple(self.weights) or (1.0,) * len(self.sources)
        self.names = tuple(self.names) or tuple(source.folder for source in self.sources)
        if len(self.weights) != len(self.sources):
            raise OpenVisionError(f"{len(self.sources)} sources have {len(self.weights)} weights; give one each")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise OpenVisionError(f"source {repeated[0]!r} is named twice; give it once with the sum of its weights")
        Interleaved(self.weights)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def name(self) -> str:
        """What messages call it."""
        return " + ".join(self.names)

    def stream(self, seed: int, ordering: Ordering) -> "Stream":
        """The endless sequence of samples of a run."""
        return Stream(self, seed, ordering)

    def key(self, source: int, index: int) -> str:
        """Key of a sample, without reading it."""
        return self.named(source, self.sources[source].key(index))

    def named(self, source: int, key: str) -> str:
        """The key of a sample of a source, told apart from those of the others."""
        return key if len(self.sources) == 1 else f"{self.names[source]}/{key}"

    def texts(self) -> Iterator[str]:
        """Every alt-text and synthetic caption, for learning a vocabulary."""
        for source in self.sources:
            yield from all_texts(source)

    def manifest_hash(self) -> str:
        """Identity of the data: that of the one source, or over all of them with their weights."""
        hashes = [source.manifest_hash() for source in self.sources]
        if len(hashes) == 1:
            return hashes[0]
        digest = hashlib.sha256()
        for weight, manifest in zip(self.weights, hashes, strict=True):
            digest.update(f"{weight} {manifest}\n".encode())
        return digest.hexdigest()


class Stream:
    """Position -> source and sample."""

    def __init__(self, mixture: Mixture, seed: int, ordering: Ordering) -> None:
        self._interleaved = Interleaved(mixture.weights)
        self._orders = [ordering.of(len(source), seed) for source in mixture.sources]

    def __getitem__(self, position: int) -> tuple[int, int]:
        source, own = self._interleaved[position]
        return source, self._orders[source][own]
