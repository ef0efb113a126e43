"""The data of a run: one folder of shards, or several mixed by weight, in a shuffled order."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from openvision.data.distinct import DistinctOrder, Grid
from openvision.data.order import BlockShuffle, GlobalShuffle, Interleaved, Order
from openvision.data.shards.dataset import ShardDataset, all_texts
from openvision.errors import OpenVisionError

OrderName = Literal["global", "blocks"]


@dataclass(frozen=True)
class Ordering:
    """How the samples of an epoch are shuffled."""

    name: OrderName = "global"
    block: int = 64
    """Neighbouring samples of a shard that stay together (order "blocks")."""
    window: int = 4096
    """Samples within which blocks are shuffled a second time (order "blocks")."""

    def over(self, length: int, seed: int) -> Order:
        """The order of `length` samples."""
        if self.name == "global":
            return GlobalShuffle(length, seed)
        return BlockShuffle(length, seed, self.block, self.window)


@dataclass
class Mixture:
    """Sources with sampling weights; a single folder is a mixture of one."""

    sources: Sequence[ShardDataset]
    weights: Sequence[float] = ()
    """Equal by default."""
    names: Sequence[str] = ()
    """Prefixes of keys where there are several sources; the folders by default."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise OpenVisionError("there is no source to read; name at least one folder of shards")
        self.weights = tuple(self.weights) or (1.0,) * len(self.sources)
        self.names = tuple(self.names) or tuple(source.folder for source in self.sources)
        if len(self.weights) != len(self.sources):
            raise OpenVisionError(f"{len(self.sources)} sources have {len(self.weights)} weights; give one each")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise OpenVisionError(f"source {repeated[0]!r} is named twice; name it once with the sum of its weights")
        Interleaved(self.weights)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def name(self) -> str:
        """Name for messages."""
        return " + ".join(self.names)

    def stream(self, seed: int, ordering: Ordering) -> "Stream":
        """The endless sequence of a run's samples."""
        return Stream(self, seed, ordering)

    def distinct_stream(self, seed: int, ordering: Ordering, grid: Grid) -> DistinctOrder:
        """The endless sequence of a run's samples, with none twice in a batch.

        Raises OpenVisionError when a batch takes more samples of a source than it has.
        """
        stream = Stream(self, seed, ordering)
        lengths = [len(source) for source in self.sources]
        return DistinctOrder(stream.interleaved, stream.orders, lengths, self.names, grid)

    def key(self, source: int, index: int) -> str:
        """Qualified key of sample `index` of a source, without reading the sample."""
        return self.qualified_key(source, self.sources[source].key(index))

    def qualified_key(self, source: int, key: str) -> str:
        """`key` with the name of its source in front where there are several sources."""
        return key if len(self.sources) == 1 else f"{self.names[source]}/{key}"

    def texts(self) -> Iterator[str]:
        """Every alt-text and synthetic caption, to learn a vocabulary from."""
        for source in self.sources:
            yield from all_texts(source)

    def manifest_hash(self) -> str:
        """Identity of the data: the manifest hash of a single source, or a SHA-256 over all with their weights."""
        hashes = [source.manifest_hash() for source in self.sources]
        if len(hashes) == 1:
            return hashes[0]
        digest = hashlib.sha256()
        for weight, manifest in zip(self.weights, hashes, strict=True):
            digest.update(f"{weight} {manifest}\n".encode())
        return digest.hexdigest()


class Stream:
    """Position -> (source, sample index)."""

    def __init__(self, mixture: Mixture, seed: int, ordering: Ordering) -> None:
        self.interleaved = Interleaved(mixture.weights)
        self.orders = [ordering.over(len(source), seed) for source in mixture.sources]

    def __getitem__(self, position: int) -> tuple[int, int]:
        source, position_in_source = self.interleaved[position]
        return source, self.orders[source][position_in_source]
