"""Signals before the first step, a second trainer, and losses that torchrun reports before a process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import KILLED, REQUEUE, Bench, assert_same

ROOT = Path(__file__).parents[2]


def _command(bench: Bench, name: str, run: Path) -> list[str]:
    recipe = str(bench.recipe())
    arguments = {
        "train": [recipe, "--data", str(bench.data), "--run", str(run)],
        "quickstart": ["--recipe", recipe, "--folder", str(run.parent)],
        "vlm train": [recipe, "--model", "model", "--data", "data", "--run", str(run)],
    }[name]
    return [sys.executable, "-X", "importtime", "-m", "openvision.cli.main", *name.split(), *arguments]


@pytest.mark.parametrize(
    ("command", "module", "number"),
    [
        ("train", "numpy", signal.SIGUSR1),
        ("quickstart", "rich", signal.SIGTERM),
        ("vlm train", "numpy", signal.SIGTERM),
    ],
)
def test_a_signal_during_the_imports_requeues(bench: Bench, command: str, module: str, number: signal.Signals) -> None:
    """SIGTERM and SIGUSR1 while the first modules are imported: exit code 75 and REQUEUE."""
    # The quickstart names its run folder by the recipe.
    run = bench.new_run() / bench.recipe().stem
    with subprocess.Popen(_command(bench, command, run), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            # "import time: own | total | module", printed as each is done; -X importtime is how the test sees them.
            if line.startswith("import time:") and line.rpartition("|")[2].strip().split(".")[0] == module:
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == REQUEUE, rest
    assert "before the first step" in (run / "REQUEUE").read_text()
    assert "openvision: stopped before the first step" in rest


@pytest.mark.parametrize("place", ["open_training_data", "claim_tokenizer", "build_distributed_model"])
def test_a_signal_during_the_set_up_requeues(bench: Bench, place: str) -> None:
    """A signal while the data, the tokenizer or the model is made, which may take long: 75 at once; the run resumes."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"signal_in_set_up": [place, signal.SIGTERM]})
    assert outcome.codes == [REQUEUE], outcome.log
    assert (run / "REQUEUE").exists()
    assert bench.run(run).codes == [0]
    assert not (run / "REQUEUE").exists()
    assert_same(run, bench.reference())


AFTER_THE_TRAINING = """
import os, pathlib, signal, sys, time
from openvision.training.run.startup import SignalWatch
with SignalWatch() as watch:
    watch.know_run(pathlib.Path(sys.argv[1]))
    watch.begin_training()
    watch.end_training()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    watch.begin_work("after the training")
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(60)
"""


def test_a_signal_after_the_training_requeues(tmp_path: Path) -> None:
    """Where a command goes on after its training, as the quickstart does, a signal ends it at once again."""
    command = [sys.executable, "-c", AFTER_THE_TRAINING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (REQUEUE, "alive\n"), done.stderr
    assert "after the training" in (tmp_path / "REQUEUE").read_text()


def test_a_second_trainer_is_refused(bench: Bench) -> None:
    """A run folder that is being trained: another trainer, of one or two processes, is refused and disturbs nothing."""
    run, log = bench.new_run(), bench.folder / "first.log"
    common = {"recipe": str(bench.recipe()), "data": str(bench.data), "run": str(run)}
    first = bench.server.start("faults/scenarios:train", {**common, "faults": {"hang_at_step": [3, 600.0]}}, log)
    _wait_for(log, "step 3/")
    for processes in (1, 2):
        outcome = bench.run(run, processes=processes)
        assert outcome.codes == [1] * processes, outcome.log
        assert outcome.log.count("openvision: ") == 1, outcome.log
        assert f"is being trained by another process (process {first} on" in outcome.log
    assert not (run / "FAILED").exists()
    os.kill(first, signal.SIGKILL)
    assert bench.server.wait(first) == KILLED
    # The lock went with its owner.
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def _wait_for(log: Path, text: str) -> None:
    for _ in range(3000):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("fault", [{"kill_at_step": 5}, {"kill_in_set_up": "claim_tokenizer"}])
def test_a_loss_under_torchrun_leaves_one_message(bench: Bench, lost: int, fault: dict[str, object]) -> None:
    """A process killed under torchrun, which ends the other: one message, no REQUEUE."""
    _assert_one_message(bench, 1 - lost, {lost: fault})


@pytest.mark.slow
def test_a_survivor_that_hangs_speaks_before_torchrun_kills_it(bench: Bench) -> None:
    """A process killed while the other hangs where it cannot notice: one message all the same."""
    _assert_one_message(bench, 1, {0: {"kill_at_step": 5}, 1: {"hang_at_step": [5, 100.0]}})


def _assert_one_message(bench: Bench, speaker: int, faults: dict[int, dict[str, object]]) -> None:
    run = bench.new_run()
    files = [str(bench.recipe()), str(bench.data), str(run)]
    entry = [str(Path(__file__).parent / "torchrun_entry.py"), *files, json.dumps(faults)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *entry],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert printed.count("openvision: a process of this run was lost or hung") == 1, printed
    assert json.loads((run / "FAILED").read_text())["process"] == speaker
    assert not (run / "REQUEUE").exists()
