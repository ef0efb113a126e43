"""Public reports about runs, checkpoints and evaluation, each tried on this package."""

import copy
import json
from pathlib import Path

import pytest

from openvision.evaluation.suites.held_out import measure_run
from openvision.evaluation.suites.run import Settings
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.training import trainer
from openvision.training.checkpoint.folders import checkpoints, read_state
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE


def short(**changes: object) -> Recipe:
    """One stage of four steps, which is evaluated and saved at its end."""
    recipe = copy.deepcopy(TINY_RECIPE)
    recipe["stages"] = [{"resolution": 32, "samples": 32, "batch_size": 8, "base_learning_rate": 0.01}]
    return parse_recipe({**recipe, **changes}, "short")


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def broken(shapes_folder, tmp_path_factory) -> Path:
    """A run whose evaluation after the last step timed out."""
    run = tmp_path_factory.mktemp("broken") / "run"

    def too_slow(*_: object) -> dict[str, float]:
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "validate", too_slow)
        with pytest.raises(RuntimeError, match="Timed out"):
            Trainer(short(), shapes_folder, run).run()
    return run


def test_the_trained_state_is_saved_before_the_last_evaluation(broken):
    """mlfoundations/open_clip#1121: the evaluation after the last step timed out, and the training was lost."""
    (newest,) = checkpoints(broken / "checkpoints")[-1:]
    assert read_state(newest).progress.step == 4
    assert lines(broken, "eval") == []


def test_the_evaluation_that_failed_is_made_up_for(broken, shapes_folder, capsys):
    """mlfoundations/open_clip#1152: after a time-out in the last evaluation the run could not be completed."""
    Trainer(short(), shapes_folder, broken).run()
    assert [line["step"] for line in lines(broken, "train")][-1] == 4
    assert [line["step"] for line in lines(broken, "eval")] == [4]
    assert (broken / "model/model.safetensors").is_file()
    weights = (broken / "model/model.safetensors").read_bytes()
    capsys.readouterr()
    # Once more: nothing is trained or measured again.
    Trainer(short(), shapes_folder, broken).run()
    assert "run tiny is finished: all 4 steps are trained" in capsys.readouterr().out
    assert [line["step"] for line in lines(broken, "eval")] == [4]
    assert (broken / "model/model.safetensors").read_bytes() == weights


def test_an_evaluation_gives_the_same_numbers_again(broken, shapes_folder):
    """tsb0601/MMVP#5: the same command gave other scores each time."""
    if not (broken / "model").is_dir():
        Trainer(short(), shapes_folder, broken).run()
    found = [measure_run(broken, None, settings=Settings(batch_size=size)).measured for size in (64, 64, 1)]
    numbers = [{name: (one["values"], one["intervals"]) for name, one in each.items()} for each in found]
    assert numbers[0] == numbers[1]
    # Nor does the batch decide, but for the rounding of probabilities.
    for name, (values, _) in numbers[0].items():
        assert numbers[2][name][0] == pytest.approx(values, abs=1e-5), name
