"""Promises about processes that are killed, lost, or told to leave."""

import json
import random
import signal
from pathlib import Path
from typing import Any

from bench import KILLED, REQUEUE, STEPS, Bench, assert_same
from promise import promise


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


def _random_kills(bench: Bench, seed: int, least: int, in_a_run: int, processes: int = 1) -> str:
    """Runs with up to `in_a_run` kills each until there were `least` of them; what was seen."""
    chance, total, rounds = random.Random(seed), 0, 0
    while total < least:
        plan = [_random_fault(chance) for _ in range(in_a_run)]
        run = bench.new_run()
        total += _until_done(bench, run, plan, processes)
        assert_same(run, bench.reference(processes=processes))
        rounds += 1
    return f"{total} kills in {rounds} runs, bit-identical"


@promise("twenty kill -9 at random places of a run of one process: bit-identical")
def twenty_kills(bench: Bench) -> str:
    return _random_kills(bench, seed=20, least=20, in_a_run=7)


@promise("ten kill -9 of one of two processes at random places: bit-identical")
def ten_kills_of_two(bench: Bench) -> str:
    return _random_kills(bench, seed=10, least=10, in_a_run=5, processes=2)


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
