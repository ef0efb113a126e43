"""Runs whose processes are killed, lost or told to stop."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from bench import KILLED, REQUEUE, STEPS, Bench, assert_same


def _until_done(
    bench: Bench, run: Path, plan: list[dict[str, Any]], processes: int = 1, changes: dict[str, Any] | None = None
) -> int:
    """Start a run again and again, with the faults of the plan one after another; returns how often it was killed."""
    killed = 0
    for faults in plan:
        each = [{}] * (processes - 1) + [faults]
        outcome = bench.run(run, changes, processes, each)
        if outcome.codes[-1] == 0:
            # The fault lay behind the end of what was left.
            break
        assert outcome.codes[-1] == KILLED, outcome.log
        killed += 1
    else:
        outcome = bench.run(run, changes, processes)
    assert outcome.codes == [0] * processes, outcome.log
    return killed


def test_kill_in_a_step_a_save_and_a_load(bench: Bench) -> None:
    """kill -9 in a step, in a save and in a load: the final weights are those of the uninterrupted run."""
    run = bench.new_run()
    plan = [{"kill_at_step": 5}, {"kill_in_save": 4}, {"kill_in_load": 1}, {"kill_at_step": 9}, {"kill_in_save": 9}]
    killed = _until_done(bench, run, plan)
    assert killed == len(plan)
    assert_same(run, bench.reference())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "seed", "least", "kills_per_run"), [(1, 20, 20, 7), (2, 10, 10, 5)])
def test_random_kills(processes: int, seed: int, least: int, kills_per_run: int, bench: Bench) -> None:
    """At least `least` kill -9 of a process at random places, several in each run: bit-identical."""
    chance, total = random.Random(seed), 0
    while total < least:
        plan = [_random_fault(chance) for _ in range(kills_per_run)]
        run = bench.new_run()
        total += _until_done(bench, run, plan, processes)
        assert_same(run, bench.reference(processes=processes))


TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
VISION = {**TOWER, "patch_size": 8, "image_size": 32}
OTHER_KINDS: dict[str, dict[str, Any]] = {
    "openvision3": {
        "model": {
            "kind": "openvision3",
            "embed_dim": 16,
            "vision": {**VISION, "autoencoder": {"kind": "pixels", "channels": 48, "factor": 4, "scale": 1.0}},
            "text": {**TOWER, "vocab_size": 128, "context_length": 12},
            "decoder": {**TOWER, "vocab_size": 128, "caption_length": 24},
            "reconstruction": {**TOWER, "pixels_of": 2},
        },
        "loss": {"caption": 1.0, "texts": ["sentence"], "reconstruction": {}},
    },
    "genlip": {
        "model": {
            "kind": "genlip",
            "vision": VISION,
            "decoder": {"width": 24, "vocab_size": 128, "caption_length": 24},
        },
        "loss": {"contrastive": 0, "caption": 1.0, "texts": []},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_kills_of_the_other_kinds(kind: str, bench: Bench) -> None:
    """kill -9 in a step of each stage, in saves and in a load: the weights of the uninterrupted run."""
    run, changes = bench.new_run(), OTHER_KINDS[kind]
    plan = [{"kill_at_step": 3}, {"kill_in_save": 5}, {"kill_in_load": 1}, {"kill_at_step": 9}, {"kill_in_save": 7}]
    assert _until_done(bench, run, plan, changes=changes) == len(plan)
    assert_same(run, bench.reference(changes))


def test_kills_of_native_shapes(mixed_bench: Bench) -> None:
    """The same with batches of squares, panoramas and receipts."""
    changes = {
        f"stages.{number}.native": {"max_tokens": tokens, "buckets": [0.5, 1.0, 2.0]}
        for number, tokens in enumerate((4, 16))
    }
    run, plan = mixed_bench.new_run(), [{"kill_at_step": 3}, {"kill_in_save": 5}, {"kill_at_step": 9}]
    assert _until_done(mixed_bench, run, plan, changes=changes) == len(plan)
    assert_same(run, mixed_bench.reference(changes))


@pytest.mark.slow
def test_kill_at_every_call_of_a_save(bench: Bench) -> None:
    """kill -9 at every single call that brings a checkpoint to disk: bit-identical."""
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


def _random_fault(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(("kill_at_step", "kill_at_step", "kill_in_save", "kill_in_load"))
    return {kind: chance.randrange(STEPS) if kind == "kill_at_step" else chance.randint(1, 3 if "load" in kind else 25)}


def test_a_lost_process_ends_the_others_with_one_message(bench: Bench) -> None:
    """One of two processes killed: the other ends within seconds, with one clear message."""
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"kill_at_step": 5}])
    assert outcome.codes == [1, KILLED], outcome.log
    assert outcome.log.count("openvision: ") == 1, outcome.log
    assert "a process of this run was lost or hung (step 6, seen by process 0)" in outcome.log
    assert json.loads((run / "FAILED").read_text())["process"] == 0
    assert bench.run(run, processes=2).codes == [0, 0]
    assert not (run / "FAILED").exists()
    assert_same(run, bench.reference(processes=2))


def test_sigterm_finishes_the_step_and_requeues(bench: Bench) -> None:
    """SIGTERM: the step is finished, the state saved, exit code 75, REQUEUE in the run folder."""
    run = bench.new_run()
    outcome = bench.run(run, faults={"signal_at_step": [4, signal.SIGTERM]})
    assert outcome.codes == [REQUEUE], outcome.log
    assert "stopped after step 5" in outcome.log
    assert bench.steps(run)[-1] == 5
    assert (run / "REQUEUE").exists()
    assert bench.run(run).codes == [0]
    assert not (run / "REQUEUE").exists()
    assert_same(run, bench.reference())


def test_a_signal_to_one_process_stops_all(bench: Bench) -> None:
    """SIGUSR1 to one of two processes: both leave after the same step with 75; SIGINT leaves with 130."""
    run = bench.new_run()
    outcome = bench.run(run, processes=2, faults=[{}, {"signal_at_step": [3, signal.SIGUSR1]}])
    assert outcome.codes == [REQUEUE, REQUEUE], outcome.log
    assert bench.steps(run)[-1] == 4
    outcome = bench.run(run, processes=2, faults=[{"signal_at_step": [8, signal.SIGINT]}, {}])
    assert outcome.codes == [130, 130], outcome.log
    assert not (run / "REQUEUE").exists()
    assert bench.run(run, processes=2).codes == [0, 0]
    assert_same(run, bench.reference(processes=2))
