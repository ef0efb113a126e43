"""A recipe for a LLaVA-style model: TOML, parsed into frozen models as for encoders (papers.md section 4).

A module is trained when the stage gives it a learning rate, and frozen otherwise. Learning rates are peaks, as
these frameworks publish them, not per 256 samples.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from openvision.errors import OpenVisionError
from openvision.multimodal.model.geometry import Framework
from openvision.recipe.schema import Section, read_recipe_text
from openvision.recipe.text import apply_override, describe_problem

Share = Annotated[float, Field(ge=0, le=1)]


class LearningRates(Section):
    """Peak learning rates by module; a module without one is frozen."""

    projector: PositiveFloat | None = None
    """Of the projector and, for anyres, the newline."""
    llm: PositiveFloat | None = None
    """Of the language model, or of its LoRA matrices."""
    encoder: PositiveFloat | None = None


class Lora(Section):
    """Low-rank matrices beside the language model's layers; merged into its weights when the stage ends."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of linear layers inside the language model."""


class HubData(Section):
    """A Hugging Face data set in LLaVA's columns: conversations or messages, image or images."""

    name: str
    """Hub id, or a folder written by `save_to_disk`."""
    config: str | None = None
    split: str = "train"


class Stage(Section):
    """One pass over one data set with its own optimizer."""

    name: str
    objective: Literal["answers", "words"] = "answers"
    """answers: the language model writes them, as in every paper; words: the projector alone learns the language
    model's embeddings of the answers' words, without running it (`word_alignment`)."""
    conversations: str | tuple[str, ...] | None = None
    """LLaVA JSON or JSON lines, one or several, relative to the data folder."""
    images: str = "."
    """Folder that the names of pictures start from, relative to the data folder."""
    hub: HubData | None = None
    """Instead of files."""
    samples: PositiveInt | None = None
    """Samples seen, e.g. several passes or part of one; by default every sample once."""
    aspect: Literal["pad", "crop", "anyres"] = "pad"
    """pad: to a square; crop: the centre square; anyres: tiles, for llava-next."""
    batch_size: PositiveInt
    """Samples an optimizer step, over all devices."""
    micro_batch: PositiveInt | None = None
    """Instead of run.micro_batch, where a stage needs much less or more memory than the others."""
    learning_rate: LearningRates
    warmup_ratio: Share = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_length: PositiveInt = 2048
    """Tokens of a sample, picture included; what exceeds it is cut off."""
    lora: Lora | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if (self.conversations is None) == (self.hub is None):
            raise ValueError("give either conversations (files) or hub (a Hugging Face data set)")
        rates = self.learning_rate
        if not any((rates.projector, rates.llm, rates.encoder)):
            raise ValueError("learning_rate is empty: nothing would be trained")
        if self.lora is not None and rates.llm is None:
            raise ValueError("lora needs learning_rate.llm")
        if self.objective == "words" and (rates.llm or rates.encoder):
            raise ValueError("objective 'words' trains the projector only: leave learning_rate.llm and .encoder out")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Conversation files."""
        return (self.conversations,) if isinstance(self.conversations, str) else self.conversations or ()


class Run(Section):
    """How the run is carried out: nothing here is part of the published recipe."""

    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute dtype; "auto" takes bfloat16 where the device is fast at it. Trained parameters are float32."""
    micro_batch: PositiveInt = 8
    """Samples a device works on at once; gradients add up to the batch."""
    batching: Literal["random", "length", "packed"] = "length"
    """length: samples of like length share a batch; packed: no padding, one row (worth it with flash attention)."""
    gradient_checkpointing: bool = False
    fsdp: bool = False
    """Shard parameters, gradients and optimizer over the processes of torchrun."""
    cache_features: Literal["auto", "always", "never"] = "auto"
    """Compute features of a frozen encoder once; auto: where they fit on the disk and are used more than once."""
    cache_folder: str | None = None
    """Shared by runs; by default inside the run folder."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """What happens to samples that cannot be trained on; missing pictures are always skipped and counted."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""


class VlmRecipe(Section):
    """Everything a run needs but the model folder, the data folder and the place for its results."""

    name: str
    description: str = ""
    framework: Framework
    seed: Annotated[int, Field(ge=0)] = 42
    image_first: bool = True
    """Move `<image>` to the start of its question, as LLaVA does."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    run: Run = Run()

    @model_validator(mode="after")
    def _consistent(self) -> "VlmRecipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages need different names, not {names}")
        for stage in self.stages:
            if (stage.aspect == "anyres") != (self.framework == "llava-next"):
                raise ValueError(
                    f"stage {stage.name}: aspect {stage.aspect!r} does not fit {self.framework}; "
                    "llava-next takes anyres, llava-1.5 takes pad or crop"
                )
        return self


def load_vlm_recipe(path: Path, overrides: list[str] | None = None) -> VlmRecipe:
    """Read a recipe and apply `key.path=value` overrides."""
    try:
        data = tomllib.loads(read_recipe_text(path))
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"recipe {path} is not valid TOML: {error}") from error
    for override in overrides or []:
        apply_override(data, override)
    return parse_vlm_recipe(data, str(path))


def parse_vlm_recipe(data: dict[str, Any], source: str) -> VlmRecipe:
    """Validate a recipe; `source` names it in errors."""
    try:
        return VlmRecipe.model_validate(data)
    except ValidationError as error:
        schema = VlmRecipe.model_json_schema()
        problems = "; ".join(describe_problem(problem, schema, {}) for problem in error.errors())
        raise OpenVisionError(f"recipe {source}: {problems}") from error


def dump_vlm_recipe(recipe: VlmRecipe) -> str:
    """The recipe as TOML that `load_vlm_recipe` reads back to the same recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
