"""Warm start: what a run takes from the weights that its recipe names as `start`.

Towers that both models have are copied. Token ids mean nothing without their vocabulary, so a text tower or a decoder
comes with its tokenizer; the shape comes along when the recipe has no [model].
"""

from dataclasses import asdict

import torch
from torch import nn

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import AnyModel, ModelConfig
from openvision.models.openvision3 import OpenVision3
from openvision.text.tokenizer import Tokenizer
from openvision.weights.load import Request, load_checkpoint

_TOWERS = ("vision", "text", "decoder", "reconstruction")


def shape_of(data: JsonObject) -> None:
    """Give a recipe without [model] the shape of its `start`, in place; the last stage says the resolution.

    Raises OpenVisionError when the weights hold a vision tower alone, or cannot be read.
    """
    source = data.get("start")
    if "model" in data or not isinstance(source, str):
        return
    loaded = load_checkpoint(source)
    model = loaded.model or loaded.captioner or loaded.unified
    if model is None:
        raise OpenVisionError(
            f"start = {source!r} is a vision tower alone, so the recipe must describe the model: add [model], e.g. "
            "that of recipes/finetune.toml"
        )
    shape = model.config.to_dict()
    try:
        shape["vision"]["image_size"] = data["stages"][-1]["resolution"]
        if data["loss"]["caption"] == 0:
            shape["decoder"] = None
    except (KeyError, IndexError, TypeError):
        # The recipe's own check names what is missing.
        pass
    data["model"] = {key: value for key, value in shape.items() if value is not None}


def tokenizer_of_start(source: str, config: ModelConfig, named: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer that a run of a model takes from its start; None when no tower with ids comes from there.

    `named` is that of the recipe's `data.tokenizer`. Raises OpenVisionError when the towers were trained with another
    vocabulary, or with an unknown one and none is named.
    """
    loaded = load_checkpoint(source, Request(image_size=config.vision.image_size))
    if not (loaded.captioner if config.text is None else loaded.model or loaded.unified):
        return None
    if loaded.tokenizer is None:
        if named is None:
            raise OpenVisionError(
                f"start = {source!r} comes without its vocabulary, and no other fits its ids; name its file as "
                "data.tokenizer, e.g. bert-base-uncased's vocab.txt for released weights"
            )
        return named
    if named is not None and named.vocabulary_sha256() != loaded.tokenizer.vocabulary_sha256():
        raise OpenVisionError(
            f"start = {source!r} was trained with another vocabulary ({loaded.tokenizer.vocab_size} entries) than "
            f"data.tokenizer ({named.vocab_size}), so the same ids would be other words; leave data.tokenizer out to "
            f"take that of the weights, or start from the images alone: openvision convert {source} --vision-only"
        )
    return loaded.tokenizer


def start_from(model: AnyModel, source: str) -> list[str]:
    """Copy into `model`, in place, every tower that the checkpoint `source` and the model have in common.

    Returns the names of the towers taken: "vision", "text", "decoder", "reconstruction", and "logit_scale". A model of
    version 1 may start from a vision tower alone, one of version 2 from any vision tower. A JAX tree, which does not
    contain its resolution, takes the recipe's: no parameter depends on it. Raises OpenVisionError when a tower has
    another shape.
    """
    loaded = load_checkpoint(source, Request(image_size=model.vision.config.image_size))
    given = {OpenVision: loaded.model, OpenVision3: loaded.unified}.get(type(model), loaded.captioner)
    _copy(model.vision, loaded.vision, "vision", source)
    taken = ["vision"]
    if given is None:
        return taken
    for name in _TOWERS[1:]:
        ours, theirs = getattr(model, name, None), getattr(given, name, None)
        if ours is not None and theirs is not None:
            _copy(ours, theirs, name, source)
            taken.append(name)
    if isinstance(model, (OpenVision, OpenVision3)) and isinstance(given, type(model)):
        model.logit_scale.data.copy_(given.logit_scale.detach())
        taken.append("logit_scale")
    return taken


def describe_start(model: AnyModel, source: str, taken: list[str]) -> str:
    """One line: which towers came from `source`, and which are random."""
    fresh = [name for name in _TOWERS if getattr(model, name, None) is not None and name not in taken]
    rest = f"; initialised at random: {', '.join(fresh)}" if fresh else ""
    return f"start {source}: copied {', '.join(taken)}{rest}"


def _copy(ours: nn.Module, theirs: nn.Module, name: str, source: str) -> None:
    mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
    # A head belongs to contrastive models: a vision tower may be taken without it, or keep its own.
    names = [key for key in mine if key in given or not key.startswith("head.")]
    wrong = [key for key in names if key not in given or mine[key].shape != given[key].shape]
    deeper = [key for key in given if key not in mine and not key.startswith("head.")]
    if wrong or deeper:
        raise OpenVisionError(
            f"start = {source!r}: its {name} tower has another shape than the recipe's model.{name} "
            f"({_difference(ours, theirs) or (wrong or deeper)[0]}); copy the shape from the recipe of that model, or "
            "leave [model] out to take it over"
        )
    # No parameter's shape shows the number of heads.
    wanted, found = (tower.config.heads for tower in (ours, theirs))  # pyright: ignore[reportAttributeAccessIssue]
    if wanted != found:
        raise OpenVisionError(
            f"start = {source!r}: its {name} tower has {found} heads, the recipe's model.{name} has {wanted}; copy the "
            "shape from the recipe of that model, or leave [model] out to take it over"
        )
    with torch.no_grad():
        for key in names:
            mine[key].copy_(given[key])


def _difference(ours: nn.Module, theirs: nn.Module) -> str:
    """What differs between the shapes of two towers, e.g. "width 384, not 192"; positions need no parameters."""
    wanted, found = (asdict(tower.config) for tower in (ours, theirs))  # pyright: ignore[reportArgumentType]
    return ", ".join(
        f"{key} {found[key]}, not {wanted[key]}"
        for key in wanted
        if key != "image_size" and wanted[key] != found.get(key, wanted[key])
    )
