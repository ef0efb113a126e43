"""A recipe: one TOML file that says everything about a training run, parsed into frozen models.

Unknown keys are errors that name the nearest known one. Lengths are in samples, never in epochs or steps; learning
rates are given per 256 samples of batch, as the papers do.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, ValidationError, model_validator

from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import AnyEvaluator, check_titles
from openvision.images.augment import Augment
from openvision.models.openvision import OpenVisionConfig
from openvision.models.openvision2 import OpenVision2Config
from openvision.recipe.text import apply_override, describe_problem

# What `model.kind` may say; without it the model is OpenVision 1, or plain CLIP where it has no decoder.
KINDS = {"openvision": "OpenVisionConfig", "openvision2": "OpenVision2Config"}

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
    """Kinds of text contrasted with the image, each a problem of its own; "alt" must come first. None with
    OpenVision 2."""

    @model_validator(mode="after")
    def _alt_first(self) -> "Loss":
        if self.texts not in ((), ("alt",), ("alt", "sentence")):
            raise ValueError('texts must be ["alt"] or ["alt", "sentence"], or [] with OpenVision 2')
        return self


class Optimizer(Section):
    """Adam with decoupled weight decay on matrices (spec section 5)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    first_moment: Literal["bfloat16", "float32"] = "bfloat16"
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Greatest norm of the gradient; None, as published, leaves it alone."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the parameters, which is then measured and written instead of them; None is off."""


class Stage(Section):
    """One stage of training at one resolution; parameters carry over, the optimizer starts anew."""

    resolution: PositiveInt
    samples: PositiveInt
    batch_size: PositiveInt
    base_learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate per 256 samples of batch."""
    warmup_samples: Annotated[int, Field(ge=0)] = 0
    accumulate: PositiveInt = 1
    """Chunks in which a batch is computed when it does not fit into memory; the update stays that of the batch."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the vision tower: probability at its last block, growing linearly from 0 at its first."""

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
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}; choose a divisor of it"
            )
        if self.warmup_samples >= self.samples:
            raise ValueError(f"warmup_samples {self.warmup_samples} must be fewer than samples {self.samples}")
        return self


class Run(Section):
    """How the run is carried out: nothing here is part of the published recipe."""

    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute dtype; "auto" takes bfloat16 where the device is fast at it. Parameters stay float32."""
    compile: bool = False
    """Compile each block with torch.compile: a minute of warm-up, faster steps afterwards."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of a block is computed again in the backward pass instead of being kept: nothing, all but the results of
    matrix products and attention, or everything."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense bfloat16 peak of one device, 10^12 operations a second, for the MFU of devices that are not known."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the run folder."""
    wandb: str | None = None
    """Name of the Weights & Biases project to log to."""
    trackio: str | None = None
    """Name of the trackio project to log to."""
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
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which a checkpoint is written even if `checkpoint_every` steps have not passed."""
    checkpoints_kept: PositiveInt = 2
    """Newest checkpoints kept."""
    checkpoint_best: str | None = None
    """Number of the validation whose best checkpoint is kept too, e.g. "top1"; the lowest for a loss."""
    hang_seconds: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without progress after which a process writes its stacks to hangs/ in the run folder."""


class Parallel(Section):
    """How many processes share the run, started by torchrun; it may change whenever the run goes on."""

    mode: Literal["ddp", "fsdp"] = "ddp"
    """"ddp" keeps the model in every process; "fsdp" cuts parameters, gradients and moments into slices."""
    replicate: PositiveInt = 1
    """With "fsdp": groups of processes that hold a whole model each; a machine per group keeps slices near."""
    start_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """How long an exchange between processes may take up to the end of the first step."""
    step_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long it may take afterwards: a lost or hung process ends the run after this time."""


class Guards(Section):
    """What is done about a loss that jumps; a loss or gradient that is not finite always ends the run."""

    spikes: Literal["off", "log", "skip"] = "off"
    """"log" reports a step whose loss jumps, "skip" leaves its update out as well."""
    spike_window: Annotated[int, Field(ge=20)] = 100
    """Newest losses that a jump is measured against."""
    spike_deviations: Annotated[float, Field(gt=0)] = 8.0
    """How many deviations above their median a loss must be."""


def _kind(model: Any) -> str:
    if isinstance(model, dict):
        return str(model.get("kind", "openvision"))
    return getattr(model, "kind", "openvision")


class Recipe(Section):
    """Everything a run needs but the data folder and the place for its results."""

    name: str
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    start: str | None = None
    """Weights to start from instead of random ones: released name, Hub id, model folder or file. What they do not hold,
    such as a decoder, starts at random."""
    model: Annotated[
        Annotated[OpenVisionConfig, Tag("openvision")] | Annotated[OpenVision2Config, Tag("openvision2")],
        Discriminator(_kind),
    ]
    data: Data
    augment: Augment = Augment()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    guards: Guards = Guards()
    evaluate: tuple[AnyEvaluator, ...] | None = None
    """What is measured during training beside the validation split: tables `[[evaluate]]`."""
    run: Run = Run()
    parallel: Parallel = Parallel()

    @property
    def steps(self) -> int:
        """Optimizer updates of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def caption_length(self) -> int | None:
        """Positions of the caption target; None when there is no decoder to predict it."""
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
    def reads_synthetic(self) -> bool:
        """Whether anything is learnt from synthetic captions."""
        return self.model.decoder is not None or "sentence" in self.loss.texts

    @model_validator(mode="after")
    def _evaluators_named(self) -> "Recipe":
        try:
            check_titles(self.evaluate or (), "evaluate")
        except OpenVisionError as error:
            raise ValueError(str(error)) from error
        title, slash, _ = (self.run.checkpoint_best or "").partition("/")
        if slash and title not in {one.title for one in self.evaluate or ()}:
            raise ValueError(f"run.checkpoint_best {self.run.checkpoint_best!r}: no evaluator is named {title!r}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if (self.model.decoder is not None) != (self.loss.caption > 0):
            raise ValueError("loss.caption must be above 0 with a [model.decoder] and 0 without one")
        if self.model.text is None:
            if self.loss.contrastive or self.loss.texts:
                raise ValueError("OpenVision 2 has no text tower: loss.contrastive must be 0 and loss.texts []")
        elif not self.loss.texts:
            raise ValueError('loss.texts [] is for OpenVision 2; with a text tower give ["alt"] or ["alt", "sentence"]')
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
        if self.data.vocab_size and self.data.vocab_size > self.vocab_size:
            raise ValueError(f"data.vocab_size {self.data.vocab_size} exceeds the model's vocab_size {self.vocab_size}")
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key.path=value` overrides (values in TOML syntax; bare words are strings)."""
    try:
        data = tomllib.loads(read_recipe_text(path))
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"recipe {path} is not valid TOML: {error}") from error
    for override in overrides or []:
        apply_override(data, override)
    return parse_recipe(data, str(path))


def read_recipe_text(path: Path) -> str:
    """The file as written, remarks included; raises OpenVisionError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OpenVisionError(f"recipe {path} does not exist; see the folder recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OpenVisionError(f"recipe {path} cannot be read: {error}") from error


def parse_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe; `source` names it in errors."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        schema = Recipe.model_json_schema()
        problems = "; ".join(describe_problem(problem, schema, KINDS) for problem in error.errors())
        raise OpenVisionError(f"recipe {source}: {problems}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to the same recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
