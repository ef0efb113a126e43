"""Checkpoints: what is written comes back, damage is noticed, a failed save changes nothing, the right ones stay."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from openvision.errors import OpenVisionError
from openvision.training.checkpoint import export
from openvision.training.checkpoint import folders as checkpoint_files
from openvision.training.checkpoint import manager as checkpoint_module
from openvision.training.checkpoint import tensors as checkpoint_tensors
from openvision.training.checkpoint.export import export_checkpoint
from openvision.training.checkpoint.folders import (
    DamagedCheckpointError,
    Progress,
    checkpoints,
    damaged,
    find_checkpoint,
    prune,
    read_state,
    step_of,
    table_of,
    verify,
    verify_all,
)
from openvision.training.checkpoint.manager import Checkpoints
from openvision.training.checkpoint.tensors import gather_state
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.update import apply_update, gradient_norm


def pair(seed: int = 0, steps: int = 2, ema: float | None = None) -> tuple[nn.Module, Adam]:
    """A small model with an optimizer that has taken some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = Adam([{"params": list(model.parameters())}])
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        apply_update(optimizer, 0.1, gradient_norm(optimizer), ema=ema)
    return model, optimizer


def write(folder, progress: Progress, **options) -> list[str]:
    said: list[str] = []
    store = Checkpoints(folder, say=said.append, **options)
    store.save(*pair(), progress)
    store.close()
    return said


def test_parameters_moments_numbers_and_progress_come_back(tmp_path):
    model, optimizer = pair(ema=0.9)
    progress = Progress(step=7, stage=1, stage_step=2, position=56, recent_losses=[1.5], best={"value": 0.5, "step": 7})
    store = Checkpoints(tmp_path)
    store.save(model, optimizer, progress)
    store.close()
    other, fresh = pair(seed=1, steps=0, ema=0.9)
    assert Checkpoints(tmp_path).restore(other, fresh) == progress
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert (
            fresh.state[ours].keys() == optimizer.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq", "average"}
        )
        assert fresh.state[ours]["step"] == 2
        assert fresh.state[ours]["exp_avg"].dtype == torch.bfloat16
        for entry in ("exp_avg", "exp_avg_sq", "average"):
            assert torch.equal(fresh.state[ours][entry], optimizer.state[theirs][entry])


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, monkeypatch):
    model, optimizer = pair()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    store = Checkpoints(tmp_path)
    progress = Progress(step=1)
    store.save(model, optimizer, progress)
    progress.step = 99
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    store.close()
    other, fresh = pair(seed=1, steps=0)
    assert Checkpoints(tmp_path).restore(other, fresh).step == 1
    assert all(torch.equal(ours, kept) for ours, kept in zip(other.parameters(), before, strict=True))


def test_no_pickle_is_written(tmp_path):
    write(tmp_path, Progress(step=1))
    (only,) = checkpoints(tmp_path)
    assert {path.suffix for path in only.iterdir()} == {".safetensors", ".json"}


def test_files_are_those_of_the_stock_writer(tmp_path, monkeypatch):
    tensors, _ = gather_state(*pair())
    monkeypatch.setattr(checkpoint_tensors, "FILE_BYTES", 64)
    checkpoint_tensors.write_tensors(tmp_path / "ours", tensors, None)
    stock = HuggingFaceStorageWriter(
        str(tmp_path / "stock"), checkpoint_tensors._files_of(tensors), save_distributed=True
    )
    dcp.save(tensors, storage_writer=stock, no_dist=True)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert len(files) > 1
    for name in files:
        with safe_open(tmp_path / "ours" / name, "pt") as ours, safe_open(tmp_path / "stock" / name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
            assert set(ours.keys()) == set(theirs.keys())
            assert all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118


def test_a_second_save_of_the_same_step_does_nothing(tmp_path):
    model, optimizer = pair()
    store = Checkpoints(tmp_path)
    store.save(model, optimizer, Progress(step=1))
    store.finish()
    made = checkpoints(tmp_path)[0].stat().st_mtime_ns
    store.save(model, optimizer, Progress(step=1))
    store.close()
    assert checkpoints(tmp_path)[0].stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["hash_file", "write_state", "write_durably", "sync_folder"])
def test_a_failed_save_keeps_the_one_before_and_is_told(name, tmp_path, monkeypatch):
    write(tmp_path, Progress(step=1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, name, full)
        said = write(tmp_path, Progress(step=2))
    assert said == [
        "checkpoint of step 2 could not be written (No space left on device); "
        "the previous one is kept and training continues"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert write(tmp_path, Progress(step=3)) == []
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1, 3]


def test_an_interrupted_save_is_cleared_away(tmp_path):
    (tmp_path / ".step-00000004.tmp").mkdir(parents=True)
    Checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_in_every_file(tmp_path):
    write(tmp_path, Progress(step=1))
    (path,) = checkpoints(tmp_path)
    assert verify(path) > 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        for broken, found in ((bytes(changed), "differs|cannot be read"), (content[:-9], "bytes|cannot be read")):
            file.write_bytes(broken)
            with pytest.raises(DamagedCheckpointError, match=found):
                verify(path)
                read_state(path)
        file.write_bytes(content)
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(DamagedCheckpointError, match="does not exist"):
        verify(path)


def test_the_one_before_a_damaged_one_is_taken(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, Progress(step=step), keep=3)
    for step in (2, 3):
        (checkpoints(tmp_path)[step - 1] / "state.json").write_text("{}")
    said: list[str] = []
    assert Checkpoints(tmp_path, say=said.append).restore(*pair(seed=1, steps=0)).step == 1
    assert [line.split(" (")[0] for line in said] == [f"checkpoint step-0000000{step} is damaged" for step in (3, 2)]
    assert [path.name for path in damaged(tmp_path)] == ["damaged-step-00000002", "damaged-step-00000003"]
    (checkpoints(tmp_path)[0] / "state.json").write_text("{}")
    with pytest.raises(OpenVisionError, match=r"all 1 checkpoints in .* are damaged"):
        Checkpoints(tmp_path, say=said.append).restore(*pair(seed=1, steps=0))


def test_another_model_is_refused_by_the_name_of_a_tensor(tmp_path):
    write(tmp_path, Progress(step=1))
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))
    with pytest.raises(OpenVisionError, match=r"another model: 0.weight has shape \(3, 4\), in the recipe \(2, 4\)"):
        Checkpoints(tmp_path).restore(model, Adam([{"params": list(model.parameters())}]))


def test_the_newest_and_the_best_are_kept(tmp_path):
    best = {"value": 0.5, "step": 2.0}
    for step in range(1, 6):
        write(tmp_path, Progress(step=step, best=best if step >= 2 else None), keep=2)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 4, 5]
    prune(tmp_path, 1, [])
    assert [step_of(path) for path in checkpoints(tmp_path)] == [5]


def test_a_run_marks_saves_and_keeps_its_best(tiny_recipe, shapes_folder, tmp_path):
    from openvision.training.trainer import Trainer

    run = tiny_recipe.run.model_copy(update={"checkpoint_best": "top1", "checkpoints_kept": 1, "evaluate_every": 1})
    trainer = Trainer(tiny_recipe.model_copy(update={"run": run}), shapes_folder, tmp_path / "run")
    trainer.run()
    best = trainer.progress.best
    assert best is not None
    assert [step_of(path) for path in checkpoints(tmp_path / "run/checkpoints")] == sorted({int(best["step"]), 12})
    assert find_checkpoint(tmp_path / "run", "best").name.endswith(f"{int(best['step']):08d}")
    assert f"best: step {int(best['step'])}" in "\n".join(table_of(tmp_path / "run"))


def test_an_unknown_metric_for_the_best_names_the_known_ones(tiny_recipe, shapes_folder, tmp_path):
    from openvision.training.trainer import Trainer

    run = tiny_recipe.run.model_copy(update={"checkpoint_best": "accuracy"})
    with pytest.raises(OpenVisionError, match=r"'accuracy' is not measured; known are .*top1"):
        Trainer(tiny_recipe.model_copy(update={"run": run}), shapes_folder, tmp_path / "run").run()


def test_minutes_bring_a_checkpoint_between_two_others(tiny_recipe, shapes_folder, tmp_path):
    from openvision.training.trainer import Trainer

    run = tiny_recipe.run.model_copy(
        update={"checkpoint_every": 100, "checkpoint_minutes": 1e-9, "checkpoints_kept": 100}
    )
    Trainer(tiny_recipe.model_copy(update={"run": run}), shapes_folder, tmp_path / "run").run()
    assert [step_of(path) for path in checkpoints(tmp_path / "run/checkpoints")] == list(range(1, 13))


def test_export_gives_the_trained_model(tiny_run, tmp_path):
    export_checkpoint(tiny_run, "newest", tmp_path / "model")
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tiny_run / "model"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    provenance = json.loads((tmp_path / "model/provenance.json").read_text())
    assert provenance["checkpoint"] == "step-00000012"
    assert len(provenance["data_manifest_sha256"]) == 64
    with pytest.raises(OpenVisionError, match="exists; choose another place"):
        export_checkpoint(tiny_run, "newest", tmp_path / "model")
    with pytest.raises(OpenVisionError, match="has no averaged parameters"):
        export_checkpoint(tiny_run, "newest", tmp_path / "other", average=True)
    assert not (tmp_path / "other").exists()


def test_an_export_whose_checkpoint_is_pruned_meanwhile_says_so(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def prune_and_read(path):
        shutil.rmtree(path)
        return read_state(path)

    monkeypatch.setattr(export, "read_state", prune_and_read)
    with pytest.raises(OpenVisionError, match=r"step-00000012 was removed by its training meanwhile; export a newer"):
        export_checkpoint(run, "newest", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_find_verify_and_list_say_what_is_wrong(tiny_run, tmp_path):
    with pytest.raises(OpenVisionError, match="has no checkpoint"):
        table_of(tmp_path)
    with pytest.raises(OpenVisionError, match=r"has no checkpoint of step 5; choose one of 11, 12"):
        find_checkpoint(tiny_run, "5")
    with pytest.raises(OpenVisionError, match="is not a checkpoint; give newest, best or a number"):
        find_checkpoint(tiny_run, "last")
    with pytest.raises(OpenVisionError, match="has no best checkpoint"):
        find_checkpoint(tiny_run, "best")
    assert [line.split(":")[0] for line in verify_all(tiny_run, "all")] == ["step-00000011", "step-00000012"]
    write(tmp_path / "checkpoints", Progress(step=1))
    (tmp_path / "checkpoints/step-00000001/state.json").write_text("{}")
    with pytest.raises(OpenVisionError, match=r"step-00000001 in .* damaged"):
        list(verify_all(tmp_path, "all"))


def _verify_while(tiny_run, tmp_path, monkeypatch, happens) -> list[str]:
    """Lines of `verify_all` when `happens(checkpoint)` as the first file of the first checkpoint is read."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    hash_file, first = checkpoint_files.hash_file, [True]

    def hash_late(path):
        if first:
            first.clear()
            happens(path.parent)
        return hash_file(path)

    monkeypatch.setattr(checkpoint_files, "hash_file", hash_late)
    return [line.partition(": ")[2].split(",")[0] for line in verify_all(run, "all")]


def test_verify_beside_a_training_that_prunes(tiny_run, tmp_path, monkeypatch):
    def prune_it(path):
        prune(path.parent, 1, [])

    assert _verify_while(tiny_run, tmp_path, monkeypatch, prune_it) == ["removed meanwhile by the training", "intact"]


def test_verify_beside_a_training_that_writes_the_step_again(tiny_run, tmp_path, monkeypatch):
    def write_again(path):
        other = shutil.copytree(path, path.with_name(".other"))
        (other / "state.json").write_text((path / "state.json").read_text() + "\n")
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["state.json"] = checkpoint_files.hash_file(other / "state.json")
        (other / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(path)
        other.rename(path)

    assert _verify_while(tiny_run, tmp_path, monkeypatch, write_again) == ["intact", "intact"]


def test_verify_beside_a_training_still_finds_damage(tiny_run, tmp_path, monkeypatch):
    def damage(path):
        (path / "state.json").write_text("{}")

    with pytest.raises(OpenVisionError, match="damaged; the run resumes"):
        _verify_while(tiny_run, tmp_path, monkeypatch, damage)


def test_evaluators_of_the_recipe_are_measured(tiny_recipe, shapes_folder, tmp_path):
    from openvision.files import read_json_lines
    from openvision.recipe.schema import dump_recipe, load_recipe
    from openvision.training.trainer import Trainer

    path = tmp_path / "recipe.toml"
    evaluator = '\n[[evaluate]]\nkind = "retrieval"\nname = "shapes"\ndata = "validation"\n'
    path.write_text(dump_recipe(tiny_recipe) + evaluator)
    recipe = load_recipe(path)
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run")
    trainer.run()
    lines = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line.get("split") == "evaluators"]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert any(name.startswith("shapes/") for name in lines[0])
