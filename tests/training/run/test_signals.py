"""Signals ask a run to stop; who asked decides the exit code."""

import os
import signal
import threading

import pytest

from openvision.errors import OpenVisionError
from openvision.training.run.signals import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    Interrupted,
    StopRequest,
    clear_requeue,
    mark_requeue,
)
from openvision.training.trainer import Trainer, launch


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_REQUEUE), (signal.SIGUSR1, EXIT_REQUEUE)],
)
def test_a_signal_is_noted_and_its_handler_comes_back(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), number)
        assert stop.wanted
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_does_not_wait():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_in_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def inside():
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_scheduler_finds_the_marker_and_a_person_does_not(tiny_recipe, shapes_folder, tmp_path):
    for requeue, code in ((True, EXIT_REQUEUE), (False, EXIT_INTERRUPTED)):
        trainer = Trainer(tiny_recipe, shapes_folder, tmp_path / "run")
        trainer.stop.ask(requeue)
        with pytest.raises(Interrupted) as stopped:
            trainer.run()
        assert stopped.value.exit_code == code
        assert (tmp_path / "run/REQUEUE").exists() == requeue


def test_the_marker_of_the_session_before_goes(tmp_path):
    marker = tmp_path / "REQUEUE"
    clear_requeue(tmp_path)
    mark_requeue(tmp_path, "after step 3")
    assert "after step 3" in marker.read_text()
    clear_requeue(tmp_path)
    assert marker.exists(), "another process of this session may have written it"
    os.utime(marker, (1, 1))
    clear_requeue(tmp_path)
    assert not marker.exists()


def test_a_start_that_fails_leaves_no_marker(tiny_recipe, tmp_path):
    """A job script would queue it again for ever."""
    mark_requeue(tmp_path / "run", "after step 3")
    os.utime(tmp_path / "run/REQUEUE", (1, 1))
    with pytest.raises(OpenVisionError, match="nowhere"):
        launch(tiny_recipe, tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run/REQUEUE").exists()


def test_the_marker_needs_no_room(tmp_path):
    (tmp_path / "REQUEUE").symlink_to("/dev/full")
    mark_requeue(tmp_path, "after step 3")
    (tmp_path / "REQUEUE").unlink()
    (tmp_path / "REQUEUE").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(OpenVisionError, match=r"REQUEUE .No such file or directory.: the job script will not"):
        mark_requeue(tmp_path, "after step 3")
