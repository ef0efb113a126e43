"""A hung process shows its stack, and of several that fail one speaks."""

import contextlib
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from openvision.errors import OpenVisionError
from openvision.training.run import watchdog
from openvision.training.run.signals import Interrupted
from openvision.training.run.watchdog import (
    AlreadyReportedError,
    LostProcessError,
    Watchdog,
    claim_failure,
    clear_failure,
    is_of_this_session,
    report_once,
)


def where() -> str:
    return "step 3"


def wait_for_a_report(dog: Watchdog) -> None:
    gate = threading.Event()
    for _ in range(1000):
        if dog.reported:
            return
        gate.wait(0.01)


def test_a_hung_process_is_reported_with_its_stack(tmp_path):
    said: list[str] = []
    with Watchdog(tmp_path, 2, 0.05, said.append) as dog:
        dog.beat(6, "waiting for a batch")
        wait_for_a_report(dog)
    report = (tmp_path / "hangs/process-00002.txt").read_text()
    assert "process 2 has made no progress" in report
    assert "step 7, waiting for a batch" in report
    assert "wait_for_a_report" in report
    assert str(tmp_path / "hangs/process-00002.txt") in said[0]


def test_a_process_that_goes_on_leaves_no_file(tmp_path):
    with Watchdog(tmp_path, 0, 60.0, print) as dog:
        dog.beat(1, "forward")
    assert not list((tmp_path / "hangs").iterdir())
    with Watchdog(tmp_path / "other", 0, None, print):
        pass
    assert not (tmp_path / "other").exists()


def failing(folder, rank: int, error: BaseException):
    with report_once(folder, rank, 2, where):
        raise error


def test_the_first_error_is_told_and_the_others_are_silent(tmp_path):
    with pytest.raises(OpenVisionError, match="bad recipe"):
        failing(tmp_path, 1, OpenVisionError("bad recipe"))
    with pytest.raises(AlreadyReportedError):
        failing(tmp_path, 0, OpenVisionError("bad recipe"))
    clear_failure(tmp_path)
    with pytest.raises(OpenVisionError, match="bad recipe"):
        failing(tmp_path, 0, OpenVisionError("bad recipe"))


def test_a_lost_process_is_told_unless_another_one_knew_more(tmp_path):
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(LostProcessError, match=r"lost or hung \(step 3, seen by process 0\)"):
        failing(tmp_path, 0, gone)
    with pytest.raises(AlreadyReportedError):
        failing(tmp_path, 1, gone)


def test_a_bug_keeps_its_traceback_and_a_stop_is_no_failure(tmp_path):
    with pytest.raises(RuntimeError, match="shape mismatch"):
        failing(tmp_path, 0, RuntimeError("shape mismatch"))
    with pytest.raises(AlreadyReportedError):
        failing(tmp_path, 1, OpenVisionError("later"))
    clear_failure(tmp_path)
    with pytest.raises(Interrupted):
        failing(tmp_path, 0, Interrupted("stopped"))
    assert not (tmp_path / "FAILED").exists()


@pytest.mark.parametrize("stale", [False, True])
def test_of_failures_at_the_same_moment_one_speaks(tmp_path, monkeypatch, stale):
    """Also between the look at the marker of the session before and its removal, where the others are held here."""
    gate = threading.Barrier(2, timeout=0.2)

    def look_together(path: Path) -> bool:
        found = is_of_this_session(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            gate.wait()
        return found

    monkeypatch.setattr(watchdog, "is_of_this_session", look_together)
    for _ in range(20):
        clear_failure(tmp_path)
        if stale:
            (tmp_path / "FAILED").write_text("{}")
            os.utime(tmp_path / "FAILED", (1, 1))
        with ThreadPoolExecutor(4) as pool:
            claims = list(pool.map(lambda rank: claim_failure(tmp_path, rank, "bad recipe"), range(4)))
        assert claims.count(True) == 1
        assert json.loads((tmp_path / "FAILED").read_text())["process"] == claims.index(True)


def test_one_process_writes_no_marker(tmp_path):
    with pytest.raises(OpenVisionError), report_once(tmp_path, 0, 1, where):
        raise OpenVisionError("bad recipe")
    assert not (tmp_path / "FAILED").exists()
