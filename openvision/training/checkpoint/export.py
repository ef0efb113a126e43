"""Export a checkpoint as a model folder."""

from pathlib import Path

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.models.openvision2 import build_model
from openvision.provenance import describe_run
from openvision.recipe.schema import STORED, dump_recipe, load_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.folders import (
    MANIFEST,
    DamagedCheckpointError,
    find_checkpoint,
    read_state,
    verify_beside_training,
)
from openvision.weights.folder import save_folder


def export_checkpoint(run: Path, which: str, output: Path, average: bool = False) -> None:
    """Write checkpoint "newest", "best" or a number of steps of a run as a model folder.

    `average` exports the averaged parameters (optimizer.ema). Raises OpenVisionError when the checkpoint is missing,
    damaged or has no averages, or when `output` exists.
    """
    # Takes a second to import.
    from openvision.training.checkpoint.tensors import load_parameters

    if output.exists():
        raise OpenVisionError(f"{output} exists; choose another place or remove it")
    path = find_checkpoint(run, which)
    recipe = load_recipe(run / STORED, stored=True)
    try:
        verify_beside_training(path)
        state = read_state(path)
        with torch.device("meta"):
            model: nn.Module = build_model(recipe.model_after(state.progress.stage))
        model.to_empty(device="cpu")
        load_parameters(path, model, average)
    except Exception as error:
        # `prune` removes the manifest first, and the rest under the eyes of whoever reads it.
        if not (path / MANIFEST).exists():
            raise OpenVisionError(
                f"checkpoint {path} was removed by its training meanwhile; export a newer one, or set "
                "run.checkpoints_kept higher"
            ) from error
        if isinstance(error, DamagedCheckpointError):
            raise OpenVisionError(f"checkpoint {path} is damaged: {error}; export another one with --step") from error
        raise
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
