"""A run folder belongs to one recipe and one set of data, and remembers how it came about."""

import json
import shutil

import pytest

from openvision.errors import OpenVisionError
from openvision.recipe.schema import dump_recipe
from openvision.training.run.folder import claim_data, claim_recipe, is_claimed
from openvision.training.run.sessions import read_sessions
from openvision.training.setup.data import open_training_data
from openvision.training.setup.parts import set_up_run
from openvision.training.trainer import Trainer


def changed(recipe, section: str, **values):
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_another_recipe_is_refused_with_the_difference(tiny_recipe, tmp_path):
    assert claim_recipe(tiny_recipe, tmp_path) == []
    assert claim_recipe(tiny_recipe, tmp_path) == []
    other = changed(tiny_recipe, "optimizer", weight_decay=0.5)
    with pytest.raises(OpenVisionError, match=r"another recipe:\n  -weight_decay = 0.2\n  \+weight_decay = 0.5\n"):
        claim_recipe(other, tmp_path)
    assert claim_recipe(other, tmp_path, force=True) == ["-weight_decay = 0.2", "+weight_decay = 0.5"]
    assert claim_recipe(other, tmp_path) == []


def test_how_a_run_is_carried_out_may_change(tiny_recipe, tmp_path):
    claim_recipe(tiny_recipe, tmp_path)
    other = changed(changed(tiny_recipe, "run", checkpoint_every=7, loader_workers=2), "parallel", mode="fsdp")
    other = changed(other, "run", device="cuda:1")
    other = other.model_copy(update={"stages": tuple(s.model_copy(update={"micro_batches": 4}) for s in other.stages)})
    assert claim_recipe(other, tmp_path) == []
    assert (tmp_path / "recipe.toml").read_text() == dump_recipe(other)
    with pytest.raises(OpenVisionError, match=r"-precision = \"float32\"\n  \+precision = \"bfloat16\""):
        claim_recipe(changed(tiny_recipe, "run", precision="bfloat16"), tmp_path)


def test_a_recipe_written_before_a_key_existed_is_the_same_recipe(tiny_recipe, tmp_path):
    older = "\n".join(line for line in dump_recipe(tiny_recipe).splitlines() if not line.startswith("spike"))
    (tmp_path / "recipe.toml").write_text(older)
    assert claim_recipe(tiny_recipe, tmp_path) == []


def test_other_data_are_refused_by_the_shard(tiny_recipe, shapes_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(shapes_folder, data)
    run = tmp_path / "run"
    run.mkdir()
    described, accepted = claim_data(open_training_data(tiny_recipe.data, data, reads_synthetic=True), run)
    assert accepted == []
    assert described["sources"][0]["samples"] == 16
    assert "shards" not in described["sources"][0]
    shard = next((data / "train").glob("*.tar"))
    shutil.copy(shard, data / "train/zzz.tar")
    mixture = open_training_data(tiny_recipe.data, data, reads_synthetic=True)
    with pytest.raises(OpenVisionError, match=r"source train: shards changed, added or gone: zzz.tar"):
        claim_data(mixture, run)
    assert claim_data(mixture, run, force=True)[1]
    assert claim_data(mixture, run)[1] == []
    (run / "data.json").write_text("[]")
    with pytest.raises(OpenVisionError, match=r"data.json cannot be read"):
        claim_data(mixture, run)


def test_the_history_is_in_the_run_and_in_the_model(tiny_run):
    (session,) = read_sessions(tiny_run)
    assert session["processes"] == 1
    assert session["mode"] == "one process"
    assert (session["from_step"], session["to_step"], session["ended"]) == (0, 12, "finished")
    assert session["seed"] == 0
    assert session["libraries"]["torch"]
    assert session["machine"]["processor"]
    assert session["data"]["manifest_sha256"] == session["data_manifest_sha256"]
    assert session["seconds"] > 0
    assert "assumed" in session["energy"]["method"] or "power limit" in session["energy"]["method"]
    provenance = json.loads((tiny_run / "model/provenance.json").read_text())
    assert provenance["sessions"][0]["to_step"] == 12
    assert provenance["wall_clock_seconds"] == session["seconds"]
    assert provenance["energy_kwh"] >= 0


def test_a_second_session_is_added(tiny_recipe, shapes_folder, tmp_path):
    for force in (False, True):
        recipe = changed(tiny_recipe, "optimizer", weight_decay=0.3) if force else tiny_recipe
        Trainer(recipe, shapes_folder, tmp_path / "run", force=force)
    first, second = read_sessions(tmp_path / "run")
    assert first["accepted"] == []
    assert second["accepted"] == ["-weight_decay = 0.2", "+weight_decay = 0.3"]


def test_what_differs_from_the_commit_is_kept(tiny_run):
    (session,) = read_sessions(tiny_run)
    git = session["git"]
    if git is None or git["dirty_diff_sha256"] is None:
        assert not (tiny_run / "code").exists()
    else:
        assert (tiny_run / "code" / f"{git['dirty_diff_sha256'][:12]}.diff").stat().st_size > 0


def test_another_kind_of_device_is_said_once_and_recorded(tiny_recipe, shapes_folder, tmp_path):
    def resumed() -> list[str]:
        said: list[str] = []
        parts = set_up_run(tiny_recipe, shapes_folder, tmp_path, say=said.append)
        parts.progress.step += 1
        parts.checkpoints.save(parts.model.module, parts.optimizer, parts.progress)
        parts.checkpoints.close()
        return said

    parts = set_up_run(tiny_recipe, shapes_folder, tmp_path)
    parts.checkpoints.written_by |= {"device": "cuda", "precision": "bfloat16"}
    parts.progress.step = 1
    parts.checkpoints.save(parts.model.module, parts.optimizer, parts.progress)
    parts.checkpoints.close()
    moved = "the checkpoint was written in bfloat16 on cuda, this session continues in float32 on cpu"
    assert resumed() == [f"{moved}: allowed, and not bit-identical to a run on one kind of device"]
    assert resumed() == []
    assert [(session["device"], session["moved"]) for session in read_sessions(tmp_path)] == [
        ("cpu", None),
        ("cpu", moved),
        ("cpu", None),
    ]


def staged(recipe, batch_size: int, samples: int):
    stage = recipe.stages[1].model_copy(update={"batch_size": batch_size, "samples": samples, "warmup_samples": 0})
    return recipe.model_copy(update={"stages": (stage,)})


def test_a_start_that_fails_leaves_the_folder_to_any_recipe(tiny_recipe, shapes_folder, tmp_path, monkeypatch):
    with pytest.raises(OpenVisionError, match=r"train holds 16 images, fewer than a batch of 17: .* at most 16"):
        Trainer(staged(tiny_recipe, 17, 34), shapes_folder, tmp_path)
    assert not is_claimed(tmp_path)
    # Another vocabulary than that which the failed start may have made.
    smaller = changed(tiny_recipe, "data", vocab_size=100)
    trainer = Trainer(smaller, shapes_folder, tmp_path)
    assert trainer.parts.tokenizer.vocab_size <= 100
    assert is_claimed(tmp_path)
    # Nor does a first step that cannot be taken keep the folder.
    monkeypatch.setattr("openvision.training.trainer.Step", None)
    with pytest.raises(TypeError):
        trainer.run()
    assert not is_claimed(tmp_path)


def test_a_run_in_the_order_with_repeats_is_resumed_only_where_nothing_changes(tiny_recipe, shapes_folder, tmp_path):
    def begun(folder, batch_size: int):
        recipe = staged(tiny_recipe, batch_size, 10 * batch_size)
        parts = set_up_run(recipe, shapes_folder, folder)
        parts.progress.step = parts.progress.stage_step = 1
        parts.progress.position = batch_size
        # As a version wrote it that did not know of it.
        del parts.checkpoints.written_by["distinct"]
        parts.checkpoints.save(parts.model.module, parts.optimizer, parts.progress)
        parts.checkpoints.close()
        return recipe

    # 16 images end with every second batch of 8, and inside of batches of 7.
    set_up_run(begun(tmp_path / "8", 8), shapes_folder, tmp_path / "8").checkpoints.close()
    assert read_sessions(tmp_path / "8")[-1]["accepted"] == []
    recipe = begun(tmp_path / "7", 7)
    with pytest.raises(OpenVisionError, match="from step 1 on this one reads some samples in another order; finish"):
        set_up_run(recipe, shapes_folder, tmp_path / "7")
    set_up_run(recipe, shapes_folder, tmp_path / "7", force=True).checkpoints.close()
    assert read_sessions(tmp_path / "7")[-1]["accepted"][0].startswith("order: ")
