"""Encode with Ray Data: each actor loads the encoder once and encodes one shard of vectors after the other.

A shard is there as a whole or is encoded again, and has a name of its own: each is encoded once, whatever stops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openvision.cluster import Cluster, Work, check_ray, run_on_ray
from openvision.inference.embed import EmbedResult, images_of
from openvision.inference.vector_folder import SHARD, begin, encode_shard, finish, shard_file, shard_rows
from openvision.inference.vision import VisionEncoder


@dataclass(frozen=True)
class _Work:
    load: Callable[[], VisionEncoder]
    source: Path
    output: Path
    batch_size: int
    threads: int
    shard: int
    kind: str

    def __call__(self) -> Work:
        """Load the encoder, and see that this machine has the images and weights of the job."""
        encoder, images = self.load(), images_of(self.source)
        job = begin(encoder, self.source, images, self.output, self.shard, self.kind)

        def encode(number: str) -> str:
            encode_shard(encoder, images, self.output, job, int(number), self.batch_size, self.threads)
            return str(len(shard_rows(images, job, int(number))))

        return encode


def encode_on_ray(
    encoder: VisionEncoder,
    load: Callable[[], VisionEncoder],
    source: Path,
    output: Path,
    cluster: Cluster,
    batch_size: int = 64,
    threads: int = 2,
    shard: int = SHARD,
    kind: str = "npy",
    progress: Callable[[int, int], None] | None = None,
) -> EmbedResult:
    """As `encode_folder`, on the actors of a Ray cluster; images and output lie on storage that all of them see.

    `load` makes the same encoder in each actor. Raises OpenVisionError as `encode_folder` does, without Ray, and
    with an actor's first error.
    """
    check_ray()
    # Relative paths mean another folder in the working directory of an actor.
    source, output = source.resolve(), output.resolve()
    images = images_of(source)
    job = begin(encoder, source, images, output, shard, kind)
    numbers = range(-(-len(images.keys) // shard))
    waiting = [number for number in numbers if not shard_file(output, job, number).is_file()]
    total = len(images.keys)
    done = total - sum(len(shard_rows(images, job, number)) for number in waiting)
    work = _Work(load, source, output, batch_size, threads, shard, kind)
    for rows in run_on_ray([str(number) for number in waiting], work, cluster) if waiting else ():
        done += int(rows)
        if progress:
            progress(done, total)
    return finish(output, job, images)
