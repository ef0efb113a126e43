"""Devices: what is there is used, what is not there is one sentence."""

import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.recipe.schema import load_recipe
from openvision.runtime import (
    HostCopy,
    Processes,
    describe_device,
    resolve_device,
    resolve_precision,
    send,
    use_deterministic_algorithms,
)

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many CUDA devices, and MPS or not."""
    chosen = []

    def build(cuda: int = 0, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        return chosen

    return build


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "expected"),
    [
        (0, False, "auto", "cpu"),
        (2, True, "auto", "cuda:0"),
        (0, True, "auto", "mps"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "mps", "mps"),
    ],
)
def test_auto_takes_the_accelerator_and_a_name_what_it_says(machine, cuda, mps, name, expected):
    machine(cuda, mps)
    assert str(resolve_device(name)) == expected


def test_a_process_takes_the_device_of_its_rank(machine):
    assert str((machine(cuda=4), resolve_device("auto", local_rank=3))[1]) == "cuda:3"
    assert machine(cuda=4)[-1] == 3


def test_processes_of_torchrun_do_not_take_mps(machine, monkeypatch):
    machine(mps=True)
    monkeypatch.setenv("RANK", "0")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(
    ("cuda", "name", "message"),
    [
        (0, "cuda", "device cuda is not there: this torch finds no CUDA device; use auto or cpu"),
        (2, "cuda:7", "device cuda:7 is not there: this torch finds 2 CUDA devices, numbered from 0"),
        (0, "mps", "device mps is not there"),
        (0, "gpu", "device 'gpu' is unknown; use auto, cpu, cuda, cuda:1 or mps"),
        (0, "cuda:x", "is unknown"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(machine, cuda, name, message):
    machine(cuda)
    with pytest.raises(OpenVisionError, match=message):
        resolve_device(name)


def test_more_processes_than_devices_are_refused(machine):
    machine(cuda=2)
    with pytest.raises(OpenVisionError, match="2 CUDA devices"):
        resolve_device("auto", local_rank=2)


def test_the_first_line_names_device_and_precision(machine):
    machine()
    line = describe_device(torch.device("cpu"), torch.float32)
    assert line.startswith("float32 on the CPU, ")
    assert line.endswith("no accelerator found")
    machine(cuda=1)
    assert "no accelerator" not in describe_device(torch.device("cpu"), torch.bfloat16)
    assert describe_device(torch.device("mps"), torch.float32) == "float32 on mps"


def test_precision_of_devices_that_were_never_tried_is_float32():
    assert resolve_precision("auto", torch.device("mps")) == torch.float32


def test_a_recipe_names_its_device(tmp_path):
    recipe = RECIPE
    assert load_recipe(recipe, ['run.device="cuda:1"']).run.device == "cuda:1"
    with pytest.raises(OpenVisionError, match=r"run\.device: .*write auto, cpu, cuda"):
        load_recipe(recipe, ['run.device="tpu"'])


@pytest.mark.parametrize(
    "command",
    [
        ["train", str(RECIPE), "--run", "RUN", "--smoke"],
        ["quickstart", "--recipe", str(RECIPE), "--folder", "RUN"],
        ["profile", str(RECIPE), "--output", "RUN", "--smoke"],
    ],
)
def test_training_commands_take_a_device(machine, command, tmp_path):
    machine()
    run = tmp_path / "run"
    words = [str(run) if word == "RUN" else word for word in command]
    result = CliRunner().invoke(app, [*words, "--device", "cuda"])
    assert "device cuda is not there" in str(result.exception)


def test_tensors_of_the_cpu_stay_and_arrive():
    x = torch.arange(3.0)
    assert send(x, torch.device("cpu")) is x
    assert HostCopy(x).values() == [0, 1, 2]
    assert Processes().device.type == "cpu"


def test_deterministic_algorithms_are_switched_on_and_off(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_algorithms(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    use_deterministic_algorithms(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        use_deterministic_algorithms(False)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    assert not torch.are_deterministic_algorithms_enabled()
