"""Cards of models: metadata that the Hub reads, facts of the run, and nothing smuggled in by a stranger's file."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from openvision.weights.export.targets import export
from openvision.weights.load import load_checkpoint
from openvision.weights.model_card import task_of, training_sections

HEADINGS = ("## Data", "## Recipe", "## Cost", "## Evaluation", "## Limits", "## Licence")


def test_training_writes_a_card_with_what_is_known(tiny_run):
    text = (tiny_run / "model/README.md").read_text()
    card = ModelCard(text)
    known = card.data.to_dict()
    assert (known["library_name"], known["license"]) == ("openvision", "other")
    assert known["pipeline_tag"] == "zero-shot-image-classification"
    provenance = json.loads((tiny_run / "model/provenance.json").read_text())
    assert all(heading in text for heading in HEADINGS)
    assert f"`{provenance['data_manifest_sha256']}`" in text
    assert f"`{provenance['samples_seen']}` samples" in text
    assert "resolution `16`, samples `64`, batch_size `8`" in text
    assert "Not measured yet" in text
    assert "`train`" in text


def test_an_export_shows_the_evaluation_of_its_run(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    results = [{"name": "names", "values": {"top1": 0.123456, "noise": "no number"}}, "nonsense"]
    (run / "evaluation.json").write_text(json.dumps({"results": results}))
    export(load_checkpoint(run), "safetensors", tmp_path / "out")
    card = ModelCard((tmp_path / "out/README.md").read_text())
    assert "| `names` | `top1` | 0.1235 |" in card.text
    assert "no number" not in card.text
    assert "## Compared with the model it was made of" in card.text


def test_weights_without_a_record_say_so(tmp_path):
    text = training_sections({}, None)
    assert text.count("Not known") == 3
    assert "see its own card" in training_sections({"converted_from": "org/name"}, None)


@pytest.mark.parametrize("broken", ["{", "[]", '{"results": 3}', '{"results": [{"values": 3}]}'])
def test_results_that_cannot_be_read(tmp_path, broken):
    (tmp_path / "model").mkdir()
    (tmp_path / "evaluation.json").write_text(broken)
    assert "cannot be read" in training_sections({}, tmp_path / "model")


def test_texts_of_strangers_stay_on_their_line(tmp_path):
    (tmp_path / "recipe.toml").write_text('name = "a`\\n# Mine"\nstages = [{resolution = "x\\ny"}, 3]\n')
    text = training_sections({"seed": "\x1b[2J", "energy_kwh": "1\n2"}, tmp_path)
    assert "\n# Mine" not in text
    assert "\x1b" not in text
    (tmp_path / "recipe.toml").write_text("= broken")
    assert "Not known" in training_sections({}, tmp_path)


def test_tasks():
    found = [task_of(True, False), task_of(False, True), task_of(False, False)]
    assert found == ["zero-shot-image-classification", "image-to-text", "image-feature-extraction"]
