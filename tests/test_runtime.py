"""Devices: what is there is used, what is not there is one sentence."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.recipe.schema import load_recipe
from openvision.runtime import (
    HostCopy,
    Processes,
    describe_device,
    explain_out_of_memory,
    has_tf32,
    out_of_memory_on,
    resolve_device,
    resolve_precision,
    send,
    use_deterministic_algorithms,
    use_float32_matmul,
)

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
VLM = RECIPE.parent / "vlm" / "demo.toml"


@pytest.fixture
def machine(monkeypatch, tmp_path_factory):
    """A machine with so many CUDA devices, and MPS or not."""
    chosen, tmp_path = [], tmp_path_factory.mktemp("machine")

    def build(cuda: int = 0, mps: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        # The tests may run on a machine that has one.
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: cuda > 0 or mps)
        monkeypatch.setattr("openvision.runtime.NVIDIA", tmp_path / "no card")
        monkeypatch.setattr("openvision.runtime.shutil", SimpleNamespace(which=lambda _: None))
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


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of a process that torchrun started."""

    def set_up(rank: int, size: int):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.setenv(name, str(value))

    return set_up


def test_a_process_takes_the_device_of_its_rank(machine, torchrun):
    chosen = machine(cuda=4)
    torchrun(3, 4)
    assert str(resolve_device()) == str(resolve_device("cuda")) == "cuda:3"
    assert chosen == [3, 3]


def test_one_device_by_number_is_not_for_several_processes(machine, torchrun):
    machine(cuda=4)
    torchrun(0, 2)
    with pytest.raises(OpenVisionError, match="cuda:1 is one device for 2 processes of torchrun; use cuda, which"):
        resolve_device("cuda:1")
    torchrun(0, 1)
    assert str(resolve_device("cuda:1")) == "cuda:1"


def test_processes_of_torchrun_do_not_take_mps(machine, torchrun):
    machine(mps=True)
    torchrun(0, 2)
    assert resolve_device("auto").type == "cpu"
    assert describe_device(torch.device("cpu"), torch.float32, "float32").endswith(
        ", mps is not for processes of torchrun"
    )
    # One process of torchrun exchanges tensors with itself.
    for size in (2, 1):
        torchrun(0, size)
        with pytest.raises(OpenVisionError, match=r"device mps is not for processes of torchrun: .*; start without"):
            resolve_device("mps")


def test_what_lies_idle_is_said(machine, torchrun, monkeypatch):
    machine(cuda=8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    described = describe_device(torch.device("cuda", 0), torch.float32, "float32")
    assert described.endswith("; 7 more CUDA devices are idle, torchrun --nproc-per-node 8 takes all")
    torchrun(0, 8)
    assert "idle" not in describe_device(torch.device("cuda", 0), torch.float32, "float32")
    # Two machines, and one device of this one was left out.
    monkeypatch.setenv("WORLD_SIZE", "15")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    described = describe_device(torch.device("cuda", 0), torch.float32, "float32")
    assert described.endswith("; 1 more CUDA device is idle, torchrun --nproc-per-node 8 takes all")


def test_auto_passes_over_no_accelerator_in_silence(machine, monkeypatch, tmp_path):
    def told() -> str:
        return describe_device(torch.device("cpu"), torch.float32, "float32").partition(", ")[2].partition(", ")[2]

    machine()
    assert told() == "no accelerator found"
    monkeypatch.setattr("openvision.runtime.shutil", SimpleNamespace(which=lambda _: "/usr/bin/nvidia-smi"))
    monkeypatch.setattr(torch.version, "cuda", None)
    without = "this torch is built without CUDA though the machine has an NVIDIA device"
    assert told() == without
    machine()
    monkeypatch.setattr("openvision.runtime.NVIDIA", tmp_path)
    assert told() == without
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert told() == "this torch does not find the machine's NVIDIA device; nvidia-smi tells its driver"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert told() == "no accelerator found"
    machine()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert resolve_device().type == "cpu"
    assert told() == "xpu is not supported"


def test_the_first_line_says_whether_cuda_rounds(card):
    device = card(bfloat16=True)
    assert has_tf32(device)
    assert describe_device(device, torch.float32, "float32", "high").endswith(", float32 products in TF32")
    assert describe_device(device, torch.float32, "float32", "highest").endswith(", float32 products exact")
    device = card(bfloat16=False)
    assert not has_tf32(device)
    assert describe_device(device, torch.float32, "float32", "high").endswith(", float32 products exact")
    assert "products" not in describe_device(torch.device("cpu"), torch.float32, "float32", "high")


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 1 GiB."), "cuda:1"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the accelerator"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the accelerator"),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "the accelerator"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling"), "the accelerator"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), "mps"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), "the CPU"),
        (MemoryError(), "the CPU"),
        (RuntimeError("shapes cannot be multiplied"), None),
    ],
)
def test_the_device_without_memory_is_told_from_other_errors(error, device):
    assert out_of_memory_on(error) == device
    with pytest.raises(type(error) if device is None else OpenVisionError), explain_out_of_memory(lambda: "too large"):
        raise error


def test_float32_is_one_setting_for_products_and_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    try:
        use_float32_matmul("highest")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        use_float32_matmul("high")
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before)


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


def test_more_processes_than_devices_are_refused(machine, torchrun):
    machine(cuda=2)
    torchrun(2, 3)
    with pytest.raises(OpenVisionError, match="2 CUDA devices"):
        resolve_device()


def test_the_first_line_names_device_and_precision(machine):
    machine()
    line = describe_device(torch.device("cpu"), torch.float32, "float32")
    assert line.startswith("float32 on the CPU, ")
    assert line.endswith("no accelerator found")
    machine(cuda=1)
    assert "no accelerator" not in describe_device(torch.device("cpu"), torch.bfloat16)
    assert describe_device(torch.device("mps"), torch.float32, "float32") == "float32 on mps"


@pytest.fixture
def card(machine, monkeypatch):
    """A machine with one GPU, with bfloat16 or without."""

    def build(bfloat16: bool):
        machine(cuda=1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0) if bfloat16 else (7, 5))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        # Old cards emulate it.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bfloat16 or including_emulation
        )
        return torch.device("cuda", 0)

    return build


def test_auto_is_bfloat16_where_the_device_has_it_and_the_first_line_says_why(card):
    device = card(bfloat16=True)
    assert resolve_precision("auto", device) == torch.bfloat16
    assert describe_device(device, torch.bfloat16) == "bfloat16 on a card (cuda:0) (auto: it multiplies that faster)"
    device = card(bfloat16=False)
    assert resolve_precision("auto", device) == torch.float32
    assert (
        describe_device(device, torch.float32)
        == "float32 on a card (cuda:0) (auto: it has no bfloat16 before compute capability 8.0)"
    )
    mps = torch.device("mps")
    assert resolve_precision("auto", mps) == torch.float32
    assert describe_device(mps, torch.float32) == "float32 on mps (auto: autocast on mps was never tested)"


def test_bfloat16_that_a_device_does_not_have_is_one_sentence(card):
    device = card(bfloat16=False)
    with pytest.raises(OpenVisionError, match=r"bfloat16 on a card \(cuda:0\): .*8\.0; use float32 or auto"):
        resolve_precision("bfloat16", device)
    with pytest.raises(OpenVisionError, match=r"bfloat16 on mps: .*; use float32 or auto"):
        resolve_precision("bfloat16", torch.device("mps"))
    assert resolve_precision("float32", device) == torch.float32
    # Slow on an old processor, and correct.
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16


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


class OnSecondDevice(torch.Tensor):
    """A tensor of the CPU that says it lies on a device which is not the current one."""

    is_cuda = True
    device = torch.device("cuda:1")


def test_a_copy_waits_for_the_device_of_its_tensor(monkeypatch):
    asked: list[object] = []

    class Stream:
        def __init__(self, device: object) -> None:
            asked.append(device)

        def record_event(self) -> "Stream":
            return self

        def synchronize(self) -> None:
            asked.append("waited")

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    copy = HostCopy(torch.arange(3.0).as_subclass(OnSecondDevice))
    assert copy.values() == [0, 1, 2]
    assert asked == [torch.device("cuda:1"), "waited"]


def test_what_is_on_a_device_is_not_sent_by_way_of_the_host():
    x = torch.empty(3, device="meta")
    assert send(x, x.device) is x


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


NOWHERE = "runs/nowhere/model"
COMMANDS = {
    "report": ["report", NOWHERE],
    "recaption": ["recaption", "IMAGES", "--captioner", NOWHERE, "-o", "out"],
    "recaption-report": ["recaption-report", "IMAGES", "-o", "out.html"],
    "serve": ["serve", NOWHERE],
    "autoencoder": ["autoencoder", "IMAGES", "-o", "out"],
    "train-generator": ["train-generator", NOWHERE, "IMAGES", "-o", "out"],
    "generate": ["generate", NOWHERE, "a cat", "-o", "out.png"],
    "demo": ["demo", NOWHERE],
    "bench": ["bench", NOWHERE],
    "verify": ["verify", NOWHERE],
    "data teach": ["data", "teach", str(RECIPE), "--data", "IMAGES"],
    "eval": ["eval", NOWHERE, "-o", "out"],
    "encode": ["encode", "IMAGES", "-o", "x.safetensors", "--checkpoint", NOWHERE],
    "classify": ["classify", "IMAGES/a.png", "--labels", "a,b", "--checkpoint", NOWHERE],
    "search": ["search", "IMAGES", "a", "--checkpoint", NOWHERE],
    "caption": ["caption", "IMAGES/a.png", "--checkpoint", NOWHERE],
    "vlm chat": ["vlm", "chat", NOWHERE, "IMAGES/a.png"],
    "vlm eval": ["vlm", "eval", NOWHERE, "--benchmark", "pictures", "--data", "IMAGES"],
    "vlm train": ["vlm", "train", str(VLM), "--model", NOWHERE, "--data", "IMAGES", "--run", "out"],
    "vlm demo": ["vlm", "demo", "--recipe", str(VLM), "--output", "out"],
    "vlm compare": [
        *("vlm", "compare", "--encoder", NOWHERE, "--llm", NOWHERE, "--recipe", str(VLM), "--data", "IMAGES"),
        *("--benchmark", "pictures=IMAGES", "-o", "out"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_the_device_is_checked_before_anything_is_loaded_or_written(machine, command, tmp_path, monkeypatch):
    machine()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = [word.replace("IMAGES", str(tmp_path)) for word in command]
    result = CliRunner().invoke(app, [*words, "--device", "cuda"])
    assert "device cuda is not there" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# Their --device names hardware that is planned for.
PLANS = {"plan", "vlm plan"}
# Tested above, or told by a line: the examination goes on without a device.
OTHERS = {"train", "quickstart", "profile", "doctor"}


def takers(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Names of the commands that take --device."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from takers(inner, (*path, name))
    if any("--device" in parameter.opts for parameter in command.params):
        yield " ".join(path)


def test_every_command_that_takes_a_device_is_tested_and_documented():
    found = set(takers(get_command(app))) - PLANS
    assert found == COMMANDS.keys() | OTHERS
    text = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    listed = text.partition("These commands take `--device`:")[2].partition(". ")[0]
    assert set(re.findall("`(.+?)`", listed)) == found


@pytest.mark.parametrize("name", ["encode", "classify", "search", "caption", "vlm chat"])
def test_a_checkpoint_that_is_not_there_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    words = [word.replace("IMAGES", str(tmp_path)) for word in COMMANDS[name]]
    result = CliRunner().invoke(app, words)
    assert f"checkpoint {NOWHERE} does not exist" in str(result.exception)
