"""A model folder from a checkpoint, whatever number of processes wrote it."""

from pathlib import Path

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.provenance import describe_run
from openvision.recipe.schema import dump_recipe, load_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.folders import DamagedCheckpointError, find_checkpoint, read_state, verify
from openvision.weights.folder import save_folder


def export_checkpoint(run: Path, which: str, output: Path, average: bool = False) -> None:
    """Write the checkpoint `which` ("newest", "best" or a number of steps) of a run as a model folder.

    `average` takes the averaged parameters. Raises OpenVisionError when the checkpoint is missing, damaged or has no
    average, or when `output` exists.
    """
    # Reading one takes a second of imports.
    from openvision.training.checkpoint.tensors import load_parameters

    if output.exists():
        raise OpenVisionError(f"{output} exists; choose another place or remove it")
    path = find_checkpoint(run, which)
    try:
        verify(path)
        state = read_state(path)
    except DamagedCheckpointError as error:
        raise OpenVisionError(f"checkpoint {path} is damaged: {error}; export another one with --step") from error
    recipe = load_recipe(run / "recipe.toml")
    with torch.device("meta"):
        model: nn.Module = build_model(recipe.model)
    model.to_empty(device="cpu")
    load_parameters(path, model, average)
    toml = dump_recipe(recipe)
    manifest = str(state.written_by.get("manifest_sha256", ""))
    provenance = describe_run(toml, manifest, recipe.seed, ["openvision", "checkpoint", "export"]) | {
        "samples_seen": state.progress.position,
        "training_seconds": round(state.progress.seconds, 1),
        "training_tflops": round(state.progress.tflops, 1),
        "checkpoint": path.name,
        "averaged": average,
    }
    save_folder(output, model, Tokenizer.load(run / "tokenizer"), toml, provenance)  # pyright: ignore[reportArgumentType]
