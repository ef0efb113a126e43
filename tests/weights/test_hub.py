"""Downloads from the Hub, with the Hub's own functions replaced: a Hub that does not answer costs one request."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from openvision.errors import OpenVisionError
from openvision.weights.hub import fetch, fetch_folder


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, bool]]:
    """(file or folder, local files only) of every download; the cache has `cached.bin` alone."""
    made: list[tuple[str, bool]] = []

    def download(repository: str, name: str, revision: str | None, local_files_only: bool) -> str:
        made.append((name, local_files_only))
        if name != "cached.bin":
            raise LocalEntryNotFoundError(f"{name} is not in the cache")
        return name

    def snapshot(repository: str, revision: str | None, local_files_only: bool, allow_patterns: list[str]) -> str:
        made.append((allow_patterns[0], local_files_only))
        raise LocalEntryNotFoundError("the folder is not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return made


def answer(monkeypatch, error: Exception | None) -> None:
    def head(url: str, timeout: float) -> None:
        assert timeout <= 10
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", head)


def test_a_hub_that_does_not_answer_leaves_the_cache(monkeypatch, calls):
    answer(monkeypatch, ConnectionError("name not known"))
    assert fetch("foo/bar", ("one.bin", "cached.bin")) == Path("cached.bin")
    assert calls == [("one.bin", True), ("cached.bin", True)]


def test_the_sentence_says_that_it_did_not_answer(monkeypatch, calls):
    answer(monkeypatch, ConnectionError("name not known"))
    with pytest.raises(OpenVisionError, match=r"the Hub does not answer \(name not known\); no folder here"):
        fetch("foo/bar", ("one.bin", "two.bin"))
    with pytest.raises(OpenVisionError, match=r"the Hub does not answer \(name not known\); no folder here"):
        fetch_folder("foo/bar", "tree")
    assert calls == [("one.bin", True), ("two.bin", True), ("tree/**", True)]


class RefusedError(HfHubHTTPError):
    """An answer with a code of 400 or more."""

    def __init__(self) -> None:
        Exception.__init__(self, "404")


@pytest.mark.parametrize("error", [None, RefusedError()])
def test_a_hub_that_answers_is_asked(monkeypatch, calls, error):
    answer(monkeypatch, error)
    fetch("foo/bar", ("cached.bin",))
    with pytest.raises(OpenVisionError):
        fetch_folder("foo/bar", "tree")
    assert calls == [("cached.bin", False), ("tree/**", False)]


def test_offline_asks_nobody(monkeypatch, calls):
    answer(monkeypatch, AssertionError("the Hub was asked"))
    fetch("foo/bar", ("cached.bin",), offline=True)
    assert calls == [("cached.bin", True)]
