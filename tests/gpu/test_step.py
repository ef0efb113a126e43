"""A training step on the GPU: the numbers of the CPU, however it is executed, and no wait of the host."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openvision.recipe.schema import Recipe
from openvision.runtime import Processes, join_processes, resolve_precision
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.update import gradient_norm
from openvision.training.trainer import Trainer
from tests.gpu.runs import KINDS, Taken, recipe_of, take_steps

STEPS = 4
# Relative differences from float32 on the CPU: of losses and norms of the first step and of the last, of all gradients
# together, and of each (beside a tenth of the third of all: some are nothing but rounding).
TOLERANCES = {"float32": (2e-5, 1e-3, 1e-4, 2e-3), "bfloat16": (2e-2, 5e-2, 5e-2, 0.5)}
# (name, micro-batches, settings of [run], precisions)
WAYS = [
    ("plain", 1, {}, ("float32", "bfloat16")),
    ("gradient-caching", 2, {}, ("float32", "bfloat16")),
    ("selective", 1, {"activation_checkpointing": "selective"}, ("float32", "bfloat16")),
    ("full", 2, {"activation_checkpointing": "full"}, ("float32",)),
]
COMPILED: dict[str, dict[str, Any]] = {
    "openvision": {"precision": "float32"},
    "clip": {"precision": "bfloat16"},
    "openvision2": {"precision": "bfloat16", "activation_checkpointing": "selective"},
}


@pytest.fixture(scope="module")
def on_cpu(shapes_folder, tmp_path_factory) -> Callable[[str], Taken]:
    """Steps of a kind of model on the CPU in float32, taken once."""
    known: dict[str, Taken] = {}

    def reference(kind: str) -> Taken:
        if kind not in known:
            folder = tmp_path_factory.mktemp("cpu")
            known[kind] = take_steps(recipe_of(kind), shapes_folder, folder, torch.device("cpu"), STEPS)
        return known[kind]

    return reference


def check(taken: Taken, reference: Taken, precision: str) -> str:
    """Compare with the CPU; returns by how much the gradient differs."""
    first, last, together, each = TOLERANCES[precision]
    for found, expected, tolerance in zip(taken.numbers, reference.numbers, [first] * 2 + [last] * 2, strict=True):
        names = [name for name in expected if not _measures_the_machine(name)]
        assert {name: found[name] for name in names} == {
            name: pytest.approx(expected[name], rel=tolerance, abs=1e-7) for name in names
        }
    assert taken.gradients.keys() == reference.gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in reference.gradients.values()])
    difference = torch.cat([gradient.flatten() for gradient in taken.gradients.values()]) - whole
    assert difference.norm() <= together * whole.norm()
    for name, expected in reference.gradients.items():
        allowed = each * expected.norm() + 0.1 * together * whole.norm()
        assert (taken.gradients[name] - expected).norm() <= allowed, name
    return f"relative difference of the gradient {difference.norm() / whole.norm():.1e}"


def _measures_the_machine(name: str) -> bool:
    return name in ("images_per_second", "tflops_per_second", "data_wait", "memory_gib", "mfu")


@pytest.fixture
def _fresh_compiler(device, monkeypatch) -> Iterator[None]:
    if device.type == "cpu":
        # Compiling C++ takes minutes.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks(kind, device, on_cpu, shapes_folder, tmp_path, measured):
    recipe = recipe_of(kind, compile=True, **COMPILED[kind])
    taken = take_steps(recipe, shapes_folder, tmp_path, device, STEPS)
    measured(check(taken, on_cpu(kind), recipe.run.precision))


@pytest.mark.parametrize(
    ("micro_batches", "settings", "precision"),
    [(number, run, precision) for _, number, run, precisions in WAYS for precision in precisions],
    ids=[f"{name}-{precision}" for name, _, _, precisions in WAYS for precision in precisions],
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_the_cpu(
    kind, micro_batches, settings, precision, device, on_cpu, shapes_folder, tmp_path, measured
):
    recipe = recipe_of(kind, micro_batches, precision=precision, **settings)
    measured(check(take_steps(recipe, shapes_folder, tmp_path, device, STEPS), on_cpu(kind), precision))


def test_auto_is_bfloat16(cuda):
    assert resolve_precision("auto", cuda) == torch.bfloat16


def waiting_raises(device: torch.device) -> Callable[[int], object]:
    """From the third step on, an operation of CUDA that makes the host wait raises RuntimeError."""

    def before(number: int) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")

    return before


def steady_steps(
    recipe: Recipe, data: Path, folder: Path, device: torch.device, processes: Processes | None = None
) -> None:
    try:
        take_steps(recipe, data, folder, device, 6, waiting_raises(device), processes)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_steady_step_waits_for_nothing(kind, micro_batches, precision, device, shapes_folder, tmp_path):
    # A line of the log waits.
    recipe = recipe_of(kind, micro_batches, precision=precision, log_every=1000, activation_checkpointing="selective")
    steady_steps(recipe, shapes_folder, tmp_path, device)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_steady_step_of_a_group_waits_for_nothing(mode, micro_batches, device, shapes_folder, tmp_path, monkeypatch):
    """DDP and FSDP2 over nccl, of one process; the processes vote on the CPU, which waits for no device."""
    recipe = recipe_of("openvision", micro_batches, log_every=1000)
    recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"mode": mode})})
    # Alone it may listen at any port.
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    with join_processes(60, device=device.type) as processes:
        try:
            steady_steps(recipe, shapes_folder, tmp_path, device, processes)
        except BaseException:
            torch.distributed.destroy_process_group()
            raise


def test_a_run_synchronizes_where_something_is_due_only(device, shapes_folder, tmp_path, monkeypatch):
    """A trainer whose run saves once, at its end, and logs nothing in between: an explicit wait is one of few."""
    recipe = recipe_of("openvision", log_every=1000, checkpoint_every=1000, evaluate_every=1000)
    calls: list[int] = []
    trainer = Trainer(recipe, shapes_folder, tmp_path / "run", Processes(device=device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append(trainer.progress.step))
    trainer.run()
    assert set(calls) <= {recipe.stages[0].steps, recipe.steps}


def test_a_wait_is_found(cuda, shapes_folder, tmp_path, monkeypatch):
    def waiting(optimizer: Adam) -> Tensor:
        norm = gradient_norm(optimizer)
        norm.item()
        return norm

    monkeypatch.setattr("openvision.training.step.gradient_norm", waiting)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        steady_steps(recipe_of("clip"), shapes_folder, tmp_path, cuda)
