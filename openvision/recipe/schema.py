"""A recipe: one TOML file that defines a training run, parsed into frozen pydantic models.

An unknown key is an error that names the nearest known one. Lengths are counted in samples, not in epochs or steps;
learning rates are given per 256 samples of batch, as in the papers.
"""

import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, read_text
from openvision.frozen.perceptual import LEAST_PIXELS
from openvision.images.augment import Augment
from openvision.images.native import NativeShapes
from openvision.models.bounds import check_patches
from openvision.models.genlip import KIND_GENLIP, GenLipConfig
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import KIND, ModelConfig, OpenVision2Config
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.effects import require_effects
from openvision.recipe.sections import (
    Data,
    Dense,
    EvaluatorTable,
    Guards,
    Loss,
    Native,
    Optimizer,
    Parallel,
    Run,
    Section,
    Stage,
    TeacherTable,
    WarmStart,
)
from openvision.recipe.text import apply_override, describe_problems
from openvision.renamed import translate_recipe

# `model.kind` -> its definition in the schema. The default is OpenVision 1; without a decoder that is plain CLIP.
KINDS = {
    "openvision": "OpenVisionConfig",
    "openvision2": "OpenVision2Config",
    "openvision3": "OpenVision3Config",
    "genlip": "GenLipConfig",
}

# Where a checkout has the recipes, and where setup.py puts them in a wheel.
_RECIPES, _SHIPPED = "recipes", Path(__file__).parent / "shipped"


def _kind(model: object) -> str:
    if isinstance(model, dict):
        return str(model.get("kind", "openvision"))
    return getattr(model, "kind", "openvision")


class Recipe(Section):
    """A training run, except its data folder and run folder."""

    name: str
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    start: str | None = None
    """Pretrained weights: released name, Hub id, run, model folder or file. They bring their tokenizer, and their shape
    to a recipe without [model]. Missing towers are initialised randomly."""
    warm_start: WarmStart | None = None
    """How weights of another shape are taken from `start`."""
    model: Annotated[
        Annotated[OpenVisionConfig, Tag("openvision")]
        | Annotated[OpenVision2Config, Tag("openvision2")]
        | Annotated[OpenVision3Config, Tag("openvision3")]
        | Annotated[GenLipConfig, Tag("genlip")],
        Discriminator(_kind),
    ]
    data: Data
    augment: Augment = Augment()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    guards: Guards = Guards()
    evaluate: tuple[EvaluatorTable, ...] | None = None
    """Evaluators that run during training beside the validation: tables `[[evaluate]]`."""
    teacher: tuple[TeacherTable, ...] | None = None
    """Frozen encoders to distil from: tables `[[teacher]]`."""
    dense: Dense | None = None
    """Prediction of an averaged tower's patches."""
    run: Run = Run()
    parallel: Parallel = Parallel()

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_the_loss(cls, data: object) -> object:
        """The loss says which learned numbers the model has; a recipe need not say it twice."""
        if not isinstance(data, dict) or not isinstance(model := data.get("model"), dict):
            return data
        if _kind(model) in (KIND, KIND_GENLIP):
            return data
        try:
            options = Loss.model_validate(data.get("loss", {})).model_options
        except ValidationError:
            # The check of the table names what is wrong.
            return data
        return {**data, "model": {**model, **{name: on for name, on in options.items() if on}}}

    @property
    def steps(self) -> int:
        """Optimizer updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def caption_length(self) -> int | None:
        """Length of the caption target, tokens; None without a decoder."""
        return self.model.decoder.caption_length if self.model.decoder else None

    @property
    def context_length(self) -> int | None:
        """Ids of a text for the text tower; None when there is no text tower."""
        return self.model.text.context_length if self.model.text else None

    @property
    def vocab_size(self) -> int:
        """Entries that every part of the model has room for."""
        return min(part.vocab_size for part in (self.model.text, self.model.decoder) if part is not None)

    @property
    def is_contrastive(self) -> bool:
        """Whether images are contrasted with the texts of a batch: none may be in it twice."""
        return self.model.text is not None and self.loss.contrastive > 0

    @property
    def frozen_towers(self) -> tuple[str, ...]:
        """Towers of which only the projection into the shared space is trained."""
        return () if self.warm_start is None else self.warm_start.frozen

    @property
    def reads_synthetic(self) -> bool:
        """Whether any loss uses synthetic captions."""
        return self.model.decoder is not None or "sentence" in self.loss.texts

    @model_validator(mode="after")
    def _evaluators_named(self) -> "Recipe":
        titles = [one.title for one in self.evaluate or ()]
        if doubled := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"evaluate: two evaluators named {doubled!r}; give each its own name")
        title, slash, _ = (self.run.checkpoint_best or "").partition("/")
        if slash and title not in titles:
            raise ValueError(f"run.checkpoint_best {self.run.checkpoint_best!r}: no evaluator is named {title!r}")
        return self

    @model_validator(mode="after")
    def _warm(self) -> "Recipe":
        warm = self.warm_start
        if warm is None:
            return self
        of_start = (warm.patches, warm.layers, warm.vocabulary, warm.context, warm.towers)
        if self.start is None and any(way is not None for way in of_start):
            raise ValueError("warm_start says how weights are taken from `start`; give start, or leave the table out")
        if warm.vocabulary and self.data.vocab_size is None and self.data.tokenizer is None:
            raise ValueError("warm_start.vocabulary takes another vocabulary: give data.vocab_size or data.tokenizer")
        if warm.text is not None:
            if self.model.text is None or self.model.text.encoder != "bert":
                raise ValueError(
                    "warm_start.text names a sentence encoder, of whose kind the text tower must be: set "
                    'model.text.encoder = "bert"'
                )
            if self.data.vocab_size is not None or warm.vocabulary is not None:
                raise ValueError(
                    "warm_start.text brings its tokenizer along; leave data.vocab_size and warm_start.vocabulary out"
                )
        if "text" in warm.frozen and self.model.text is None:
            raise ValueError("warm_start.frozen names a text tower, which the model does not have")
        if warm.towers is not None:
            self._check_towers(warm, warm.towers)
        return self

    def _check_towers(self, warm: WarmStart, towers: tuple[str, ...]) -> None:
        """Raise ValueError where [warm_start] takes towers that are not there, none, or freezes others."""
        if not towers:
            raise ValueError(
                "warm_start.towers is empty, so nothing is taken of `start`; leave start out, or name towers"
            )
        for name in towers:
            if getattr(self.model, name, None) is None:
                raise ValueError(f"warm_start.towers names {name!r}, which the model does not have")
        taken = {*towers, *(() if warm.text is None else ("text",))}
        if fresh := [name for name in warm.frozen if name not in taken]:
            raise ValueError(
                f"warm_start.frozen names {fresh[0]!r}, which warm_start.towers does not take: it would stay at its "
                "random initial values"
            )
        if warm.text is not None and towers != ("vision",):
            raise ValueError(
                'warm_start.text takes the text tower from elsewhere: of `start` towers = ["vision"] can be taken'
            )

    @model_validator(mode="after")
    def _trims(self) -> "Recipe":
        if self.run.trim_texts and self.model.text is not None and self.model.text.pad_id is None:
            raise ValueError(
                "run.trim_texts leaves padding out, which this text tower reads; set model.text.pad_id to the "
                "tokenizer's padding, 0 in vocabularies of this project, or leave the key out"
            )
        return self

    def model_after(self, stage: int) -> ModelConfig:
        """The model as it is read from stage number `stage` on: with the shapes that it was last trained on."""
        natives = [one.native for one in self.stages[: stage + 1] if one.native is not None]
        if not natives:
            return self.model
        vision = replace(self.model.vision, aspects=natives[-1].buckets)
        return replace(self.model, vision=vision)  # pyright: ignore[reportArgumentType]

    def shapes_of(self, stage: Stage) -> NativeShapes | None:
        """The shapes of a stage's images; None for squares."""
        if stage.native is None:
            return None
        return NativeShapes(self.model.vision.patch_size, stage.native.max_tokens, stage.native.buckets)

    def _check_native(self, index: int, stage: Stage, native: Native) -> None:
        """Raise ValueError for a native stage whose square is not that of its resolution."""
        place, patch = f"stages.{index}", self.model.vision.patch_size
        if stage.resolution % patch or native.max_tokens != (stage.resolution // patch) ** 2:
            side = max(1, round(stage.resolution / patch))
            raise ValueError(
                f"{place}.native.max_tokens {native.max_tokens} must be the patches of a square of {place}.resolution: "
                f"write resolution = {side * patch} and max_tokens = {side**2}"
            )
        if self.teacher:
            raise ValueError(f"{place}.native: teachers read squares; distil in stages without native")
        if self.parallel.mode == "fsdp":
            raise ValueError(
                f"{place}.native: processes that shard parameters must take the same micro-batches, and shapes differ; "
                'use parallel.mode = "ddp"'
            )

    @model_validator(mode="after")
    def _teachers(self) -> "Recipe":
        titles = [one.title for one in self.teacher or ()]
        if doubled := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"teacher: two teachers named {doubled!r}; give each its own name")
        if titles and isinstance(self.model, OpenVision3Config):
            raise ValueError('teacher: OpenVision 3 takes none; distil into a model of kind "openvision"')
        if titles and self.model.text is None:
            raise ValueError(
                "teacher: a model without a text tower trains no pooled vector that a teacher could shape; distil into "
                'a model of kind "openvision", with [model.text]'
            )
        cached = next((number for number, one in enumerate(self.teacher or ()) if one.cache is not None), None)
        if cached is not None and self.augment.views is None:
            raise ValueError(
                f"teacher.{cached}.cache holds features of fixed views of each image; set augment.views to their "
                "number, e.g. 4, or leave cache out"
            )
        return self

    @model_validator(mode="after")
    def _dense(self) -> "Recipe":
        if self.dense is None:
            return self
        if isinstance(self.model, OpenVision3Config):
            raise ValueError("dense: OpenVision 3 reconstructs its patches already; leave [dense] out")
        if isinstance(self.model, GenLipConfig):
            raise ValueError("dense: GenLIP's last block computes no patches in training; leave [dense] out")
        if self.teacher:
            raise ValueError("dense: teachers take the same place; leave [dense] or the tables [[teacher]] out")
        if self.warm_start is not None and "vision" in self.warm_start.frozen:
            raise ValueError("dense trains the vision tower, which warm_start.frozen names; leave one of them out")
        if self.parallel.mode == "fsdp":
            raise ValueError('dense: the averaged tower is not sharded; use parallel.mode = "ddp"')
        for index, stage in enumerate(self.stages):
            shapes = self.shapes_of(stage)
            pixels = stage.resolution if shapes is None else shapes.shortest_side
            # A crop of one patch has nothing to be told from, nor has the patch of an image of one; native shapes with
            # a short side have a long one.
            least = 3 if self.dense.kind == "crops" else 2 if shapes is None else 1
            if (patches := min(self.model.vision.grid(pixels, pixels))) < least:
                raise ValueError(
                    f"dense: a side of {pixels} px of stages.{index} has {patches} patch{'es' * (patches > 1)}, and "
                    f'kind = "{self.dense.kind}" needs {least}; choose a larger resolution'
                )
        return self

    @model_validator(mode="after")
    def _reconstructs(self) -> "Recipe":
        if not isinstance(self.model, OpenVision3Config):
            if self.loss.reconstruction is not None or any(stage.perceptual is not None for stage in self.stages):
                raise ValueError(
                    "loss.reconstruction and stages.N.perceptual are of OpenVision 3 alone; leave them out, or set "
                    'model.kind = "openvision3"'
                )
            return self
        if self.loss.reconstruction is None:
            raise ValueError("loss.reconstruction is missing: OpenVision 3 reconstructs; add [loss.reconstruction]")
        patch = self.model.vision.patch_size
        for index, stage in enumerate(self.stages):
            if stage.resolution % patch:
                raise ValueError(
                    f"stages.{index}.resolution {stage.resolution} is no multiple of {patch} px, the patch of "
                    f"{self.model.vision.kernel} x {self.model.vision.kernel} latents; choose a multiple"
                )
            shapes = self.shapes_of(stage)
            least = stage.resolution if shapes is None else shapes.shortest_side
            if stage.perceptual and least < LEAST_PIXELS:
                what = f"stages.{index}.resolution {stage.resolution}"
                if shapes is not None:
                    what = f"a side of {least} px of stages.{index}.native"
                raise ValueError(
                    f"{what} is too small for a perceptual distance, which needs {LEAST_PIXELS} px; "
                    f"leave stages.{index}.perceptual out"
                )
        return self

    @model_validator(mode="after")
    def _towers_to_multiply(self) -> "Recipe":
        for tower, factor in self.optimizer.multipliers.model_dump().items():
            if factor != 1 and getattr(self.model, tower) is None:
                raise ValueError(f"optimizer.multipliers.{tower}: the model has no {tower}; leave the key out")
        return self

    @model_validator(mode="after")
    def _numbers_agree(self) -> "Recipe":
        wanted = self.loss.model_options
        if self.model.text is None and (any(wanted.values()) or self.loss.captions == "joint"):
            raise ValueError(
                f"a model of kind {self.model.kind} contrasts nothing; leave loss.kind, loss.captions and "
                "loss.logit_scales out"
            )
        for name in wanted:
            if getattr(self.model, name, False) and not wanted[name]:
                raise ValueError(f"model.{name} follows from [loss], which does not ask for it; leave the key out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if isinstance(self.model, OpenVision3Config):
            # A weight of 0 measures what is not trained: joint training is compared with its parts.
            pass
        elif self.loss.texts == ("sentence",):
            raise ValueError(
                'loss.texts must be ["alt"] or ["alt", "sentence"]; ["sentence"] alone is for OpenVision 3'
            )
        elif (self.model.decoder is not None) != (self.loss.caption > 0):
            raise ValueError("loss.caption must be above 0 with a [model.decoder] and 0 without one")
        if self.model.text is None:
            if self.loss.contrastive or self.loss.texts:
                raise ValueError(
                    f"a model of kind {self.model.kind} has no text tower: loss.contrastive must be 0 and loss.texts []"
                )
        elif not self.loss.texts:
            raise ValueError(
                'loss.texts [] is for models that only caption; with a text tower give ["alt"] or ["alt", "sentence"]'
            )
        for index, stage in enumerate(self.stages):
            if self.is_contrastive and stage.batch_size == 1:
                raise ValueError(
                    f"stages.{index}.batch_size 1 leaves the contrastive loss nothing to tell apart: loss and gradient "
                    "are 0; set it to 2 or more, as large as memory and the number of images allow"
                )
            try:
                check_patches(stage.resolution, self.model.vision.patch_size)
            except ValueError as error:
                raise ValueError(str(error).replace("image_size", f"stages.{index}.resolution", 1)) from None
            if stage.native is not None:
                self._check_native(index, stage, stage.native)
        if self.stages[-1].resolution != self.model.vision.image_size:
            raise ValueError(
                f"model.vision.image_size {self.model.vision.image_size} must be the resolution of the last stage, "
                f"{self.stages[-1].resolution}: a trained model is used at that resolution"
            )
        brought = self.start is not None or (self.warm_start is not None and self.warm_start.text is not None)
        if self.data.vocab_size is None and self.data.tokenizer is None and not brought:
            raise ValueError("data: give either vocab_size (to train a vocabulary) or tokenizer (a path)")
        if self.data.vocab_size and self.data.vocab_size > self.vocab_size:
            raise ValueError(f"data.vocab_size {self.data.vocab_size} exceeds the model's vocab_size {self.vocab_size}")
        return self

    @model_validator(mode="after")
    def _has_effects(self, info: ValidationInfo) -> "Recipe":
        # What an earlier version accepted stays readable: its runs are resumed, exported and reported.
        if info.context != _STORED_CONTEXT:
            require_effects(self)
        return self


STORED = "recipe.toml"
"""Name of the resolved recipe in run and model folders."""
_STORED_CONTEXT = {"stored": True}
# One of these lies beside a recipe that a run wrote.
_BESIDE_STORED = ("data.json", "sessions.json", "model.safetensors")


def load_recipe(
    path: Path,
    overrides: list[str] | None = None,
    stored: bool | None = None,
    fill: Callable[[JsonObject], None] = lambda _: None,
) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides (values in TOML syntax; bare words are strings).

    `fill` may add to the content before it is checked: what the recipe leaves to its `start`.
    Keys that were renamed are translated in a `stored` recipe, which is by default the recipe.toml of a run or model
    folder, and settings without effect are left in it. Raises OpenVisionError that names the file and the key.
    """
    try:
        data = tomllib.loads(read_recipe_text(path))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise OpenVisionError(f"recipe {path} is not valid TOML: {reason}") from error
    if stored is None:
        stored = path.name == STORED and any((path.parent / name).exists() for name in _BESIDE_STORED)
    if stored:
        translate_recipe(data)
    for override in overrides or []:
        apply_override(data, override)
    fill(data)
    return parse_recipe(data, str(path), stored)


def read_recipe_text(path: Path) -> str:
    """Text of a recipe file, comments included; raises OpenVisionError when it cannot be read.

    Outside a checkout, recipes/NAME is the one that came with the installed package.
    """
    if not path.is_symlink() and not path.exists():
        if path.parts[:1] != (_RECIPES,) or not (shipped := _SHIPPED.joinpath(*path.parts[1:])).is_file():
            raise OpenVisionError(f"recipe {path} does not exist; see the folder recipes/")
        path = shipped
    try:
        return read_text(path)
    except OpenVisionError as error:
        raise OpenVisionError(f"recipe {error}") from error


def parse_recipe(data: JsonObject, source: str, stored: bool = False) -> Recipe:
    """Validate a recipe; errors name it as `source`. One that is `stored` may have settings without effect."""
    try:
        return Recipe.model_validate(data, context=_STORED_CONTEXT if stored else None)
    except RecursionError as error:
        raise OpenVisionError(f"recipe {source} is nested too deeply") from error
    except ValidationError as error:
        problems = describe_problems(error, Recipe.model_json_schema(), KINDS)
        raise OpenVisionError(f"recipe {source}: {problems}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML; `load_recipe` reads it back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
