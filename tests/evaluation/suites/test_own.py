"""A run is measured and reported on its own data: the folder it was trained on, by the suite that its shards allow."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.evaluation.suites.own import suite_of_run


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "mine"
    shutil.copytree(tiny_run, folder)
    return folder


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{done.output}{done.exception}"
    return done.output


def test_a_run_is_measured_and_reported_on_its_own_data(run, shapes_folder):
    command("eval", run)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["suite"]["name"] == "own"
    assert found["data_folder"] == str(shapes_folder.resolve())
    titles = [entry["name"] for entry in found["results"]]
    assert titles == [
        f"validation, {name}"
        for name in ("names", "name retrieval", "alt-texts", "first sentences", "groups", "baselines, names")
    ]
    before = (run / "evaluation.json").read_bytes()
    # A fine-tune says what it started from.
    (run / "recipe.toml").write_text(f'start = "my-weights"\n{(run / "recipe.toml").read_text()}')
    command("report", run)
    page = (run / "report/index.html").read_text()
    assert "trained from my-weights on" in page
    assert "16 images (validation)" in page
    # Measured once.
    assert (run / "evaluation.json").read_bytes() == before


def test_a_run_without_validation_shards_names_the_remedy(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "x"\n[data]\ntrain = "train"\n')
    with pytest.raises(
        OpenVisionError, match=r"names no validation shards, .* make some with `openvision data make --ho"
    ):
        suite_of_run(tmp_path, tmp_path, "own")
    assert suite_of_run(tmp_path, tmp_path)[0].name == "heldout"
