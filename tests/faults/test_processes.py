"""The same run at other numbers of processes, in other modes, under torchrun, and with other data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from bench import REQUEUE, Bench, assert_same, losses
from grain.experimental import index_shuffle

from openvision.data.order import GlobalShuffle
from openvision.provenance import read_sessions


def test_another_recipe_or_other_data_is_refused(bench: Bench) -> None:
    """Another recipe or other data in the same run are refused with the difference; --force is recorded."""
    run = bench.new_run()
    assert bench.run(run, faults={"signal_at_step": [3, signal.SIGTERM]}).codes == [REQUEUE]
    outcome = bench.run(run, {"optimizer.weight_decay": 0.3})
    assert outcome.codes == [1]
    assert "-weight_decay = 0.2\n  +weight_decay = 0.3" in outcome.log
    data = bench.new_run()
    shutil.copytree(bench.data, data, dirs_exist_ok=True)
    shutil.copy(next((data / "train").glob("*.tar")), data / "train" / "more.tar")
    outcome = bench.run(run, data=data)
    assert outcome.codes == [1]
    assert "source train: shards changed, added or gone: more.tar" in outcome.log
    outcome = bench.run(run, {"optimizer.weight_decay": 0.3}, data=data, force=True)
    assert outcome.codes == [0], outcome.log
    accepted = read_sessions(run)[-1]["accepted"]
    assert "+weight_decay = 0.3" in accepted
    assert any("more.tar" in line for line in accepted)


@pytest.mark.slow
def test_resume_at_other_numbers_of_processes(bench: Bench) -> None:
    """2 -> 1 -> 4 processes: the same global batches in the same order, losses within 1e-5."""
    changes = {"stages.0.samples": 160, "stages.1.samples": 80, "optimizer.eps": 1e-6}
    alone = bench.new_run()
    assert bench.run(alone, changes, faults={"note_batches": str(alone / "batches")}).codes == [0]
    run = bench.new_run()
    for processes, end in ((2, 9), (1, 19), (4, None)):
        notes = [{"note_batches": str(run / f"batches-{end}-{rank}")} for rank in range(processes)]
        if end is not None:
            notes[0]["signal_at_step"] = [end, signal.SIGTERM]  # pyright: ignore[reportArgumentType]
        outcome = bench.run(run, changes, processes=processes, faults=notes)
        assert outcome.codes == [0 if end is None else REQUEUE] * processes, outcome.log
    ours, theirs = _samples(run), _samples(alone)
    assert ours == theirs
    worst = max(abs(losses(run)[step] - loss) for step, loss in losses(alone).items())
    assert len(losses(alone)) == 30
    assert worst < 1e-5
    assert [session["processes"] for session in read_sessions(run)] == [2, 1, 4]


def _samples(run: Path) -> dict[int, str]:
    """Key of the sample at every position, from what the processes noted; batches read ahead come twice, alike."""
    found: dict[int, str] = {}
    for path in run.glob("batches*"):
        for line in map(json.loads, path.read_text().splitlines()):
            for offset, key in enumerate(line["keys"]):
                assert found.setdefault(line["first"] + offset, key) == key
    return found


@pytest.mark.slow
def test_ddp_and_fsdp_agree(bench: Bench) -> None:
    """DDP and FSDP2 on two processes: losses of 30 steps within 1e-5 of one process, and of each other."""
    changes = {"stages.0.samples": 160, "stages.1.samples": 80, "optimizer.eps": 1e-6}
    alone = losses(bench.reference(changes))
    ddp = losses(bench.reference(changes, processes=2))
    fsdp = losses(bench.reference({**changes, "parallel.mode": "fsdp"}, processes=2))
    worst = max(max(abs(ddp[step] - alone[step]), abs(fsdp[step] - ddp[step])) for step in alone)
    assert len(alone) == 30
    assert worst < 1e-5


@pytest.mark.slow
def test_a_run_of_fsdp_resumes_in_ddp_and_alone(bench: Bench) -> None:
    """A run saved by FSDP2 on two processes goes on in DDP on two, and in one process."""
    run = bench.new_run()
    fault = [{"signal_at_step": [5, signal.SIGTERM]}, {}]
    assert bench.run(run, {"parallel.mode": "fsdp"}, processes=2, faults=fault).codes == [REQUEUE] * 2
    worst = 0.0
    for processes in (2, 1):
        other = bench.copy_of(run)
        assert bench.run(other, processes=processes).codes == [0] * processes
        reference = losses(bench.reference())
        worst = max(worst, *(abs(losses(other)[step] - loss) for step, loss in reference.items()))
    assert worst < 1e-4


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run(bench: Bench) -> None:
    """torchrun starts a run again by itself after a kill (elastic restart)."""
    run = bench.new_run()
    with _torchrun(bench, bench.recipe(), run, {"kill_at_step": 7}) as launcher:
        printed, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, printed
    assert [session["from_step"] > 0 for session in read_sessions(run)] == [False, True]
    assert_same(run, bench.reference(processes=2))


@pytest.mark.slow
def test_sigterm_to_torchrun(bench: Bench) -> None:
    """SIGTERM to torchrun: its processes save and leave, and REQUEUE is there though torchrun's exit code says
    nothing.
    """
    run = bench.new_run()
    recipe = bench.recipe({"stages.0.samples": 80_000, "run.checkpoint_every": 100_000})
    with _torchrun(bench, recipe, run, {}) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith("step 3/"):
                launcher.send_signal(signal.SIGTERM)
                break
        launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert (run / "REQUEUE").exists()
    (step,) = bench.steps(run)
    assert f"after step {step};" in (run / "REQUEUE").read_text()


def _torchrun(bench: Bench, recipe: Path, run: Path, faults: dict[str, int]) -> subprocess.Popen[str]:
    """Two processes under torchrun, which restarts them once; the first time one of them has `faults`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    faults_by_rank = json.dumps({"1": faults})
    files = [str(recipe), str(bench.data), str(run)]
    entry = [str(Path(__file__).parent / "torchrun_entry.py"), *files, faults_by_rank]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*launch, *entry],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.slow
def test_512_processes_cover_an_epoch_once(bench: Bench) -> None:
    """The data order of 512 processes covers an epoch of 10 million samples exactly once."""
    samples, processes, batch = 10_000_000, 512, 32_768
    order = GlobalShuffle(samples, seed=3)
    shuffle = order._samples._parents[0]  # pyright: ignore[reportAttributeAccessIssue]
    share, steps = batch // processes, -(-samples // batch)
    seen = np.zeros(samples, dtype=np.uint8)
    for rank in range(processes):
        first = np.arange(steps, dtype=np.int64)[:, None] * batch + rank * share
        positions = (first + np.arange(share)).ravel()
        positions = positions[positions < samples]
        # The shuffle under the order, called without the layers above it: they would take minutes.
        chosen = map(index_shuffle, positions.tolist(), repeat(samples - 1), repeat(shuffle._seed), repeat(4))
        seen[np.fromiter(chosen, dtype=np.int64, count=len(positions))] += 1
        place = int(positions[rank])
        assert order[place] == index_shuffle(place, samples - 1, shuffle._seed, 4)
    assert (seen == 1).all()
