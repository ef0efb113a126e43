"""Losses and gradients do not depend on the number of processes, nor on how the model is spread over them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openvision.errors import OpenVisionError
from openvision.runtime import SINGLE_PROCESS, join_processes

FORKS = Path(__file__).parents[2] / "faults" / "forks.py"


def load_forks():
    specification = importlib.util.spec_from_file_location("forks", FORKS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault("forks", module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step_of(tmp_path_factory):
    """(processes, the only model or None, parallel section) -> what one step of them wrote."""
    server = load_forks().ForkServer()
    known = {}

    def run(processes: int, only: str | None = None, **parallel):
        key = (processes, only, *sorted(parallel.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("step")
            arguments = {"out": str(folder / "out.safetensors"), "parallel": parallel, "only": only}
            if processes == 1:
                numbers = [server.start("training/one_step:run", arguments, folder / "log")]
            else:
                numbers = server.start_ranks("training/one_step:run", [arguments] * processes, folder)
            codes = [server.wait(number) for number in numbers]
            assert codes == [0] * processes, "".join(path.read_text() for path in folder.glob("*log"))
            known[key] = load_file(folder / "out.safetensors")
        return known[key]

    yield run
    server.close()


SPREADS = [
    pytest.param(2, {"mode": "ddp"}, None, id="ddp-2"),
    pytest.param(2, {"mode": "fsdp"}, None, id="fsdp-2"),
    # Four processes take their time on two cores, and what a second dimension adds is in any model.
    pytest.param(4, {"mode": "fsdp", "replicate": 2}, "openvision", id="fsdp-2x2-openvision"),
    pytest.param(4, {"mode": "ddp"}, None, id="ddp-4", marks=pytest.mark.slow),
    pytest.param(4, {"mode": "fsdp"}, None, id="fsdp-4", marks=pytest.mark.slow),
    pytest.param(4, {"mode": "fsdp", "replicate": 2}, None, id="fsdp-2x2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("processes", "parallel", "only"), SPREADS)
def test_one_step_is_that_of_one_process(processes, parallel, only, step_of):
    one, many = step_of(1), step_of(processes, only, **parallel)
    if only is not None:
        one = {name: value for name, value in one.items() if name.startswith(f"{only}/")}
    if parallel["mode"] == "fsdp":
        # A recipe with [dense] is refused there.
        one = {name: value for name, value in one.items() if not name.startswith("dense")}
    assert one.keys() == many.keys()
    for name, expected in one.items():
        found = many[name]
        if "/first/" in name:
            assert torch.equal(found, expected), name
        elif "/muon/parameter/" in name:
            moved = (expected - one[name.replace("muon/parameter", "first")]).abs().max().item()
            # The first update by Adam has the sign of a gradient, which for a key bias is rounding.
            share = 2.0 if name.endswith("qkv.bias") else 5e-3
            assert (found - expected).abs().max().item() <= max(share * moved, 1e-7), name
        elif name.endswith("/muon/norm"):
            assert found.item() == pytest.approx(expected.item(), rel=1e-3), name
        elif "/gradient/" in name:
            # The gradient of a key bias is zero but for rounding: a softmax does not see it.
            floor = 1e-7 if name.endswith("qkv.bias") else 0.0
            # Sums over parts of the batch are rounded once more.
            share = 1e-6 if "/1/" in name else 2e-6
            allowed = max(share * expected.abs().max().item(), floor)
            assert (found - expected).abs().max().item() <= allowed, name
        else:
            assert found.item() == pytest.approx(expected.item(), rel=2e-6, abs=1e-7), name


@pytest.mark.parametrize("model", ["openvision", "openvision2", "openvision3", "genlip"])
def test_the_batch_in_parts_has_the_same_gradient_on_two_processes(model, step_of):
    for parallel in ({"mode": "ddp"}, {"mode": "fsdp"}):
        written = step_of(2, **parallel)
        for name, expected in written.items():
            if name.startswith(f"{model}/1/gradient/"):
                found = written[name.replace("/1/", "/2/", 1)]
                scale = expected.abs().max().item()
                assert (found - expected).abs().max().item() <= max(2e-6 * scale, 1e-7), name


def test_without_torchrun_a_run_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with join_processes(start_seconds=60) as processes:
        assert processes is SINGLE_PROCESS
    assert SINGLE_PROCESS.any_rank([True, False]) == [True, False]
    assert SINGLE_PROCESS.mean([1.5]) == [1.5]
    assert SINGLE_PROCESS.broadcast("x") == "x"
    assert SINGLE_PROCESS.all_gather(3) == [3]


def test_replicas_that_do_not_divide_the_processes_are_refused(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(OpenVisionError, match=r"parallel.replicate 2 does not divide the 1 processes"),
        join_processes(start_seconds=60, replicate=2),
    ):
        pass
