"""What a run promises when something fails, each as a function that makes it fail and looks.

`SHORT` run in `make test`; all of them run in `make test-slow`, which prints a table.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import KILLED, REQUEUE, STEPS, Bench, assert_same, events, losses, weights
from grain.experimental import index_shuffle

from openvision.data.order import GlobalShuffle
from openvision.training.record import read_sessions


@dataclass(frozen=True)
class Promise:
    """A sentence, and the function that puts it to the test; it returns what was seen, in a few words."""

    says: str
    check: Callable[[Bench], str]
    short: bool

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.check.__name__


PROMISES: list[Promise] = []


def promise(says: str, short: bool = False) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Put a function on the list."""

    def add(check: Callable[[Bench], str]) -> Callable[[Bench], str]:
        PROMISES.append(Promise(says, check, short))
        return check

    return add


def _until_done(bench: Bench, run: Path, plan: list[dict[str, Any]], processes: int = 1) -> int:
    """Start a run again and again, with the faults of the plan one after another; returns how often it was killed."""
    killed = 0
    for faults in plan:
        each = [{}] * (processes - 1) + [faults]
        outcome = bench.run(run, processes=processes, faults=each)
        if outcome.codes[-1] == 0:
            # The fault lay behind the end of what was left.
            break
        assert outcome.codes[-1] == KILLED, outcome.log
        killed += 1
    else:
        outcome = bench.run(run, processes=processes)
    assert outcome.codes == [0] * processes, outcome.log
    return killed


@promise("kill -9 in a step, in a save and in a load: the final weights are those of the uninterrupted run", short=True)
def killed_anywhere(bench: Bench) -> str:
    run = bench.new_run()
    plan = [{"kill_at_step": 5}, {"kill_in_save": 4}, {"kill_in_load": 1}, {"kill_at_step": 9}, {"kill_in_save": 9}]
    killed = _until_done(bench, run, plan)
    assert killed == len(plan)
    assert_same(run, bench.reference())
    return f"{killed} kills, bit-identical"


@promise("twenty kill -9 at random places of a run of one process: bit-identical")
def twenty_kills(bench: Bench) -> str:
    chance, total, rounds = random.Random(20), 0, 0
    while total < 20:
        plan = [_random_fault(chance) for _ in range(7)]
        run = bench.new_run()
        total += _until_done(bench, run, plan)
        assert_same(run, bench.reference())
        rounds += 1
    return f"{total} kills in {rounds} runs, bit-identical"


@promise("ten kill -9 of one of two processes at random places: bit-identical")
def ten_kills_of_two(bench: Bench) -> str:
    chance, total, rounds = random.Random(10), 0, 0
    while total < 10:
        plan = [_random_fault(chance) for _ in range(5)]
        run = bench.new_run()
        total += _until_done(bench, run, plan, processes=2)
        assert_same(run, bench.reference(processes=2))
        rounds += 1
    return f"{total} kills in {rounds} runs, bit-identical"


@promise("kill -9 at every single call that brings a checkpoint to disk: bit-identical")
def killed_at_every_call_of_a_save(bench: Bench) -> str:
    begun = bench.new_run()
    assert bench.run(begun, faults={"signal_at_step": [3, signal.SIGTERM]}).codes == [REQUEUE]
    call = 0
    while True:
        call += 1
        run = bench.copy_of(begun)
        # One save, of step 6, and an end after it.
        faults = {"kill_in_save": call, "signal_at_step": [5, signal.SIGTERM]}
        code = bench.run(run, faults=faults).codes[0]
        if code == REQUEUE:
            break
        assert code == KILLED
        assert bench.steps(run), f"no checkpoint left by a kill at call {call}"
        assert bench.run(run).codes == [0]
        assert_same(run, bench.reference())
    assert call > 10
    return f"{call - 1} places, all bit-identical"


def _random_fault(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(("kill_at_step", "kill_at_step", "kill_in_save", "kill_in_load"))
    return {kind: chance.randrange(STEPS) if kind == "kill_at_step" else chance.randint(1, 3 if "load" in kind else 25)}


@promise("one of two processes killed: the other ends within seconds, with one clear message", short=True)
def lost_process(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"kill_at_step": 5}])
    assert outcome.codes == [1, KILLED], outcome.log
    assert outcome.log.count("openvision: ") == 1, outcome.log
    assert "a process of this run was lost or hung (step 6, seen by process 0)" in outcome.log
    assert json.loads((run / "FAILED").read_text())["process"] == 0
    assert bench.run(run, processes=2).codes == [0, 0]
    assert not (run / "FAILED").exists()
    assert_same(run, bench.reference(processes=2))
    return "exit code 1, one message, continued bit-identically"


@promise("SIGTERM: the step is finished, the state saved, exit code 75, REQUEUE in the run folder", short=True)
def sigterm(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, faults={"signal_at_step": [4, signal.SIGTERM]})
    assert outcome.codes == [REQUEUE], outcome.log
    assert "stopped after step 5" in outcome.log
    assert bench.steps(run)[-1] == 5
    assert (run / "REQUEUE").exists()
    assert bench.run(run).codes == [0]
    assert not (run / "REQUEUE").exists()
    assert_same(run, bench.reference())
    return "left after the step it came in, continued bit-identically"


@promise("SIGUSR1 to one of two processes: both leave after the same step with 75; SIGINT leaves with 130", short=True)
def sigusr1_to_one(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"signal_at_step": [3, signal.SIGUSR1]}])
    assert outcome.codes == [REQUEUE, REQUEUE], outcome.log
    assert bench.steps(run)[-1] == 4
    outcome = bench.run(run, processes=2, faults=[{"signal_at_step": [8, signal.SIGINT]}, {}])
    assert outcome.codes == [130, 130], outcome.log
    assert not (run / "REQUEUE").exists()
    assert bench.run(run, processes=2).codes == [0, 0]
    assert_same(run, bench.reference(processes=2))
    return "after steps 4 and 9, continued bit-identically"


@promise(
    "no room while saving: the checkpoint before is kept, training goes on, saves again when there is room", short=True
)
def full_disk(bench: Bench) -> str:
    run = bench.new_run()
    faults = {"file_limit_at_step": [5, 100_000], "free_files_at_step": 9, "kill_at_step": 11}
    outcome = bench.run(run, faults=faults)
    assert outcome.codes == [KILLED], outcome.log
    for step in (6, 8):
        assert f"checkpoint of step {step} could not be written (File too large)" in outcome.log
    assert bench.steps(run)[-1] in (4, 10), "10 may still have been on its way when the process was killed"
    assert 6 not in bench.steps(run)
    assert not [path for path in (run / "checkpoints").glob(".*") if "00000008" in path.name]
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())
    return "two saves failed by a limit on file size, continued bit-identically"


@promise("a file system that is really full: the same")
def full_file_system(bench: Bench) -> str:
    mount = bench.folder / "small"
    mount.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"not permitted to mount a small file system here: {done.stderr.strip()}")
    try:
        run = mount / "run"
        assert bench.run(run, faults={"kill_at_step": 5}).codes == [KILLED]
        kept = bench.steps(run)
        ballast = mount / "ballast"
        _fill(ballast)
        outcome = bench.run(run, faults={"kill_at_step": 9})
        assert outcome.codes == [KILLED], outcome.log
        assert "could not be written (No space left on device)" in outcome.log
        assert bench.steps(run) == kept
        ballast.unlink()
        assert bench.run(run).codes == [0]
        assert_same(run, bench.reference())
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    return "tmpfs filled to the brim, continued bit-identically"


def _fill(path: Path) -> None:
    """Write until there is room for a little log, but for no checkpoint."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError:
            file.truncate(max(0, file.tell() - 2**17))


@promise("the newest checkpoint damaged: the one before is taken, and said so; all damaged: refused", short=True)
def damaged_checkpoint(bench: Bench) -> str:
    run = bench.new_run()
    assert bench.run(run, faults={"signal_at_step": [6, signal.SIGTERM]}).codes == [REQUEUE]
    newest = run / "checkpoints" / "step-00000007"
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"position": 56', '"position": 48'))
    outcome = bench.run(run)
    assert outcome.codes == [0], outcome.log
    assert "checkpoint step-00000007 is damaged (state.json does not hold what was written" in outcome.log
    assert_same(run, bench.reference())
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    outcome = bench.run(run)
    assert outcome.codes == [1]
    assert "are damaged; restore one, or remove the folder" in outcome.log
    return "set aside, continued bit-identically"


@promise("a truncated shard is refused by name, and the run goes on when it is restored", short=True)
def truncated_shard(bench: Bench) -> str:
    data, run = bench.new_run(), bench.new_run()
    shutil.copytree(bench.data, data, dirs_exist_ok=True)
    assert bench.run(run, data=data, faults={"kill_at_step": 5}).codes == [KILLED]
    shard = next((data / "train").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    outcome = bench.run(run, data=data)
    assert outcome.codes == [1]
    assert f"{shard.name} has {len(content) // 2} bytes but its index was made from {len(content)}" in outcome.log
    shard.write_bytes(content)
    assert bench.run(run, data=data).codes == [0]
    assert_same(run, bench.reference())
    return "named, continued bit-identically"


@promise("a loader slower than the model, and a wall clock that jumps by a day: the same run", short=True)
def slow_loader_and_jumping_clock(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, {"run.checkpoint_minutes": 10}, faults={"slow_loader": 0.05, "clock_jumps": 86400.0})
    assert outcome.codes == [0], outcome.log
    assert_same(run, bench.reference())
    assert 0 < read_sessions(run)[-1]["seconds"] < 3600
    return "bit-identical, times measured on a clock that does not jump"


@promise("a batch that is not a number: nothing is updated, exit code 1; two processes stop together", short=True)
def nan_batch(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, faults={"nan_at_step": 5})
    assert outcome.codes == [1], outcome.log
    assert "step 6: loss, caption" in outcome.log.replace("contrastive_alt, contrastive_sentence, contrastive, ", "")
    assert "is not finite; nothing was updated" in outcome.log
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"nan_at_step": 3}])
    assert outcome.codes == [1, 1], outcome.log
    assert outcome.log.count("openvision: step 4: ") == 1, outcome.log
    return "stopped before the update, continued bit-identically"


@promise("a gradient that is not a number though the loss is one: the same", short=True)
def nan_gradient(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, faults={"nan_gradient_at_step": 5})
    assert outcome.codes == [1], outcome.log
    assert "step 6: the gradient is not finite; nothing was updated" in outcome.log
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())
    return "stopped before the update, continued bit-identically"


@promise("a loss that jumps is reported, or its update left out, and a resume remembers the losses before it")
def loss_jump(bench: Bench) -> str:
    many = {"stages.0.samples": 320, "guards.spikes": "skip", "guards.spike_window": 20}
    run = bench.new_run()
    outcome = bench.run(run, many, faults={"jump_at_step": [25, 50.0], "signal_at_step": [27, signal.SIGTERM]})
    assert outcome.codes == [REQUEUE], outcome.log
    assert [event["step"] for event in events(run)] == [26]
    assert "the update was skipped" in events(run)[0]["message"]
    again = bench.copy_of(run)
    for each in (run, again):
        assert bench.run(each, many, faults={"jump_at_step": [4, 50.0]}).codes == [0]
        assert [event["step"] for event in events(each)] == [26, 33]
    assert_same(run, again)
    assert json.loads((run / "model" / "provenance.json").read_text())["updates_skipped"] == 2
    return "one jump in each half of the run, both skipped and logged"


@promise("a process that hangs writes its stack within the stated time", short=True)
def hung_process(bench: Bench) -> str:
    run = bench.new_run()
    outcome = bench.run(run, {"run.hang_seconds": 0.5}, faults={"hang_at_step": [5, 1.5]})
    assert outcome.codes == [0], outcome.log
    report = (run / "hangs" / "process-00000.txt").read_text()
    assert "process 0 has made no progress for" in report
    assert "step 6, forward, backward and update" in report
    assert "in admit_with_fault" in report
    assert "its stacks are in" in outcome.log
    return "stack names the function it hung in"


@promise("a process that hangs for good ends the run after parallel.step_seconds")
def hung_for_good(bench: Bench) -> str:
    run = bench.new_run()
    changes = {"run.hang_seconds": 1.0, "parallel.step_seconds": 3.0}
    outcome = bench.run(run, changes, processes=2, faults=[{}, {"hang_at_step": [5, 30.0]}])
    assert outcome.codes[0] == 1, outcome.log
    assert "a process of this run was lost or hung (step 6" in outcome.log
    assert "in admit_with_fault" in (run / "hangs" / "process-00001.txt").read_text()
    return "the waiting process left after 3 s, both stacks written"


@promise(
    "another recipe or other data in the same run are refused with the difference; --force is recorded", short=True
)
def changed_recipe_and_data(bench: Bench) -> str:
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
    return "both differences shown, both recorded"


@promise("2 -> 1 -> 4 processes: the same global batches in the same order, losses within 1e-5")
def other_numbers_of_processes(bench: Bench) -> str:
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
    return f"{len(ours)} samples in the same order, losses of 30 steps within {worst:.1e}"


def _samples(run: Path) -> dict[int, str]:
    """Key of the sample at every position, from what the processes noted; batches read ahead come twice, alike."""
    found: dict[int, str] = {}
    for path in run.glob("batches*"):
        for line in map(json.loads, path.read_text().splitlines()):
            for offset, key in enumerate(line["keys"]):
                assert found.setdefault(line["first"] + offset, key) == key
    return found


@promise("DDP and FSDP2 on two processes: losses of 30 steps within 1e-5 of one process, and of each other")
def modes_agree(bench: Bench) -> str:
    changes = {"stages.0.samples": 160, "stages.1.samples": 80, "optimizer.eps": 1e-6}
    alone = losses(bench.reference(changes))
    ddp = losses(bench.reference(changes, processes=2))
    fsdp = losses(bench.reference({**changes, "parallel.mode": "fsdp"}, processes=2))
    worst = max(max(abs(ddp[step] - alone[step]), abs(fsdp[step] - ddp[step])) for step in alone)
    assert len(alone) == 30
    assert worst < 1e-5
    return f"within {worst:.1e}"


@promise("a run saved by FSDP2 on two processes goes on in DDP on two, and in one process")
def other_mode(bench: Bench) -> str:
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
    return f"losses within {worst:.1e}"


@promise("torchrun starts a run again by itself after a kill (elastic restart)")
def elastic_restart(bench: Bench) -> str:
    run, once = bench.new_run(), bench.folder / "killed-once"
    with _torchrun(bench, bench.recipe(), run, once) as launcher:
        printed, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, printed
    assert once.exists()
    assert [session["from_step"] > 0 for session in read_sessions(run)] == [False, True]
    assert_same(run, bench.reference(processes=2))
    return "killed once, started again by torchrun, bit-identical"


@promise(
    "SIGTERM to torchrun: its processes save and leave, and REQUEUE is there though torchrun's exit code says nothing"
)
def sigterm_to_torchrun(bench: Bench) -> str:
    run, once = bench.new_run(), bench.folder / "never-killed"
    once.touch()
    recipe = bench.recipe({"stages.0.samples": 80_000, "run.checkpoint_every": 100_000})
    with _torchrun(bench, recipe, run, once) as launcher:
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
    return f"saved at step {step}, marked for the queue"


def _torchrun(bench: Bench, recipe: Path, run: Path, once: Path) -> subprocess.Popen[str]:
    """Two processes under torchrun; one of them is killed at step 7 unless the file `once` exists."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    entry = [str(Path(__file__).parent / "torchrun_entry.py"), str(recipe), str(bench.data), str(run), str(once)]
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


@promise("the data order of 512 processes covers an epoch of 10 million samples exactly once")
def order_of_512_processes(bench: Bench) -> str:
    samples, processes, batch = 10_000_000, 512, 32_768
    order = GlobalShuffle(samples, seed=3)
    shuffle = order._samples._parents[0]
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
    return "every sample once"


def table(kept: dict[str, str]) -> str:
    """The promises and what was seen of each."""
    width = max(len(each.says) for each in PROMISES)
    lines = [f"{each.says:<{width}}  {kept.get(each.name, 'not run')}" for each in PROMISES]
    return "\n".join(["promises kept", "-" * 13, *lines])


__all__ = ["PROMISES", "Promise", "table", "weights"]
