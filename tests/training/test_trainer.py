"""A run trains, survives interruption exactly, and refuses what it cannot do."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from openvision.cli.main import app, main
from openvision.errors import OpenVisionError
from openvision.files import read_json_lines
from openvision.planning import remedy
from openvision.recipe.schema import dump_recipe, load_recipe
from openvision.training import step
from openvision.training.checkpoint.manager import checkpoints
from openvision.training.objective import ImageTextObjective
from openvision.training.run.log import MetricsLog
from openvision.training.run.throughput import Meter
from openvision.training.trainer import Interrupted, Trainer


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def comparable(run: Path) -> list[dict]:
    """The record of a run without what depends on the clock."""
    clock = {"seconds", "images_per_second", "tflops_per_second", "data_wait", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in clock} for line in read_json_lines(run / "metrics.jsonl")]


def test_a_run_learns_and_records(tiny_run):
    lines = read_json_lines(tiny_run / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert train[-1]["step"] == 12
    assert train[-1]["loss"] < train[0]["loss"]
    assert {line["resolution"] for line in train} == {16, 32}
    assert train[0]["lr"] > 0
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all(0 <= line["top1"] <= line["top5"] <= 1 for line in evaluations)
    assert {p.name for p in (tiny_run / "model").iterdir()} == {
        "README.md",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "recipe.toml",
        "provenance.json",
    }
    provenance = json.loads((tiny_run / "model" / "provenance.json").read_text())
    assert provenance["samples_seen"] == 96
    assert len(provenance["data_manifest_sha256"]) == 64


@pytest.mark.parametrize(
    "stop_after", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow), 9]
)
def test_an_interrupted_run_goes_on_bit_for_bit(
    stop_after, tiny_recipe, shapes_folder, tiny_run, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    trainer = Trainer(tiny_recipe, shapes_folder, run)
    forward_backward = step.forward_backward

    def ask_to_stop_during_the_step(*arguments):
        if trainer.progress.step + 1 == stop_after:
            trainer.stop.ask()
        return forward_backward(*arguments)

    monkeypatch.setattr(step, "forward_backward", ask_to_stop_during_the_step)
    with pytest.raises(Interrupted, match=f"after step {stop_after}"):
        trainer.run()
    assert not (run / "model").exists()
    monkeypatch.undo()
    Trainer(tiny_recipe, shapes_folder, run).run()
    assert_same_weights(run, tiny_run)
    assert comparable(run) == comparable(tiny_run)


def test_an_interrupted_run_with_muon_goes_on_bit_for_bit(tiny_recipe, shapes_folder, tmp_path):
    optimizer = tiny_recipe.optimizer.model_copy(update={"kind": "muon"})
    recipe = tiny_recipe.model_copy(update={"optimizer": optimizer})
    Trainer(recipe, shapes_folder, tmp_path / "whole").run()
    trainer = Trainer(recipe, shapes_folder, tmp_path / "parts")
    trainer.stop.ask()
    with pytest.raises(Interrupted):
        trainer.run()
    Trainer(recipe, shapes_folder, tmp_path / "parts").run()
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_kill_9_and_the_same_command_goes_on(tiny_recipe, shapes_folder, tiny_run, tmp_path):
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(dump_recipe(tiny_recipe))
    often = "run.checkpoint_every=1"
    arguments = ["train", str(recipe), "--data", str(shapes_folder), "--run", str(run), "--set", often]
    command = [sys.executable, "-m", "openvision.cli.main", *arguments]
    # Sums depend on the number of threads: give the children as many as this process has.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        # By then the save of step 3 has begun, and therefore that of step 2 has ended.
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert checkpoints(run / "checkpoints")
    # Not in a process of its own: importing torch takes seconds.
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "resuming tiny from step" in done.output
    assert load_recipe(run / "recipe.toml") == load_recipe(recipe, [often])
    assert_same_weights(run, tiny_run)


def test_the_clock_is_stopped_where_something_is_due_only(tiny_recipe, shapes_folder, tmp_path, monkeypatch):
    """On CUDA it waits for the device. Saved every 3 and evaluated every 4 of 8 and of 4 steps."""
    trainer, pauses, paused = Trainer(tiny_recipe, shapes_folder, tmp_path / "run"), list[int](), Meter.paused

    def counted(meter: Meter) -> AbstractContextManager[None]:
        pauses.append(trainer.progress.step)
        return paused(meter)

    monkeypatch.setattr(Meter, "paused", counted)
    trainer.run()
    assert pauses == [3, 4, 6, 8, 11, 12]


def test_plain_clip_is_a_recipe_too(shapes_folder, tmp_path, tiny_recipe):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(dump_recipe(tiny_recipe))
    clip = load_recipe(recipe, ["model.decoder=none", "loss.caption=0", 'loss.texts=["alt"]'])
    Trainer(clip, shapes_folder, tmp_path / "run").run()
    last = [line for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line["kind"] == "train"][-1]
    assert last["loss"] == last["contrastive"] == last["contrastive_alt"]
    assert "caption" not in last
    assert not any(name.startswith("decoder") for name in weights(tmp_path / "run"))


def test_only_the_last_checkpoints_are_kept(tiny_run):
    assert [path.name for path in checkpoints(tiny_run / "checkpoints")] == ["step-00000011", "step-00000012"]
    assert not list((tiny_run / "checkpoints").glob(".*"))


def test_another_recipe_in_the_same_folder_is_refused(tiny_recipe, shapes_folder, tiny_run):
    with pytest.raises(OpenVisionError, match="holds a run of another recipe"):
        Trainer(tiny_recipe.model_copy(update={"seed": 1}), shapes_folder, tiny_run)


def test_missing_shards(tiny_recipe, tmp_path):
    with pytest.raises(OpenVisionError, match="train"):
        Trainer(tiny_recipe, tmp_path / "nowhere", tmp_path / "run")


def test_unwritable_run_folder(tiny_recipe, shapes_folder, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(OpenVisionError, match="cannot create folder"):
        Trainer(tiny_recipe, shapes_folder, blocker / "run")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    tiny_recipe, shapes_folder, tiny_run, tmp_path, capsys
):
    run = tmp_path / "run"
    Trainer(tiny_recipe, shapes_folder, run).run()
    newest = checkpoints(run / "checkpoints")[-1]
    shard = next(newest.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    trainer = Trainer(tiny_recipe, shapes_folder, run)
    said = capsys.readouterr().out
    assert f"checkpoint {newest.name} is damaged ({shard.name} differs from what was written" in said
    assert trainer.progress.step == 11
    assert not newest.exists()
    assert (newest.parent / f"damaged-{newest.name}").is_dir()
    trainer.run()
    assert_same_weights(run, tiny_run)


def test_a_loss_that_is_not_finite_is_refused_before_the_update(tiny_recipe, shapes_folder, tmp_path):
    trainer = Trainer(tiny_recipe, shapes_folder, tmp_path / "run")
    model = trainer.parts.model.module
    with torch.no_grad():
        model.logit_scale.fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(OpenVisionError, match=r"step 1: .*contrastive.* is not finite"):
        trainer.run()
    unchanged = [torch.equal(p, before[n]) for n, p in model.named_parameters() if n != "logit_scale"]
    assert all(unchanged)
    assert not checkpoints(tmp_path / "run" / "checkpoints")


def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is_fine(
    tiny_recipe, shapes_folder, tmp_path, monkeypatch
):
    forward_backward = step.forward_backward

    def poisoned(model, *arguments):
        losses = forward_backward(model, *arguments)
        model.module.logit_scale.grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(step, "forward_backward", poisoned)
    with pytest.raises(OpenVisionError, match=r"step 1: the gradient is not finite; nothing was updated"):
        Trainer(tiny_recipe, shapes_folder, tmp_path / "run").run()


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n{"kind": "tr')
    log = MetricsLog(path, resume_step=1)
    log.write("train", {"step": 2, "again": True})
    log.close()
    assert read_json_lines(path) == [{"kind": "train", "step": 1}, {"kind": "train", "step": 2, "again": True}]


def test_a_resumed_log_has_the_names_of_today(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "temperature": 14.0}\n')
    MetricsLog(path, resume_step=1).close()
    assert read_json_lines(path) == [{"kind": "train", "step": 1, "logit_scale": 14.0}]


def test_broken_metrics_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('nonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(OpenVisionError, match="line 1 is not JSON"):
        read_json_lines(path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_one_sentence_and_the_run_resumes_in_micro_batches(
    error, tiny_recipe, shapes_folder, tmp_path, monkeypatch, capsys
):
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(dump_recipe(tiny_recipe))
    command = ["openvision", "train", str(recipe), "--data", str(shapes_folder), "--run", str(run)]
    forward = ImageTextObjective.forward

    def hungry(self, batch, *arguments):
        if len(batch.images) == 8 and batch.images.shape[-1] == 32:
            raise error
        return forward(self, batch, *arguments)

    monkeypatch.setattr(ImageTextObjective, "forward", hungry)
    monkeypatch.setattr(remedy, "device_memory", lambda _: 2**40)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.match(r"openvision: out of memory on cpu \(.* GiB\) in stage 2, a batch of 8 at 32 px; the planner", told)
    assert "--set stages.1.micro_batches=2; the same command resumes the run with it" in told
    monkeypatch.setattr(sys, "argv", [*command, "--set", "stages.1.micro_batches=2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "resuming tiny from step 8" in capsys.readouterr().out
