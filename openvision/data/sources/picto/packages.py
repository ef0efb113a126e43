"""The npm and Debian packages behind `picto`: pinned, fetched by `npm pack` and `apt-get download`, verified.

A package is fetched once into a folder, and used from there without a network. Nothing is installed or unpacked, and no
script of a package runs.
"""

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, make_folder

_FETCH_SECONDS = 600
# The largest member is the icons.json of fluent-emoji, 104 MB.
_LARGEST_MEMBER = 200 * 2**20
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """One version of one package, pinned by its hash."""

    name: str
    version: str
    file: str
    sha512: str
    licence: str
    attribution: str
    use: str
    """What `picto` uses it for."""

    @property
    def is_debian(self) -> bool:
        """Whether it is a Debian package rather than an npm package."""
        return self.file.endswith(".deb")

    def fetch_command(self) -> list[str]:
        """The command that downloads the package into its working directory."""
        if self.is_debian:
            return ["apt-get", "download", f"{self.name}={self.version}"]
        return ["npm", "pack", f"{self.name}@{self.version}", "--ignore-scripts"]


class Packages:
    """Package files in a folder, fetched when missing and verified on first use."""

    def __init__(self, folder: Path, table: dict[str, Package], offline: bool = False) -> None:
        """`table` maps short names to packages; with `offline` nothing is fetched."""
        self.folder = folder
        self.table = table
        self.offline = offline
        self._paths: dict[str, Path] = {}

    def path(self, short: str) -> Path:
        """File of a package; raises OpenVisionError when it can neither be found nor fetched, or its hash differs."""
        if short not in self._paths:
            package = self.table[short]
            path = self.folder / package.file
            if not path.is_file():
                self._fetch(package)
            _check_hash(path, package)
            self._paths[short] = path
        return self._paths[short]

    def read_object(self, short: str, member: str) -> JsonObject:
        """A JSON file of an npm package that holds an object; `member` is named without the leading `package/`."""
        return json.loads(self._read(short, member))

    def read_list(self, short: str, member: str) -> list[JsonObject]:
        """A JSON file of an npm package that holds a list of objects."""
        return json.loads(self._read(short, member))

    def _read(self, short: str, member: str) -> bytes:
        found = dict(self.members(short, lambda name: name == member))
        if member not in found:
            raise OpenVisionError(f"{self.path(short)} has no {member}; remove the file to fetch it again")
        return found[member]

    def members(self, short: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of the files of a package whose name is `wanted`.

        npm names are relative to the folder `package/`; Debian names are absolute paths without the leading slash.
        """
        path = self.path(short)
        try:
            with open(path, "rb") as file:
                yield from _tar_members(_tar_of(file, self.table[short].is_debian), wanted)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise OpenVisionError(f"{path} cannot be read: {error}; remove it to fetch it again") from error

    def _fetch(self, package: Package) -> None:
        command = package.fetch_command()
        by_hand = f"or copy {package.file} into {self.folder}"
        if self.offline:
            raise OpenVisionError(f"{package.file} is not in {self.folder}; run once without --offline, {by_hand}")
        if shutil.which(command[0]) is None:
            product = "the package manager of Debian" if package.is_debian else "npm, which comes with Node.js"
            raise OpenVisionError(
                f"package {package.name} {package.version} is fetched by {command[0]}, which is not installed; "
                f"install {product}, {by_hand}"
            )
        make_folder(self.folder)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".fetch-") as temporary:
            _run(command, temporary, by_hand)
            fetched = [file for file in Path(temporary).iterdir() if file.suffix in (".tgz", ".deb")]
            if len(fetched) != 1:
                raise OpenVisionError(
                    f"{' '.join(command)} wrote {len(fetched)} packages instead of one; run it again, {by_hand}"
                )
            os.replace(fetched[0], self.folder / package.file)


def _run(command: list[str], folder: str, by_hand: str) -> None:
    """Run a fetch command in `folder`; raises OpenVisionError with its first lines on standard error."""
    environment = os.environ | {"NO_COLOR": "1", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_FETCH_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise OpenVisionError(
            f"{' '.join(command)} did not finish within {_FETCH_SECONDS} s; check the network, {by_hand}"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        refresh = "run apt-get update, " if command[0] == "apt-get" else "check the network, "
        raise OpenVisionError(f"{' '.join(command)} failed: {' '.join(lines[:3])}; {refresh}{by_hand}")


def _check_hash(path: Path, package: Package) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha512").hexdigest()
    if digest != package.sha512:
        raise OpenVisionError(
            f"{path} is not {package.name} {package.version}: its SHA-512 starts with {digest[:12]}, expected "
            f"{package.sha512[:12]}; remove it to fetch it again"
        )


def _tar_of(file: BinaryIO, is_debian: bool) -> tarfile.TarFile:
    if is_debian:
        _seek_data(file)
    return tarfile.open(fileobj=file, mode="r|*")


def _seek_data(file: BinaryIO) -> None:
    """Seek to the data of a Debian package: an ar archive whose last member is the compressed tar of its files."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise tarfile.ReadError("it is not a Debian package")
    while len(header := file.read(_AR_HEADER)) == _AR_HEADER:
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, io.SEEK_CUR)
    raise tarfile.ReadError("it has no data.tar")


def _tar_members(tar: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with tar:
        for info in tar:
            name = info.name.removeprefix("./").removeprefix("package/")
            if not info.isfile() or not wanted(name):
                continue
            if info.size > _LARGEST_MEMBER:
                raise tarfile.ReadError(f"{name} has {info.size} bytes, more than {_LARGEST_MEMBER}")
            file = tar.extractfile(info)
            assert file is not None
            yield name, file.read()


def default_folder() -> Path:
    """Default folder of packages, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openvision" / "packages"


@functools.cache
def committed_packages() -> dict[str, Package]:
    """Short name -> pinned package, from packages.json."""
    content = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {short: Package(**fields) for short, fields in content.items()}
