"""A recipe: one TOML file that says everything about a training run, parsed into frozen models.

Unknown keys are errors that name the nearest known one. Lengths are in samples, never in epochs or steps; learning
rates are given per 256 samples of batch, as the papers do.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from openvision.data.augment import Augment
from openvision.errors import OpenVisionError
from openvision.models.openvision import OpenVisionConfig

# The batch that `base_learning_rate` refers to.
REFERENCE_BATCH = 256


class Section(BaseModel):
    """A table of the recipe: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """One of several folders of training shards."""

    folder: str
    """Relative to the data folder, or a URL."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Share of the samples that come from it, before normalisation."""
    alt_key: str | None = None
    """As in `data`, whose value it has by default."""
    synthetic_key: str | None = None


class Data(Section):
    """Where the shards are and how a sample's texts become ids."""

    train: str | tuple[Source, ...]
    """Folder of training shards, relative to the data folder given on the command line, or a URL; or several, as
    tables `[[data.train]]` with weights."""
    validation: str | None = None
    """Folder of shards measured during training; every choice is made on it."""
    alt_key: str = "txt"
    """Name of the alt-text: "txt" for the txt member, else a field of the json or of the captions tar."""
    synthetic_key: str = "synthetic"
    """Name of the synthetic caption, likewise."""
    order: Literal["global", "blocks"] = "global"
    """"global" shuffles all samples; "blocks" keeps neighbours together, for shards behind a network."""
    block: PositiveInt = 64
    """Samples of a shard read together in the order "blocks"."""
    window: PositiveInt = 4096
    """Samples among which blocks are shuffled once more."""
    reject_budget: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of samples that may be unusable before the run ends."""
    vocab_size: PositiveInt | None = None
    """Learn a WordPiece vocabulary of this size from the training texts; None needs `tokenizer`."""
    tokenizer: str | None = None
    """Path of a tokenizer.json, of a folder that holds one, or of a vocab.txt."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "Data":
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("give either vocab_size (a vocabulary is learnt) or tokenizer (a path)")
        return self


class Loss(Section):
    """Weights of the two objectives, and the texts the contrastive one sees (spec section 5)."""

    contrastive: Annotated[float, Field(ge=0)] = 1.0
    caption: Annotated[float, Field(ge=0)] = 2.0
    texts: tuple[Literal["alt", "sentence"], ...] = ("alt", "sentence")
    """Kinds of text contrasted with the image, each a problem of its own; "alt" must come first."""

    @model_validator(mode="after")
    def _alt_first(self) -> "Loss":
        if not self.texts or self.texts[0] != "alt" or len(set(self.texts)) != len(self.texts):
            raise ValueError('texts must be ["alt"] or ["alt", "sentence"]')
        return self


class Optimizer(Section):
    """Adam with decoupled weight decay on matrices (spec section 5)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    first_moment: Literal["bfloat16", "float32"] = "bfloat16"


class Stage(Section):
    """One stage of training at one resolution; parameters carry over, the optimizer starts anew."""

    resolution: PositiveInt
    samples: PositiveInt
    batch_size: PositiveInt
    base_learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate per 256 samples of batch."""
    warmup_samples: Annotated[int, Field(ge=0)] = 0

    @property
    def steps(self) -> int:
        """Optimizer updates of the stage."""
        return self.samples // self.batch_size

    @property
    def warmup_steps(self) -> int:
        """Updates of linear warm-up."""
        return self.warmup_samples // self.batch_size

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate at the end of warm-up."""
        return self.base_learning_rate * self.batch_size / REFERENCE_BATCH

    @model_validator(mode="after")
    def _at_least_one_step(self) -> "Stage":
        if self.steps < 1:
            raise ValueError(f"samples {self.samples} do not fill one batch of {self.batch_size}")
        if self.warmup_samples >= self.samples:
            raise ValueError(f"warmup_samples {self.warmup_samples} must be fewer than samples {self.samples}")
        return self


class Run(Section):
    """How the run is carried out: nothing here is part of the published recipe."""

    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute dtype; "auto" takes bfloat16 where the device is fast at it. Parameters stay float32."""
    loader_threads: PositiveInt = 1
    """Threads that decode, in each worker."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode; 0 decodes in the training process."""
    log_every: PositiveInt = 10
    """Steps between lines of the log."""
    evaluate_every: PositiveInt = 100
    """Steps between measurements on the validation shards."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""


class Recipe(Section):
    """Everything a run needs but the data folder and the place for its results."""

    name: str
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    model: OpenVisionConfig
    data: Data
    augment: Augment = Augment()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    run: Run = Run()

    @property
    def steps(self) -> int:
        """Optimizer updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def caption_length(self) -> int | None:
        """Positions of the caption target; None when there is no decoder to predict it."""
        return self.model.decoder.caption_length if self.model.decoder else None

    @property
    def reads_synthetic(self) -> bool:
        """Whether anything is learnt from synthetic captions."""
        return self.model.decoder is not None or "sentence" in self.loss.texts

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.model.decoder is not None) != (self.loss.caption > 0):
            raise ValueError("loss.caption must be above 0 with a [model.decoder] and 0 without one")
        for index, stage in enumerate(self.stages):
            if stage.resolution < self.model.vision.patch_size:
                raise ValueError(
                    f"stages.{index}.resolution {stage.resolution} is smaller than a patch of "
                    f"{self.model.vision.patch_size} pixels"
                )
        if self.stages[-1].resolution != self.model.vision.image_size:
            raise ValueError(
                f"model.vision.image_size {self.model.vision.image_size} must be the resolution of the last stage, "
                f"{self.stages[-1].resolution}: a trained model is used at that resolution"
            )
        vocabularies = {self.model.text.vocab_size}
        if self.model.decoder:
            vocabularies.add(self.model.decoder.vocab_size)
        if self.data.vocab_size and self.data.vocab_size > min(vocabularies):
            raise ValueError(
                f"data.vocab_size {self.data.vocab_size} exceeds the model's vocab_size {min(vocabularies)}"
            )
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides (values in TOML syntax; bare words are strings)."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OpenVisionError(f"recipe {path} does not exist; see the folder recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"recipe {path} is not valid TOML: {error}") from error
    for override in overrides or []:
        _apply_override(data, override)
    return parse_recipe(data, str(path))


def parse_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe; `source` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_describe(problem) for problem in error.errors())
        raise OpenVisionError(f"recipe {source}: {problems}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to the same recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _apply_override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise OpenVisionError(f"--set {override!r} is not of the form key=value, e.g. --set stages.0.batch_size=64")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    *parents, last = path.split(".")
    node: Any = data
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = parsed
        elif parsed == "none":
            node.pop(last, None)
        else:
            node[last] = parsed
    except (ValueError, IndexError, TypeError, AttributeError):
        raise OpenVisionError(f"--set {override!r}: the recipe has no place {path}") from None


def _describe(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {place}{_suggest(problem['loc'])}"
    if problem["type"] == "missing":
        return f"key {place} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _suggest(location: tuple[int | str, ...]) -> str:
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f" (did you mean {near[0]}?)" if near else (f" (known: {', '.join(known)})" if known else "")


def _known_keys(parents: tuple[int | str, ...]) -> list[str]:
    node: dict[str, Any] = Recipe.model_json_schema()
    definitions = node["$defs"]
    for key in parents:
        node = node.get("items", {}) if isinstance(key, int) else node.get("properties", {}).get(key, {})
        choices = [node, *node.get("anyOf", []), *node.get("allOf", [])]
        reference = next((choice["$ref"] for choice in choices if "$ref" in choice), None)
        if reference:
            node = definitions[reference.rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))
