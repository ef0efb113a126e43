"""Every byte of a folder of shards looked at: hashes, pictures, json, texts and keys.

Each shard is opened alone, so that one that is cut or damaged costs one finding and the others are still checked.
Nothing is written beside the shards: an index that is missing is built elsewhere and thrown away.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openvision.data.shards.dataset import ShardDataset
from openvision.data.tools.stats import as_texts
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text
from openvision.images.decode import BadSampleError, decode_image

Progress = Callable[[int, float], None]
"""Told how many samples were read, and which share of all bytes (0 to 1) they were."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a shard or with one of its samples."""

    reason: str
    """`broken_shard` for a whole shard, `damaged` for bytes that are not what the index says, `duplicate_key`,
    `no_picture`, or the reason by which the loader counts a sample it cannot use: `undecodable`, `empty_text`, ..."""
    shard: str
    key: str | None
    """None for a whole shard, and for what its index only counts."""
    detail: str


@dataclass
class Verified:
    """What came of it."""

    shards: int = 0
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def reasons(self) -> Counter[str]:
        """Findings by reason."""
        return Counter(finding.reason for finding in self.findings)


def verify(folder: Path, threads: int = 2, progress: Progress | None = None) -> Verified:
    """Read every sample of the shards in `folder`; raises OpenVisionError only when there is no shard at all."""
    paths = shards_of(folder)
    files = _files_of(paths)
    sizes = [path.stat().st_size for path in paths]
    result = Verified()
    seen: set[bytes] = set()
    for number, path in enumerate(paths):

        def told(done: int, share: float, number: int = number) -> None:
            if progress:
                read = sum(sizes[:number]) + share * sizes[number]
                progress(result.samples + done, read / max(sum(sizes), 1))

        samples, findings = _verify_shard(path, files[path], threads, seen, told)
        result.shards += 1
        result.samples += samples
        result.findings += findings
    return result


def shards_of(folder: Path) -> list[Path]:
    """The tars of `folder`, without those that only carry further captions of another; raises when there are none."""
    if not folder.is_dir():
        raise OpenVisionError(f"shard folder {folder} does not exist")
    paths = sorted(folder.glob("*.tar"))
    names = {path.name for path in paths}
    shards = [path for path in paths if "." not in path.stem or f"{path.name.split('.')[0]}.tar" not in names]
    if not shards:
        raise OpenVisionError(f"shard folder {folder} holds no .tar file")
    return shards


def write_findings(findings: list[Finding], path: Path) -> None:
    """Write one JSON object a line: reason, shard, key, detail."""
    atomic_write_text(path, "".join(f"{json.dumps(asdict(finding), ensure_ascii=False)}\n" for finding in findings))


def _files_of(shards: list[Path]) -> dict[Path, list[Path]]:
    """Each shard with its index and whatever else shares its name; the folder is listed once."""
    by_beginning: dict[str, list[Path]] = {}
    for file in sorted(shards[0].parent.iterdir()):
        by_beginning.setdefault(file.name.split(".")[0], []).append(file)
    return {
        shard: [file for file in by_beginning[shard.name.split(".")[0]] if _belongs(file, shard)] for shard in shards
    }


def _belongs(file: Path, shard: Path) -> bool:
    return file.is_file() and file.name.startswith(f"{shard.stem}.")


def _verify_shard(
    path: Path, files: list[Path], threads: int, seen: set[bytes], progress: Progress
) -> tuple[int, list[Finding]]:
    """Number of samples of one shard, and what is wrong with them.

    `files` are the shard and what lies beside it; `seen` holds the keys of earlier shards and takes those of this one.
    """
    with _alone(path, files) as (folder, named):
        try:
            dataset = ShardDataset(folder)
        except OpenVisionError as error:
            return 0, [Finding("broken_shard", path.name, None, named(str(error)))]
        findings = [
            Finding(reason, path.name, None, f"{path}: {count} left out when it was indexed")
            for reason, count in sorted(dataset.rejected.items())
        ]
        with ThreadPoolExecutor(threads) as pool:
            count = len(dataset)
            for index, problem in enumerate(pool.map(lambda index: _problem(dataset, index), range(count))):
                key = dataset.key(index)
                if problem is not None:
                    findings.append(Finding(problem[0], path.name, key, named(problem[1])))
                if _known(key, seen):
                    findings.append(Finding("duplicate_key", path.name, key, "an earlier sample has this key"))
                progress(index + 1, (index + 1) / count)
        return count, findings


@contextmanager
def _alone(path: Path, files: list[Path]) -> Iterator[tuple[Path, Callable[[str], str]]]:
    """A folder that holds links to one shard and to what lies beside it, and what puts the true place in messages."""
    with tempfile.TemporaryDirectory(prefix="openvision-verify-") as name:
        folder = Path(name)
        for file in files:
            if file.suffix == ".tar":
                (folder / file.name).symlink_to(file.resolve())
            else:
                # A copy is younger than the tar: an index older than its tar would be doubted as a whole, while here
                # every sample is compared with it.
                shutil.copyfile(file, folder / file.name)
        yield folder, lambda message: message.replace(str(folder), str(path.parent))


def _problem(dataset: ShardDataset, index: int) -> tuple[str, str] | None:
    """Reason and detail of what makes a sample unusable."""
    try:
        sample = dataset[index]
        decode_image(sample.image)
        if not as_texts(sample.alt):
            raise BadSampleError("empty_text", f"{sample.key} has no alt-text")
    except BadSampleError as bad:
        return bad.reason, str(bad)
    except OpenVisionError as error:
        return "damaged", str(error)
    return None


def _known(key: str, seen: set[bytes]) -> bool:
    """Whether `key` came before; kept as hashes, since the keys of other programs' shards can be long."""
    digest = hashlib.blake2b(key.encode("utf-8", errors="surrogateescape"), digest_size=16).digest()
    if digest in seen:
        return True
    seen.add(digest)
    return False
