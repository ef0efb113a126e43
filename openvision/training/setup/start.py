"""Warm start: what a run takes from the weights that its recipe names as `start`.

Towers that both models have are copied, or those of them that [warm_start] names. Token ids mean nothing without their
vocabulary, so a text tower or a decoder comes with its tokenizer; the shape comes along when the recipe has no [model].
Into another patch size, depth or vocabulary they are taken as [warm_start] says (adapt.py).
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.models.contrast import OPTIONS, Contrasting
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import AnyModel, ModelConfig
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.recipe.sections import WarmStart
from openvision.text.tokenizer import Tokenizer
from openvision.training.setup.adapt import (
    DECODER_POSITIONS,
    DECODER_ROWS,
    PATCHES,
    TEXT_POSITIONS,
    TEXT_ROWS,
    chosen_layers,
    resample_patches,
    shared_entries,
    with_entries,
    with_layers,
    with_positions,
)
from openvision.weights.load import Checkpoint, Request, load_checkpoint

# Parameters of a vision tower that a start without registers, or without an attention pool, lacks.
_OPTIONS = ("reg_token", "attn_pool.")
_TOWERS = ("vision", "text", "decoder", "reconstruction")
# The projection into the shared space, and the vocabulary of a decoder.
_HEAD = "head."
# What follows from the stages, and what only initial values, training or memory depend on.
_NO_SHAPE = {
    *("image_size", "aspects"),
    *("init", "layer_scale", "noise", "noise_relative", "pixels_of", "decoded_at_once"),
}
# Differences of two configurations that need no remark: these, and what shapes show and other notes tell.
_UNREMARKABLE = _NO_SHAPE | {"depth", "patch_size", "vocab_size", "context_length", "registers", "vision.pool"}


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
        # Native shapes are those that this recipe trains on.
        shape["vision"].pop("aspects", None)
        if data["loss"]["caption"] == 0:
            shape["decoder"] = None
    except (KeyError, IndexError, TypeError):
        # The recipe's own check names what is missing.
        pass
    # Learned numbers of the contrast follow from the recipe's own loss.
    data["model"] = {key: value for key, value in shape.items() if value is not None and key not in OPTIONS}


def tokenizer_of_start(
    source: str, config: ModelConfig, named: Tokenizer | None, warm: WarmStart | None = None
) -> Tokenizer | None:
    """The tokenizer that a run of a model takes from its start; None when no tower with ids comes from there.

    None as well when `warm` says that the recipe has a vocabulary of its own.

    `named` is that of the recipe's `data.tokenizer`. Raises OpenVisionError when the towers were trained with another
    vocabulary, or with an unknown one and none is named.
    """
    loaded = load_checkpoint(source, Request(image_size=config.vision.image_size))
    if _alike(loaded, config, warm) is None or not _takes_ids(warm):
        return None
    if warm is not None and warm.vocabulary is not None:
        if loaded.tokenizer is None:
            raise OpenVisionError(
                f"start = {source!r} comes without its vocabulary, in which no entry of another one can be found; "
                "leave warm_start.vocabulary out and name its vocabulary as data.tokenizer"
            )
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
            'take that of the weights, set warm_start.vocabulary = "by_entry" to copy what both have, or start from '
            f"the images alone: openvision convert {source} --vision-only"
        )
    return loaded.tokenizer


def start_from(
    model: AnyModel,
    source: str,
    warm: WarmStart | None = None,
    tokenizer: Tokenizer | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Copy into `model`, in place, every tower that the checkpoint `source` and the model have in common.

    `warm` may name some of them, and allows other shapes, and `note` is told what was changed for them; `tokenizer` is
    the model's, for another vocabulary. Returns the names of the towers taken: "vision", "text", "decoder",
    "reconstruction", and of the learned numbers: "logit_scale" and others of the loss. A model of version 1 may start
    from a vision tower alone, one of version 2 from any vision tower. A JAX tree, which does not contain its
    resolution, takes the recipe's: no parameter depends on it. Raises OpenVisionError when a tower has another shape,
    is named and not there, or is frozen and not filled.
    """
    loaded = load_checkpoint(source, Request(image_size=model.vision.config.image_size))
    given = _alike(loaded, model.config, warm)
    shared, unknown = None, 0
    if warm is not None and warm.vocabulary is not None and given is not None and _takes_ids(warm):
        assert tokenizer is not None
        assert loaded.tokenizer is not None
        shared = shared_entries(tokenizer, loaded.tokenizer)
        unknown = len(tokenizer.vocabulary()) - len(shared[0])
    how = _Changes(source, warm or WarmStart(), shared, unknown, note)
    wanted = [name for name in _TOWERS if how.warm.towers is None or name in how.warm.towers]
    taken, fresh = list[str](), dict[str, list[str]]()
    for name in wanted:
        ours = getattr(model, name, None)
        theirs = loaded.vision if name == "vision" else getattr(given, name, None)
        if ours is not None and theirs is not None:
            fresh[name] = how.copy(ours, theirs, name)
            taken.append(name)
        elif how.warm.towers is not None:
            raise OpenVisionError(
                f"start = {source!r} has no {name} tower for this kind of model, which warm_start.towers names"
            )
    _require_filled(how, fresh)
    if isinstance(model, (OpenVision, OpenVision3)) and isinstance(given, type(model)) and "text" in wanted:
        taken += _copy_numbers(model, given, note)
    return taken


def _require_filled(how: "_Changes", fresh: Mapping[str, list[str]]) -> None:
    """Raise OpenVisionError for a frozen tower of which more than the projection stays at its initial values.

    `fresh` are the names of these parts, for each tower that was taken.
    """
    for tower in how.warm.frozen:
        if tower == "text" and how.warm.text is not None:
            continue
        if tower not in fresh:
            left = f"has no {tower} tower for this kind of model"
        elif parts := fresh[tower]:
            left = f"leaves {', '.join(parts)} of the {tower} tower at random initial values"
        else:
            continue
        raise OpenVisionError(
            f"start = {how.source!r} {left}, where warm_start.frozen would keep it; leave {tower!r} out of "
            "warm_start.frozen, or start from weights that have it"
        )


def _copy_numbers(model: Contrasting, given: Contrasting, note: Callable[[str], None]) -> list[str]:
    """Copy logit scales and bias; returns the names of those taken.

    A logit scale means nothing in the other kind of loss: between softmax and sigmoid the initial values stay.
    """
    if (model.logit_bias is None) != (given.logit_bias is None):
        theirs, ours = ("softmax" if one.logit_bias is None else "sigmoid" for one in (given, model))
        note(f"the start's logit scale is of the {theirs} loss and means nothing in the {ours} loss")
        return []
    if model.logit_scale_sentence is not None and given.logit_scale_sentence is None:
        note("logit_scale_sentence begins at the start's logit_scale")
    if model.logit_scale_sentence is None and given.logit_scale_sentence is not None:
        note("the start's logit_scale_sentence is left out")
    numbers = {"logit_scale": model.logit_scale, **{name: getattr(model, name) for name in OPTIONS}}
    taken = {name: number for name, number in numbers.items() if number is not None}
    for name, number in taken.items():
        theirs = getattr(given, name)
        # Sentences that get a logit scale of their own begin with the one that they shared.
        number.data.copy_((given.logit_scale if theirs is None else theirs).detach())
    return list(taken)


def _alike(loaded: Checkpoint, config: ModelConfig, warm: WarmStart | None) -> AnyModel | None:
    """The whole model of a checkpoint if it is of the kind of `config`: from others only the vision tower is taken.

    So it is where the ids are those of another text tower.
    """
    if warm is not None and warm.text is not None:
        return None
    if isinstance(config, OpenVision3Config):
        return loaded.unified
    return loaded.captioner if config.text is None else loaded.model


def _takes_ids(warm: WarmStart | None) -> bool:
    """Whether a tower that reads ids of a vocabulary may be taken."""
    return warm is None or warm.towers is None or not {"text", "decoder"}.isdisjoint(warm.towers)


def describe_start(
    model: AnyModel, source: str, taken: list[str], notes: Sequence[str] = (), elsewhere: Collection[str] = ()
) -> str:
    """One line: which towers came from `source`, what was changed of them, and what has its initial values.

    Towers that are filled from `elsewhere` are left to another line.
    """
    rest = ""
    for names, how in ((_TOWERS, "initialised at random"), (("logit_scale", *OPTIONS), "at initial values")):
        there = [name for name in names if getattr(model, name, None) is not None]
        fresh = [name for name in there if name not in taken and name not in elsewhere]
        rest += f"; {how}: {', '.join(fresh)}" if fresh else ""
    changed = f" ({'; '.join(notes)})" if notes else ""
    return f"start {source}: copied {', '.join(taken)}{changed}{rest}"


@dataclass(frozen=True)
class _Changes:
    """How the towers of one checkpoint are taken."""

    source: str
    warm: WarmStart
    shared: tuple[Tensor, Tensor] | None
    """Ids of the entries that both vocabularies have; None for the same vocabulary."""
    unknown: int
    """How many entries of ours the start's vocabulary lacks."""
    note: Callable[[str], None]

    def copy(self, ours: nn.Module, theirs: nn.Module, name: str) -> list[str]:
        """Copy a tower, in place, in the shape of `ours`.

        Returns the names of the parts that keep initial values, but for its head.
        """
        mine, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
        fitted = self._fitted(ours, theirs, name, mine, given)
        depth = len(getattr(ours, "blocks", ()))
        beyond = {
            key for key in mine if key.startswith("blocks.") and key not in fitted and self.warm.layers == "first"
        }
        if beyond:
            self.note(f"{name}: blocks beyond the start's are initialised at random, of {depth}")
        # Parts beyond the paper that the start does not have at all.
        lacking = tuple(option for option in _OPTIONS if not any(key.startswith(option) for key in given))
        added = {key for key in mine if key.startswith(lacking)}
        # A head belongs to contrastive models: a vision tower may be taken without it, or keep its own.
        head = {key for key in mine if key.startswith(_HEAD) and key not in fitted}
        if added | head:
            self.note(f"{name}: {' and '.join(_parts(sorted(added | head)))} initialised at random")
        names = [key for key in mine if key not in beyond | added | head]
        wrong = [key for key in names if key not in fitted or mine[key].shape != fitted[key].shape]
        deeper = [key for key in fitted if key not in mine and not key.startswith(_HEAD)]
        if (wrong or deeper) and type(ours.config) is not type(theirs.config):
            raise OpenVisionError(
                f"start = {self.source!r}: its {name} tower is of another kind of model than the recipe's "
                f"model.{name}, and has other parameters ({(deeper or wrong)[0]}); start from weights of this kind, or "
                "leave [model] out to take over theirs"
            )
        if wrong or deeper:
            raise OpenVisionError(
                f"start = {self.source!r}: its {name} tower has another shape than the recipe's model.{name} "
                f"({_difference(ours, theirs) or (wrong or deeper)[0]}); copy the shape from the recipe of that model, "
                f"or leave [model] out to take it over{self._remedy(ours, theirs)}"
            )
        # No parameter's shape shows the number of heads. GenLIP's caption has none: its blocks are the vision tower's.
        wanted, found = (getattr(tower.config, "heads", None) for tower in (ours, theirs))
        if wanted != found:
            raise OpenVisionError(
                f"start = {self.source!r}: its {name} tower has {found} heads, the recipe's model.{name} has {wanted}; "
                "copy the shape from the recipe of that model, or leave [model] out to take it over"
            )
        if changed := _changed_meaning(ours, theirs, name):
            self.note(f"{name}: start has {changed}")
        with torch.no_grad():
            for key in names:
                mine[key].copy_(fitted[key])
        # Rows of the embedding beyond the vocabulary are read by nobody.
        rows = [f"{self.unknown} rows of token_embed"] if name == "text" and self.unknown else []
        if name == "text":
            further = ((key, mine[key].shape[-2] - given[key].shape[-2]) for key in TEXT_POSITIONS)
            rows += [f"{count} positions of {key}" for key, count in further if count > 0]
        return [*_parts([key for key in mine if key in beyond | added]), *rows]

    def _fitted(
        self, ours: nn.Module, theirs: nn.Module, name: str, mine: Mapping[str, Tensor], given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The given parameters in the depth, patch size and vocabulary of ours, where `warm` allows it."""
        fitted = dict(given)
        wanted, found = len(getattr(ours, "blocks", ())), len(getattr(theirs, "blocks", ()))
        if self.warm.layers is not None and wanted != found:
            layers = chosen_layers(wanted, found, self.warm.layers)
            fitted = with_layers(fitted, layers)
            self.note(f"{name}: {wanted} blocks are blocks {', '.join(map(str, layers))} of {found}")
        if self.warm.patches is not None and PATCHES in fitted and mine[PATCHES].shape != fitted[PATCHES].shape:
            fitted[PATCHES] = resample_patches(fitted[PATCHES], mine[PATCHES].shape[-1])
            # Of latents the filters are smaller than the patch.
            before, after = (tower.config.patch_size for tower in (theirs, ours))  # pyright: ignore[reportAttributeAccessIssue]
            self.note(f"{name}: patch filters resampled from {before} to {after} px")
        if self.shared is not None:
            for key in {"text": TEXT_ROWS, "decoder": DECODER_ROWS}.get(name, ()):
                if key in fitted and key in mine and fitted[key].shape[1:] == mine[key].shape[1:]:
                    fitted[key] = with_entries(mine[key], fitted[key], self.shared)
                    fresh = len(mine[key]) - len(self.shared[0])
                    self.note(f"{name}.{key}: {len(self.shared[0])} rows copied by entry, {fresh} fresh")
        if self.warm.context is not None:
            self._fit_positions(ours, name, mine, fitted)
        return fitted

    def _fit_positions(self, ours: nn.Module, name: str, mine: Mapping[str, Tensor], fitted: dict[str, Tensor]) -> None:
        """Bring learned positions in `fitted` to the length of ours, in place."""
        # Ids come with their class token last, but for a sentence encoder.
        last = int(name == "text" and ours.config.encoder == "openvision")  # pyright: ignore[reportAttributeAccessIssue]
        for key in {"text": TEXT_POSITIONS, "decoder": DECODER_POSITIONS}.get(name, ()):
            if key not in fitted or key not in mine or fitted[key].shape[-1] != mine[key].shape[-1]:
                continue
            wanted, found = mine[key].shape[-2], fitted[key].shape[-2]
            if wanted != found:
                fitted[key] = with_positions(mine[key], fitted[key], last)
                rest = f"{wanted - found} fresh" if wanted > found else f"{found - wanted} left out"
                self.note(f"{name}.{key}: {min(wanted, found)} positions copied, {rest}")

    def _remedy(self, ours: nn.Module, theirs: nn.Module) -> str:
        """What of [warm_start] would help."""
        wanted, found = (asdict(tower.config) for tower in (ours, theirs))  # pyright: ignore[reportArgumentType]
        ways = {
            "depth": 'warm_start.layers = "even"',
            "patch_size": 'warm_start.patches = "resample"',
            "vocab_size": 'warm_start.vocabulary = "by_entry"',
            **dict.fromkeys(("context_length", "caption_length"), 'warm_start.context = "keep"'),
        }
        needed = [way for key, way in ways.items() if wanted.get(key) != found.get(key)]
        return f", or set {' and '.join(needed)}" if needed else ""


def _parts(names: Sequence[str]) -> list[str]:
    """Names of parameters of a tower by the part they belong to: a block, or a module of the tower."""
    parts = (name.split(".")[: 2 if name.startswith("blocks.") else 1] for name in names)
    return list(dict.fromkeys(".".join(part) for part in parts))


def _changed_meaning(ours: nn.Module, theirs: nn.Module, name: str) -> str:
    """Settings of a tower that no shape shows and that differ, e.g. "position_side none, this model 8"."""
    wanted, found = (asdict(tower.config) for tower in (ours, theirs))  # pyright: ignore[reportArgumentType]
    return "; ".join(
        f"{key} {_written(found.get(key))}, this model {_written(wanted.get(key))}"
        for key in {**wanted, **found}
        if found.get(key) != wanted.get(key) and _UNREMARKABLE.isdisjoint((key, f"{name}.{key}"))
    )


def _written(value: object) -> str:
    """A value of a configuration as TOML has it, "none" where there is none."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _difference(ours: nn.Module, theirs: nn.Module) -> str:
    """What differs between the shapes of two towers, e.g. "width 384, not 192"; positions need no parameters."""
    wanted, found = (asdict(tower.config) for tower in (ours, theirs))  # pyright: ignore[reportArgumentType]
    return ", ".join(
        f"{key} {found[key]}, not {wanted[key]}"
        for key in wanted
        if key not in _NO_SHAPE and wanted[key] != found.get(key, wanted[key])
    )
