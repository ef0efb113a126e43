"""`openvision data verify`: check every sample of a folder of shards: hashes, images, json, texts and keys.

A sample that training would use although it looks wrong is suspicious: it is listed and counted, but is no finding.

Each shard is opened on its own, so that a truncated one is a single finding and the others are still checked. Nothing
is written next to the shards: a missing index is built in a temporary folder.
"""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openvision.data.shards.dataset import ShardDataset
from openvision.data.shards.index import captions_name, index_name
from openvision.data.shards.manifest import Shard, check_gone, manifest_name, read_manifest
from openvision.data.shards.selection import names_tars
from openvision.data.shards.store import LocalStore, open_store
from openvision.data.shards.tar import check_whole
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, check_file
from openvision.images.decode import BadSampleError, decode_image, has_gray_tail
from openvision.text.captions import non_blank
from openvision.text.tokenizer import Tokenizer
from openvision.untrusted import json_text

SUSPICIONS = {
    "gray_tail": "ends in middle gray, as a JPEG that was cut does",
    "not_utf8": "has a text that is not UTF-8; it is read as Windows-1252",
    "null_in_list": "has nulls in a list of captions; they are left out",
    "unknown_words": "has a text without a word of the vocabulary",
}
"""What is suspicious of a sample, by reason."""
Progress = Callable[[int, float], None]
"""Called with the number of samples read and their share of all bytes, 0 to 1."""


@dataclass(frozen=True)
class Finding:
    """A defect of a shard or of one of its samples."""

    reason: str
    """A key of SUSPICIONS, or of a finding: `broken_shard` for a whole shard, `broken_manifest` for shards.json,
    `damaged` for a hash that differs from its index, `duplicate_key`, another reason of the index (`no_image`,
    `unsupported_image`, `bad_name`), or the reason
    under which the loader rejects the sample: `undecodable`, `empty_text`, ..."""
    shard: str
    key: str | None
    """None for a whole shard, and for samples that the index only counts."""
    detail: str


@dataclass
class VerifyResult:
    """Counts and findings."""

    shards: int = 0
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)
    suspicious: list[Finding] = field(default_factory=list)
    """Samples that are used although they look wrong."""

    @property
    def reasons(self) -> Counter[str]:
        """Findings by reason."""
        return Counter(finding.reason for finding in self.findings)


def verify(
    folder: Path, threads: int = 2, progress: Progress | None = None, tokenizer: Tokenizer | None = None
) -> VerifyResult:
    """Read every sample of the shards in `folder`; raises OpenVisionError only when it has no shard.

    With a `tokenizer`, texts without a word of its vocabulary are suspicious.
    """
    paths = shards_of(folder)
    files = _files_of(paths)
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    result = VerifyResult()
    listed: dict[Path, Shard] = {}
    store = open_store(folder) if names_tars(folder) else LocalStore(folder)
    try:
        manifest = read_manifest(store)
        listed = {Path(store.join(shard.name)): shard for shard in manifest.shards} if manifest else {}
        names = {path: shard.name for path, shard in listed.items()}
        check_gone(store, names.values(), [names[path] for path in paths if path in names])
    except OpenVisionError as error:
        result.findings.append(Finding("broken_manifest", manifest_name(store), None, str(error)))
    seen: set[bytes] = set()
    for number, path in enumerate(paths):

        def report(done: int, share: float, number: int = number) -> None:
            if progress:
                read = sum(sizes[:number]) + share * sizes[number]
                progress(result.samples + done, read / max(sum(sizes), 1))

        checked = _verify_shard(path, files[path], threads, seen, report, tokenizer)
        result.shards += 1
        result.samples += checked.samples
        result.findings += checked.findings
        result.findings += _manifest_differs(path, listed.get(path), checked.samples, sizes[number])
        result.suspicious += checked.suspicious
    return result


def _manifest_differs(path: Path, listed: Shard | None, samples: int, size: int) -> list[Finding]:
    # A broken shard, which has no samples here, is a finding already.
    if listed is None or not samples:
        return []
    if (listed.samples, listed.tar_bytes) != (samples, size):
        says = f"the manifest says {listed.samples} samples in {listed.tar_bytes} bytes, there are {samples} in {size}"
    elif _index_differs(path, listed):
        says = "its index is not the one that the manifest was made of"
    else:
        return []
    remedy = f"rebuild both with `openvision data index {path.parent} --rebuild`"
    return [Finding("broken_manifest", path.name, None, f"{path}: {says}; {remedy}")]


def _index_differs(path: Path, listed: Shard) -> bool:
    """Whether others read an index that has changed since; one whose captions are new is built again by them."""
    index, captions = (path.with_name(name(path.name)) for name in (index_name, captions_name))
    if not index.is_file() or listed.captions_bytes != (captions.stat().st_size if captions.is_file() else None):
        return False
    return hashlib.sha256(index.read_bytes()).hexdigest() != listed.index_sha256


def shards_of(folder: Path) -> list[Path]:
    """The shards of `folder`, without captions tars, or those it names; raises OpenVisionError when there is none."""
    if names_tars(folder):
        store = open_store(folder)
        return [Path(store.join(name)) for name in store.tars or ()]
    if not folder.is_dir():
        raise OpenVisionError(f"shard folder {folder} does not exist; check the path")
    paths = sorted(folder.glob("*.tar"))
    names = {path.name for path in paths}
    shards = [path for path in paths if "." not in path.stem or f"{path.name.split('.')[0]}.tar" not in names]
    if not shards:
        raise OpenVisionError(f"shard folder {folder} holds no .tar file; name a folder of shards")
    return shards


def write_findings(findings: list[Finding], path: Path) -> None:
    """Write one JSON object a line: reason, shard, key, detail."""
    atomic_write_text(path, "".join(f"{json_text(asdict(finding))}\n" for finding in findings))


def _files_of(shards: list[Path]) -> dict[Path, list[Path]]:
    """Each shard with its index, captions tar and other files of its name; lists each folder once."""
    by_stem: dict[Path, list[Path]] = {}
    for folder in {shard.parent for shard in shards}:
        for file in sorted(folder.iterdir()):
            by_stem.setdefault(folder / file.name.split(".")[0], []).append(file)
    return {
        shard: [file for file in by_stem[shard.parent / shard.name.split(".")[0]] if _belongs(file, shard)]
        for shard in shards
    }


def _belongs(file: Path, shard: Path) -> bool:
    if not file.name.startswith(f"{shard.stem}."):
        return False
    # These are read: what is no regular file under their names is a finding.
    return file.is_file() or file.name in (shard.name, index_name(shard.name), captions_name(shard.name))


def _verify_shard(
    path: Path, files: list[Path], threads: int, seen: set[bytes], progress: Progress, tokenizer: Tokenizer | None
) -> VerifyResult:
    """What one shard holds.

    `files` are the shard, its index and its captions; `seen` collects the keys of all shards.
    """
    try:
        for file in files:
            check_file(file)
    except OpenVisionError as error:
        return VerifyResult(findings=[Finding("broken_shard", path.name, None, str(error))])
    with _isolated(path, files) as (folder, named):
        try:
            # An index may be older than the damage, or than the check.
            for tar in (file.name for file in files if file.suffix == ".tar"):
                check_whole(LocalStore(folder), tar)
            dataset = ShardDataset(folder)
            keys = [dataset.key(index) for index in range(len(dataset))]
        except OpenVisionError as error:
            return VerifyResult(findings=[Finding("broken_shard", path.name, None, named(str(error)))])
        findings = [
            Finding(reason, path.name, None, f"{path}: {count} left out of the index")
            for reason, count in sorted(dataset.rejected.items())
        ]
        result = VerifyResult(1, len(dataset), findings)
        with ThreadPoolExecutor(threads) as pool:
            checked = pool.map(lambda index: _check(dataset, index, tokenizer), range(len(keys)))
            for index, (key, (problem, remarks)) in enumerate(zip(keys, checked, strict=True)):
                if problem is not None:
                    findings.append(Finding(problem[0], path.name, key, named(problem[1])))
                result.suspicious += [
                    Finding(remark, path.name, key, f"{key} {SUSPICIONS[remark]}") for remark in remarks
                ]
                if _known(key, seen):
                    findings.append(Finding("duplicate_key", path.name, key, "an earlier sample has this key"))
                progress(index + 1, (index + 1) / len(keys))
        return result


@contextmanager
def _isolated(path: Path, files: list[Path]) -> Iterator[tuple[Path, Callable[[str], str]]]:
    """A temporary folder with links to one shard and its files, and a function that restores real paths in messages."""
    with tempfile.TemporaryDirectory(prefix="openvision-verify-") as name:
        folder = Path(name)
        for file in files:
            if file.suffix == ".tar":
                (folder / file.name).symlink_to(file.resolve())
            else:
                # A copy is newer than the tar: an index older than its tar would be refused as a whole, while here
                # every sample is compared with it.
                shutil.copyfile(file, folder / file.name)
        yield folder, lambda message: message.replace(str(folder), str(path.parent))


def _check(dataset: ShardDataset, index: int, tokenizer: Tokenizer | None) -> tuple[tuple[str, str] | None, list[str]]:
    """Reason and detail of a sample's defect, None when it is usable; and what is suspicious of a usable one."""
    try:
        sample = dataset[index]
        pixels = decode_image(sample.image)
        if not non_blank(sample.alt):
            raise BadSampleError("empty_text", f"{sample.key} has no alt-text")
    except BadSampleError as bad:
        return (bad.reason, str(bad)), []
    except OpenVisionError as error:
        return ("damaged", str(error)), []
    remarks = [*sample.remarks, *(["gray_tail"] if has_gray_tail(pixels) else [])]
    texts = non_blank(sample.alt) + non_blank(sample.synthetic)
    if tokenizer is not None and any(set(ids) == {tokenizer.unk_id} for ids in tokenizer.tokens(texts)):
        remarks.append("unknown_words")
    return None, remarks


def _known(key: str, seen: set[bytes]) -> bool:
    """Whether `key` occurred before; stored as hashes, since keys of foreign shards can be long."""
    digest = hashlib.blake2b(key.encode("utf-8", errors="surrogateescape"), digest_size=16).digest()
    if digest in seen:
        return True
    seen.add(digest)
    return False
