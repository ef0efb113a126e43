"""What the processes of test_parallel.py do: one step of each objective on one global batch; gradients are kept."""

from typing import Any

import torch
from safetensors.torch import save_file

from openvision.data.batch import Batch
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.recipe.sections import Parallel
from openvision.runtime import Processes, full_tensor, join_processes
from openvision.training.dense import with_dense
from openvision.training.distillation import distilled, load_teachers
from openvision.training.objective import build_objective
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.randomness import SampleRandomness
from openvision.training.setup.model import build_distributed_model
from openvision.training.step import forward_backward

GLOBAL = 16
TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
VISION = {**TOWER, "patch_size": 8, "image_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "openvision": {
        "model": {
            "embed_dim": 16,
            "vision": VISION,
            "text": {**TOWER, "vocab_size": 64, "context_length": 12},
            "decoder": {**TOWER, "vocab_size": 64, "caption_length": 10},
        }
    },
    "openvision2": {
        "model": {
            "kind": "openvision2",
            "vision": VISION,
            "decoder": {**TOWER, "vocab_size": 64, "caption_length": 10},
        },
        "loss": {"contrastive": 0, "caption": 2, "texts": []},
    },
    "genlip": {
        "model": {"kind": "genlip", "vision": VISION, "decoder": {"width": 24, "vocab_size": 64, "caption_length": 10}},
        "loss": {"contrastive": 0, "caption": 2, "texts": []},
    },
    "openvision3": {
        "model": {
            "kind": "openvision3",
            "embed_dim": 16,
            "vision": {**VISION, "autoencoder": {"kind": "pixels", "channels": 48, "factor": 4, "scale": 1.0}},
            "text": {**TOWER, "vocab_size": 64, "context_length": 12},
            "decoder": {**TOWER, "vocab_size": 64, "caption_length": 10},
            "reconstruction": {**TOWER, "pixels_of": 2, "decoded_at_once": 2},
        },
        "loss": {"caption": 1, "texts": ["sentence"], "reconstruction": {}},
    },
}
MODELS["distilled"] = {
    **MODELS["openvision"],
    "teacher": [
        {"source": "any", "library": "untrained", "name": "all", "patches": 0.5, "similarity": 2.0},
        {"source": "any", "library": "untrained", "name": "grids", "pooled": 0, "patches": 1.0, "resolution": 28},
    ],
}
MODELS["sigmoid"] = {**MODELS["openvision"], "loss": {"kind": "sigmoid", "logit_scales": "per_text"}}
MODELS["dense"] = {**MODELS["openvision"], "dense": {"weight": 0.5}}
MODELS["dense_crops"] = {**MODELS["openvision"], "dense": {"kind": "crops", "weight": 0.5}}
_MASKED = {"pad_id": 0, "pool": "mean"}
MODELS["trimmed"] = {
    "model": {
        **MODELS["openvision"]["model"],
        "text": {**MODELS["openvision"]["model"]["text"], **_MASKED},
        "decoder": {**MODELS["openvision"]["model"]["decoder"], "reads_padding": False},
    },
    "run": {"trim_texts": True},
}
CASES = [(name, micro_batches) for name in MODELS for micro_batches in (2, 1)]


def recipe_of(name: str, parallel: dict[str, Any]) -> Recipe:
    """A recipe of one stage."""
    # Three patches a side are the fewest for crops.
    stage = {"resolution": 24, "samples": GLOBAL, "batch_size": GLOBAL, "base_learning_rate": 0.01, "drop_path": 0.2}
    rest = {"name": name, "data": {"train": "train", "vocab_size": 64}, "stages": [stage], "parallel": parallel}
    return parse_recipe({**MODELS[name], **rest}, name)


def batch_of(processes: Processes, context: int, trimmed: bool) -> Batch:
    """This process's rows of a global batch whose captions are of very different lengths."""
    rng = torch.Generator().manual_seed(5)
    rows = slice(processes.rank * GLOBAL // processes.size, (processes.rank + 1) * GLOBAL // processes.size)
    lengths = torch.randint(1, 11, (GLOBAL,), generator=rng).sort().values
    tensors = {
        "images": torch.randint(0, 256, (GLOBAL, 3, 24, 24), generator=rng, dtype=torch.uint8),
        "alt_ids": torch.randint(0, 64, (GLOBAL, context), generator=rng),
        "sentence_ids": torch.randint(0, 64, (GLOBAL, context), generator=rng),
        "labels": torch.randint(0, 64, (GLOBAL, 10), generator=rng),
        "label_mask": torch.arange(10) < lengths[:, None],
        "positions": torch.arange(GLOBAL),
    }
    if trimmed:
        tensors["text_lengths"] = lengths[:, None] + torch.tensor([[0, 1]])
        for name, length in zip(("alt_ids", "sentence_ids"), tensors["text_lengths"].unbind(1), strict=True):
            padding = torch.arange(context) >= length[:, None]
            padding[:, -1] = False
            tensors[name] = tensors[name].clamp(min=1).masked_fill(padding, 0)
    own = {name: tensor[rows] for name, tensor in tensors.items()}
    keys = [""] * len(own["images"])
    lengths_of_texts = own.pop("text_lengths", None)
    counts = {"rejects": (), "texts_cut": 0, "captions_missing": 0, "remarks": ()}
    return Batch(**own, keys=keys, **counts, text_lengths=lengths_of_texts)


def run(out: str, parallel: dict[str, Any], only: str | None) -> None:
    """Write initial parameters, losses and gradients of all models' cases or one's, and what Muon makes of these."""
    torch.set_num_threads(1)
    written: dict[str, torch.Tensor] = {}
    with join_processes(Parallel(**parallel).start_timeout_seconds, Parallel(**parallel).replicate) as processes:
        for name, micro_batches in CASES:
            if only not in (None, name) or (name.startswith("dense") and parallel.get("mode") == "fsdp"):
                continue
            recipe = recipe_of(name, parallel)
            taught = load_teachers(recipe.teacher or ())
            model = build_distributed_model(
                recipe.model, recipe.run, recipe.parallel, processes, recipe.seed, taught=taught, dense=recipe.dense
            )
            for parameter, value in model.full_state_dict().items():
                written[f"{name}/first/{parameter}"] = value.clone()
            optimizer = build_optimizer(model.module, recipe.optimizer)
            objective = distilled(build_objective(model, recipe.loss, 1), model, taught)
            objective = with_dense(objective, model, recipe.dense)
            batch = batch_of(processes, 12 if recipe.context_length else 0, recipe.run.trim_texts)
            randomness = SampleRandomness(0, batch.positions.numpy(), 0.2)
            losses = forward_backward(model, objective, batch, randomness, micro_batches=micro_batches)
            norms = apply_update(optimizer, 0.0, gradient_norm(optimizer), measure=True)
            assert norms is not None
            values = losses.values()
            for term, value in zip(values, processes.mean(list(values.values())), strict=True):
                written[f"{name}/{micro_batches}/loss/{term}"] = torch.tensor(value)
            for term, norm in norms.values().items():
                written[f"{name}/{micro_batches}/norm/{term}"] = torch.tensor(norm)
            for parameter, tensor in model.module.named_parameters():
                if not tensor.requires_grad:
                    continue
                assert tensor.grad is not None, parameter
                written[f"{name}/{micro_batches}/gradient/{parameter}"] = full_tensor(tensor.grad).clone()
            if micro_batches == 1:
                # The last of the model's cases: its parameters change here.
                muon = build_optimizer(model.module, recipe.optimizer.model_copy(update={"kind": "muon"}))
                norms = apply_update(muon, 1e-2, gradient_norm(muon), measure=True)
                assert norms is not None
                written[f"{name}/muon/norm"] = torch.tensor(norms.values()["update_norm"])
                for parameter, value in model.full_state_dict().items():
                    # Adam's first update of the others has the sign of gradients, which may be rounding alone.
                    if ".blocks." in parameter:
                        written[f"{name}/muon/parameter/{parameter}"] = value.clone()
        if processes.is_main:
            save_file(written, out)
