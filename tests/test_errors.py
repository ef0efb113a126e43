"""What the machine has run out of, and what an optional library lacks, is one sentence."""

import errno
import importlib.metadata
import tomllib
from pathlib import Path

import pytest

from openvision.errors import OpenVisionError, describe_exhaustion, require


def _behind(cause: OSError) -> OpenVisionError:
    error = OpenVisionError("shard cannot be read; restore it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "out of memory on this machine"),
        (OSError(errno.EMFILE, "", "a.tar"), "cannot open a.tar: too many open files; raise the limit"),
        (_behind(OSError(errno.ENFILE, "")), "cannot open: too many open files; raise the limit"),
        (OSError(errno.ENOSPC, "No space left", "out.npz"), "cannot write out.npz: No space left; make room"),
        (_behind(OSError(errno.ENOSPC, "No space left")), None),
        (FileNotFoundError(errno.ENOENT, "gone"), None),
        (ValueError("a bug"), None),
    ],
)
def test_exhaustion(error, sentence):
    told = describe_exhaustion(error)
    assert told is None if sentence is None else str(told).startswith(sentence)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package `timm_like` whose import runs the given code."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> None:
        (tmp_path / "timm_like.py").write_text(code)

    return write


def test_a_package_that_is_not_there_keeps_the_torch_that_is():
    version = importlib.metadata.version("torch").split("+")[0]
    with pytest.raises(OpenVisionError, match=r"'timm_like' is not installed; run: pip install") as told:
        require("timm_like.models", extra="timm")
    assert str(told.value).endswith(f"pip install 'openvision-encoders[timm]' torch=={version}")
    with pytest.raises(OpenVisionError, match=r"run: pip install 'openvision-encoders\[hub\]'$"):
        require("no_such_hub", extra="hub")


def test_a_package_that_is_there_and_broken_is_not_said_to_be_missing(package):
    package("import no_such_requirement")
    with pytest.raises(OpenVisionError, match="'timm_like' needs 'no_such_requirement', which is not installed"):
        require("timm_like", extra="timm")
    package("raise ImportError('cannot import name x\\nand more')")
    with pytest.raises(
        OpenVisionError, match="is installed but cannot be imported: cannot import name x; reinstall it"
    ):
        require("timm_like", extra="timm")


def test_extras_have_names_that_every_pip_finds():
    content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"]
    assert [name for name in extras if "_" in name or name != name.lower()] == []
    assert "open-clip" in extras
