"""Starting from given weights: what a checkpoint holds is taken, the rest keeps its random values."""

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2
from openvision.weights.load import load_checkpoint


def start_from(model: OpenVision | OpenVision2, source: str) -> list[str]:
    """Copy into `model`, in place, every tower that the checkpoint `source` and the model have in common.

    Returns the names of the parts taken: "vision", "text", "decoder", "logit_scale". A model of version 1 may start
    from a vision tower alone, one of version 2 from any vision tower. Raises OpenVisionError when a part has another
    shape.
    """
    loaded = load_checkpoint(source)
    whole = loaded.model if isinstance(model, OpenVision) else loaded.captioner
    _copy(model.vision, loaded.vision, "vision", source)
    taken = ["vision"]
    if whole is None:
        return taken
    for name in ("text", "decoder"):
        ours, theirs = getattr(model, name, None), getattr(whole, name, None)
        if ours is not None and theirs is not None:
            _copy(ours, theirs, name, source)
            taken.append(name)
    if isinstance(model, OpenVision) and isinstance(whole, OpenVision):
        model.logit_scale.data.copy_(whole.logit_scale.detach())
        taken.append("logit_scale")
    return taken


def _copy(ours: nn.Module, theirs: nn.Module, name: str, source: str) -> None:
    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    # A head belongs to contrastive models: a vision tower may be taken without it, or keep its own.
    names = [key for key in mine if key in given or not key.startswith("head.")]
    wrong = [key for key in names if key not in given or mine[key].shape != given[key].shape]
    deeper = [key for key in given if key not in mine and not key.startswith("head.")]
    if wrong or deeper:
        raise OpenVisionError(
            f"start = {source!r}: its {name} part has another shape than the recipe's model.{name} "
            f"(first difference: {(wrong or deeper)[0]}); copy the shape from the recipe of that model"
        )
    with torch.no_grad():
        for key in names:
            mine[key].copy_(given[key])
