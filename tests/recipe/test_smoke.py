"""Every recipe runs in its smoke form, and the model that comes out can be used."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.recipe.schema import load_recipe
from openvision.recipe.smoke import prepare_smoke, smoke_recipe, write_smoke_data
from openvision.weights.folder import load_any_folder

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(
    f"{folder}/{path.stem}".lstrip("/")
    for folder in ("", "openvision", "openvision-plus", "openvision2", "clips", "distill", "beyond")
    for path in (RECIPES / folder).glob("*.toml")
)


def runs(name: str, folder: Path, *changes: str) -> None:
    run, given = folder / "run", [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(app, ["train", str(RECIPES / f"{name}.toml"), "--smoke", "--run", str(run), *given])
    assert done.exit_code == 0, done.output
    recipe = load_recipe(RECIPES / f"{name}.toml")
    model, _, provenance = load_any_folder(run / "model")
    assert isinstance(model, OpenVision2) == isinstance(recipe.model, OpenVision2Config)
    assert model.config.vision.image_size == recipe.stages[-1].resolution
    assert provenance["samples_seen"] == 2 * (1 + len(recipe.stages))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def small(*parts: str) -> list[str]:
    """Two blocks of width 64 are as good here as the many of the recipe."""
    sizes = {"width": 64, "depth": 2, "mlp_dim": 128, "heads": 2}
    return [f"model.{part}.{key}={size}" for part in parts for key, size in sizes.items()]


def test_smoke_of_small_towers(tmp_path):
    runs("openvision/ti16", tmp_path, *small("vision", "text", "decoder"))


def test_smoke_of_a_captioner(tmp_path):
    runs("openvision2/l14", tmp_path, *small("vision", "decoder"))
    # Untrained, so any words will do; what counts is that the folder can caption.
    captioner = openvision.load_captioner(tmp_path / "run" / "model")
    assert len(captioner.caption([torch.zeros(40, 40, 3, dtype=torch.uint8).numpy()], max_length=3)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    runs(name, tmp_path)


@pytest.mark.parametrize(("asked", "runs_in"), [("bfloat16", "auto"), ("float32", "float32")])
def test_no_emulated_bfloat16(asked, runs_in):
    """A recipe that asks for bfloat16 would take minutes on a processor without it."""
    recipe = load_recipe(RECIPES / "openvision" / "l14.toml", [f"run.precision={asked}"])
    assert smoke_recipe(recipe).run.precision == runs_in


def test_drawn_data_have_the_captions_the_recipe_asks_for(tmp_path):
    recipe = load_recipe(RECIPES / "openvision2" / "l14.toml", ["data.alt_key=web"])
    smoke, folder = prepare_smoke(recipe, tmp_path)
    train = ShardDataset(f"{folder}/train", smoke.data.synthetic_key, smoke.data.alt_key)
    assert smoke.data.synthetic_key == "llava_llama3_condition_True_dense_weighted_topk"
    assert train[0].alt == "a red square"
    assert str(train[0].synthetic).startswith("A square on white. The square is red.")
    before = sorted(path.stat().st_mtime_ns for path in Path(folder).rglob("*"))
    write_smoke_data(smoke, Path(folder))
    assert sorted(path.stat().st_mtime_ns for path in Path(folder).rglob("*")) == before, "drawn once"


def test_one_process_of_torchrun_draws(tmp_path, monkeypatch):
    recipe = load_recipe(RECIPES / "openvision2" / "l14.toml")
    monkeypatch.setenv("RANK", "1")
    folder = prepare_smoke(recipe, tmp_path)[1]
    assert not Path(folder).exists()
    monkeypatch.setenv("RANK", "0")
    assert Path(prepare_smoke(recipe, tmp_path)[1], "train").is_dir()


def test_data_or_smoke_but_not_both(tmp_path):
    recipe = str(RECIPES / "quickstart.toml")
    run = CliRunner().invoke
    neither = run(app, ["train", recipe, "--run", str(tmp_path / "run")])
    assert isinstance(neither.exception, OpenVisionError)
    assert "with --data, or test the recipe with --smoke" in str(neither.exception)
    both = run(app, ["train", recipe, "--smoke", "--data", "x", "--run", str(tmp_path / "run")])
    assert "leave --data out" in str(both.exception)
    assert not (tmp_path / "run").exists()
