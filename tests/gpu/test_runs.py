"""`openvision train` on the GPU, as a person starts it: found without a flag, killed and resumed, under torchrun."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openvision.recipe.schema import Recipe, dump_recipe
from openvision.runtime import describe_device, resolve_precision
from tests.gpu.runs import ROOT, finish, losses, recipe_of, start, train_command

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "--")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def differences(run: Path, reference: Path) -> dict[str, float]:
    """Largest difference of each tensor of the trained model."""
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in theirs}


@pytest.mark.parametrize(
    ("kind", "micro_batches", "precision"),
    [("openvision", 2, "auto"), ("clip", 1, "float32"), ("openvision2", 1, "auto")],
    ids=["openvision", "clip", "openvision2"],
)
def test_kill_9_and_resume_bit_for_bit(kind, micro_batches, precision, device, shapes_folder, tmp_path):
    """With deterministic algorithms, beside a run that nothing happened to."""
    recipe = recipe_of(kind, micro_batches, precision=precision, deterministic=True)
    reference, run = tmp_path / "reference", tmp_path / "run"
    uninterrupted = start(train_command(recipe, reference, shapes_folder, device))
    command = train_command(recipe, run, shapes_folder, device)
    process = start(command)
    assert process.stdout is not None
    before = []
    for line in process.stdout:
        before.append(line)
        # By then the save of step 6 has begun, and therefore that of step 3 has ended.
        if line.startswith("step 8/"):
            process.send_signal(signal.SIGKILL)
            break
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"{''.join(before)}\n{errors}"
    resumed = finish(start(command))
    printed = finish(uninterrupted)
    where = describe_device(device, resolve_precision(precision, device), precision).partition(",")[0]
    assert where in printed.splitlines()[0]
    assert printed.startswith(f"training {kind}:")
    assert resumed.startswith(f"resuming {kind} from step ")
    assert set(differences(run, reference).values()) == {0.0}
    assert losses(run) == losses(reference)
    assert len(losses(run)) == recipe.steps


def test_one_process_of_ddp_and_of_fsdp_is_the_run_alone(device, shapes_folder, tmp_path, measured):
    """Over nccl on a GPU, over gloo on a CPU. DDP and FSDP2 sum in another order, no more."""
    plain = recipe_of("openvision", deterministic=True)
    sharded = plain.model_copy(update={"parallel": plain.parallel.model_copy(update={"mode": "fsdp"})})
    modes: dict[str, tuple[Recipe, tuple[str, ...]]] = {
        "alone": (plain, ()),
        "ddp": (plain, TORCHRUN),
        "fsdp": (sharded, TORCHRUN),
    }
    processes = {
        name: start(train_command(recipe, tmp_path / name, shapes_folder, device), launcher)
        for name, (recipe, launcher) in modes.items()
    }
    for process in processes.values():
        finish(process)
    expected = losses(tmp_path / "alone")
    assert len(expected) == plain.steps
    for mode in ("ddp", "fsdp"):
        found = losses(tmp_path / mode)
        worst = max(abs(found[step] - loss) for step, loss in expected.items())
        furthest = max(differences(tmp_path / mode, tmp_path / "alone").values())
        measured(f"{mode}: losses differ by at most {worst:.1e}, weights by {furthest:.1e}")
        assert found.keys() == expected.keys()
        assert worst < 1e-5
        assert furthest < 1e-4


COST = """
import json, sys
from pathlib import Path
from openvision.recipe.schema import load_recipe
from openvision.training.profile import profile_recipe

recipe = load_recipe(Path(sys.argv[1]), [f"run.deterministic={sys.argv[3]}"])
parts = profile_recipe(recipe, sys.argv[2], Path(sys.argv[4]), steps=10, warmup=3).parts
print(json.dumps(sum(row.milliseconds for row in parts if row.name != "data")))
"""


def test_deterministic_algorithms_at_the_size_of_a_small_encoder(device, shapes_folder, tmp_path, measured):
    """Every operation of the step has one; what they cost is measured."""
    recipe = recipe_of("openvision", precision="auto", device=str(device))
    if device.type == "cuda":
        shape = {"width": 384, "depth": 12, "mlp_dim": 1536, "heads": 6}
        towers = {name: getattr(recipe.model, name) for name in ("vision", "text", "decoder")}
        grown = {name: type(tower)(**{**vars(tower), **shape}) for name, tower in towers.items()}
        stage = recipe.stages[0].model_copy(update={"batch_size": 16, "samples": 1600})
        model = type(recipe.model)(**{**vars(recipe.model), **grown})
        recipe = recipe.model_copy(update={"model": model, "stages": (stage,)})
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(recipe))
    milliseconds = {}
    for deterministic in ("false", "true"):
        folder = tmp_path / deterministic
        folder.mkdir()
        command = [sys.executable, "-c", COST, str(path), str(shapes_folder), deterministic, str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        milliseconds[deterministic] = json.loads(done.stdout.splitlines()[-1])
    without, with_them = milliseconds.values()
    measured(f"a step takes {without:.1f} ms, with deterministic algorithms {with_them:.1f} ms")
