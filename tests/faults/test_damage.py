"""Runs with a full disk, damaged files, numbers that are not finite, or hung processes."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import KILLED, REQUEUE, Bench, assert_same, events

from openvision.provenance import read_sessions


def test_a_full_disk_keeps_the_previous_checkpoint(bench: Bench) -> None:
    """No room while saving: the checkpoint before is kept, training goes on, saves again when there is room."""
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


def test_a_full_disk_delays_the_metrics(bench: Bench) -> None:
    """No room for metrics.jsonl: said once, training goes on, and its lines are written when there is room."""
    run = bench.new_run()
    metrics = str(run / "metrics.jsonl")
    outcome = bench.run(run, faults={"full_file_at_step": [2, metrics], "free_file_at_step": [8, metrics]})
    assert outcome.codes == [0], outcome.log
    told = "metrics.jsonl: No space left on device; training continues, its lines are kept in memory"
    assert outcome.log.count(told) == 1, outcome.log
    assert outcome.log.count("metrics.jsonl is written again, with all that was kept") == 1
    assert_same(run, bench.reference())


def test_a_full_disk_at_the_end_leaves_no_half_model(bench: Bench) -> None:
    """No room for the trained model: one sentence, nothing half-written; the same command writes it."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"file_limit_after_training": 10_000})
    assert outcome.codes == [1], outcome.log
    assert outcome.log.count("openvision: ") == 1, outcome.log
    assert f"openvision: cannot write folder {run / 'model'}: File too large; make room" in outcome.log
    assert "Traceback" not in outcome.log
    assert not [path.name for path in run.iterdir() if "model" in path.name]
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def test_a_full_disk_still_requeues(bench: Bench) -> None:
    """SIGTERM on a full disk: the checkpoint cannot be written, which is said; exit code and REQUEUE are as ever."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"file_limit_at_step": [5, 100_000], "signal_at_step": [6, signal.SIGTERM]})
    assert outcome.codes == [REQUEUE], outcome.log
    assert "checkpoint of step 7 could not be written (File too large)" in outcome.log
    assert (run / "REQUEUE").exists()
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def test_no_more_open_files_is_one_sentence(bench: Bench) -> None:
    """Too many open files: one sentence that names the limit; the run resumes."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"descriptor_limit_at_step": 5})
    assert outcome.codes == [1], outcome.log
    assert outcome.log.count("openvision: ") == 1, outcome.log
    assert ": too many open files; raise the limit with" in outcome.log
    assert "Traceback" not in outcome.log
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def test_closed_output_stops_nothing(bench: Bench) -> None:
    """Standard output closed, as by `| head`: said on standard error, and the run is the same."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"closed_output_at_step": 4})
    assert outcome.codes == [0], outcome.log
    told = "openvision: standard output cannot be written (Broken pipe); training continues without it"
    assert outcome.log.count(told) == 1, outcome.log
    assert_same(run, bench.reference())


def test_torn_last_lines_are_repaired_on_resume(bench: Bench) -> None:
    """A crash in the middle of a line of metrics.jsonl or rejects.jsonl: the run resumes, again and again."""
    run = bench.new_run()
    for kill in (3, 7):
        assert bench.run(run, faults={"kill_at_step": kill}).codes == [KILLED]
        for name in ("metrics.jsonl", "rejects.jsonl"):
            with open(run / name, "ab") as file:
                file.write('{"kind": "train", "step": 1, "key": "caf\u00e9"'.encode()[:-2])
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def test_copies_beside_the_checkpoints_disturb_nothing(bench: Bench) -> None:
    """Folders that people copy into checkpoints/ are neither loaded nor pruned, whatever their names."""
    run = bench.new_run()
    assert bench.run(run, faults={"signal_at_step": [3, signal.SIGTERM]}).codes == [REQUEUE]
    newest = run / "checkpoints" / "step-00000004"
    names = ["step-00000004 copy", "step-best", "step-4", "step-00000004.bak", ".step-keep", "notes"]
    for name in names:
        shutil.copytree(newest, newest.with_name(name))
    # One that is renamed to look newer than all is set aside, and said.
    shutil.copytree(newest, newest.with_name("step-00000099"))
    outcome = bench.run(run)
    assert outcome.codes == [0], outcome.log
    assert "checkpoint step-00000099 is damaged (state.json is of step 4" in outcome.log
    assert all((newest.with_name(name) / "manifest.json").is_file() for name in names)
    assert_same(run, bench.reference())


@pytest.mark.slow
def test_workers_end_with_a_killed_run(bench: Bench) -> None:
    """kill -9 of a run with loader workers: no process and no shared memory is left."""
    run, log, mark = bench.new_run(), bench.folder / "workers.log", f"faults-{bench.folder.name}-workers"
    common = {"recipe": str(bench.recipe({"run.loader_workers": 2})), "data": str(bench.data), "run": str(run)}
    faults = {"hang_at_step": [3, 60.0]}
    shared = set(Path("/dev/shm").iterdir())
    process = bench.server.start("faults/scenarios:train", {**common, "faults": faults}, log, {"FAULTS_MARK": mark})
    _wait_until(lambda: log.exists() and "step 3/" in log.read_text())
    # The main process, its two workers, and the tracker of their shared memory.
    assert len(_marked(mark)) >= 3
    ours = set(Path("/dev/shm").iterdir()) - shared
    assert ours
    os.kill(process, signal.SIGKILL)
    assert bench.server.wait(process) == KILLED
    _wait_until(lambda: not _marked(mark))
    _wait_until(lambda: not any(path.exists() for path in ours))
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


@pytest.mark.slow
def test_a_lost_worker_is_one_sentence(bench: Bench) -> None:
    """A loader worker killed, as by the kernel when memory runs out: one sentence, and the run resumes."""
    run, log, mark = bench.new_run(), bench.folder / "lost-worker.log", f"faults-{bench.folder.name}-lost"
    long = {"run.loader_workers": 2, "stages.0.samples": 80_000}
    common = {"recipe": str(bench.recipe(long)), "data": str(bench.data), "run": str(run)}
    process = bench.server.start("faults/scenarios:train", common, log, {"FAULTS_MARK": mark})
    _wait_until(lambda: log.exists() and "step 3/" in log.read_text())
    workers = [each for each in _marked(mark) if b"spawn_main" in (Path("/proc") / str(each) / "cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    assert bench.server.wait(process) == 1
    assert log.read_text().count("openvision: a loader worker was lost") == 1, log.read_text()


def _marked(mark: str) -> list[int]:
    """Living processes that inherited a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            # A process that has ended and was not waited for has no environment.
            if f"FAULTS_MARK={mark}".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited two minutes in vain")


@pytest.mark.slow
def test_a_full_file_system_keeps_the_previous_checkpoint(bench: Bench) -> None:
    """A file system that is really full: the same."""
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


def _fill(path: Path) -> None:
    """Write until there is room for a little log, but for no checkpoint."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError:
            file.truncate(max(0, file.tell() - 2**17))


def test_a_damaged_checkpoint_is_set_aside(bench: Bench) -> None:
    """The newest checkpoint damaged: the one before is taken, and said so; all damaged: refused."""
    run = bench.new_run()
    assert bench.run(run, faults={"signal_at_step": [6, signal.SIGTERM]}).codes == [REQUEUE]
    newest = run / "checkpoints" / "step-00000007"
    state = newest / "state.json"
    state.write_text(state.read_text().replace('"position": 56', '"position": 48'))
    outcome = bench.run(run)
    assert outcome.codes == [0], outcome.log
    assert "checkpoint step-00000007 is damaged (state.json differs from what was written" in outcome.log
    assert_same(run, bench.reference())
    for manifest in (run / "checkpoints").glob("step-*/manifest.json"):
        manifest.write_text("{}")
    outcome = bench.run(run)
    assert outcome.codes == [1]
    assert "are damaged; restore one, or remove the folder" in outcome.log


def test_a_truncated_shard_is_refused(bench: Bench) -> None:
    """A truncated shard is refused by name, and the run goes on when it is restored."""
    data, run = bench.new_run(), bench.new_run()
    shutil.copytree(bench.data, data, dirs_exist_ok=True)
    assert bench.run(run, data=data, faults={"kill_at_step": 5}).codes == [KILLED]
    shard = next((data / "train").glob("*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    outcome = bench.run(run, data=data)
    assert outcome.codes == [1]
    assert f"{shard.name} has {len(content) // 2} bytes but its index was built from {len(content)}" in outcome.log
    shard.write_bytes(content)
    assert bench.run(run, data=data).codes == [0]
    assert_same(run, bench.reference())


def test_a_slow_loader_or_a_jumping_clock_changes_nothing(bench: Bench) -> None:
    """A loader slower than the model, and a wall clock that jumps by a day: the same run."""
    run = bench.new_run()
    outcome = bench.run(run, {"run.checkpoint_minutes": 10}, faults={"slow_loader": 0.05, "clock_jumps": 86400.0})
    assert outcome.codes == [0], outcome.log
    assert_same(run, bench.reference())
    assert 0 < read_sessions(run)[-1]["seconds"] < 3600


def _stopped(bench: Bench, faults: dict[str, int], sentence: str) -> None:
    """A run is ended by `faults` with this sentence, and goes on bit for bit without them."""
    run = bench.new_run()
    outcome = bench.run(run, faults=faults)
    assert outcome.codes == [1], outcome.log
    assert sentence in outcome.log.replace("contrastive_alt, contrastive_sentence, contrastive, ", "")
    assert "is not finite; nothing was updated" in outcome.log
    assert bench.run(run).codes == [0]
    assert_same(run, bench.reference())


def test_a_loss_that_is_not_finite_stops_before_the_update(bench: Bench) -> None:
    """A batch that is not a number: nothing is updated, exit code 1; two processes stop together."""
    _stopped(bench, {"nan_at_step": 5}, "step 6: loss, caption")
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"nan_at_step": 3}])
    assert outcome.codes == [1, 1], outcome.log
    assert outcome.log.count("openvision: step 4: ") == 1, outcome.log


def test_a_gradient_that_is_not_finite_stops_before_the_update(bench: Bench) -> None:
    """A gradient that is not a number though the loss is one: the same."""
    _stopped(bench, {"nan_gradient_at_step": 5}, "step 6: the gradient is not finite; nothing was updated")


@pytest.mark.slow
def test_loss_spikes_are_skipped_across_a_resume(bench: Bench) -> None:
    """A loss that jumps is reported, or its update left out, and a resume remembers the losses before it."""
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


def test_a_hung_process_writes_its_stack(bench: Bench) -> None:
    """A process that hangs writes its stack within the stated time."""
    run = bench.new_run()
    outcome = bench.run(run, {"run.hang_seconds": 0.5}, faults={"hang_at_step": [5, 1.5]})
    assert outcome.codes == [0], outcome.log
    report = (run / "hangs" / "process-00000.txt").read_text()
    assert "process 0 has made no progress for" in report
    assert "step 6, forward, backward and update" in report
    assert "in agree_with_fault" in report
    assert "its stack traces are in" in outcome.log


@pytest.mark.slow
def test_a_process_hung_for_good_stops_the_run(bench: Bench) -> None:
    """A process that hangs for good ends the run after parallel.step_timeout_seconds."""
    run = bench.new_run()
    changes = {"run.hang_seconds": 1.0, "parallel.step_timeout_seconds": 3.0}
    outcome = bench.run(run, changes, processes=2, faults=[{}, {"hang_at_step": [5, 30.0]}])
    assert outcome.codes[0] == 1, outcome.log
    assert "a process of this run was lost or hung (step 6" in outcome.log
    assert "in agree_with_fault" in (run / "hangs" / "process-00001.txt").read_text()
