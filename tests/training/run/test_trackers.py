"""Numbers reach the screen, metrics.jsonl and the trackers that are asked for; a missing library is named."""

import importlib.util
import io
import sys
import types

import pytest

from openvision.errors import OpenVisionError
from openvision.recipe.schema import Recipe
from openvision.terminal import Console
from openvision.training.run.display import TrainingDisplay, duration
from openvision.training.run.trackers import open_trackers


def with_run(recipe: Recipe, **settings) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=settings)})


def test_none_by_default(tiny_recipe, tmp_path):
    assert open_trackers(tiny_recipe, tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_every_number_and_forgets_what_is_made_again(tiny_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = with_run(tiny_recipe, tensorboard=True)
    for resume, steps in ((0, (1, 2, 3)), (2, (3,))):
        (tracker,) = open_trackers(recipe, tmp_path, resume)
        for step in steps:
            tracker.log(step, {"train/loss": 10.0 * step + resume, "train/lr": 0.5})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr"}
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 10.0), (2, 20.0), (3, 32.0)]


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_wandb_and_trackio_are_told_project_run_and_numbers(library, tiny_recipe, tmp_path, monkeypatch):
    calls: list[tuple] = []
    fake = types.ModuleType(library)
    fake.__dict__["init"] = lambda **options: calls.append(("init", options["project"], options["name"]))
    fake.__dict__["log"] = lambda values, step: calls.append(("log", step, values))
    fake.__dict__["finish"] = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, library, fake)
    (tracker,) = open_trackers(with_run(tiny_recipe, **{library: "eyes"}), tmp_path / "mine", 0)
    tracker.log(7, {"train/loss": 1.5})
    tracker.close()
    assert calls == [("init", "eyes", "mine"), ("log", 7, {"train/loss": 1.5}), ("finish",)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_library_is_named_with_its_extra(tiny_recipe, tmp_path):
    with pytest.raises(OpenVisionError, match=r"'wandb'.*openvision-encoders\[wandb\]"):
        open_trackers(with_run(tiny_recipe, wandb="eyes"), tmp_path, 0)


NUMBERS = {
    "loss": 3.25,
    "contrastive": 1.25,
    "caption": 1.0,
    "logit_scale": 14.2857,
    "lr": 0.001,
    "gradient_norm": 2.5,
    "images_per_second": 332.4,
    "tflops_per_second": 0.31,
    "data_wait": 0.02,
    "memory_gib": 1.42,
}


@pytest.mark.parametrize(("more", "share"), [({}, "0.31 TFLOP/s"), ({"mfu": 0.452}, "MFU 45.2%")])
def test_the_line_of_the_log(more, share):
    text = io.StringIO()
    with TrainingDisplay(100, Console(file=text, width=300)) as display:
        display.log(20, NUMBERS | more, 3725)
    line = text.getvalue().strip()
    assert line.startswith("step 20/100  loss 3.250  contrastive 1.250  caption 1.000  logit scale 14.29  lr 1.00e-03")
    assert line.endswith(f"332 images/s  {share}  data 2%  1.4 GiB  1:02:05 left")


def test_the_line_has_all_that_the_loss_is_made_of():
    text = io.StringIO()
    further = {"base_pooled": 0.75, "base_patches": 0.5, "base_similarity": 1.5, "dense": 0.25}
    with TrainingDisplay(100, Console(file=text, width=300)) as display:
        display.log(20, NUMBERS | further, 3725)
    shown = "caption 1.000  dense 0.250  base_pooled 0.750  base_patches 0.500  base_similarity 1.500  logit scale"
    assert shown in text.getvalue()


def test_durations_as_people_write_them():
    assert [duration(s) for s in (7, 187, 8100, 357_600)] == ["0:07", "3:07", "2:15:00", "4 d 03:20:00"]
