"""Recipes of LLaVA-style models: TOML files, parsed into frozen pydantic models (papers.md section 4).

A stage trains the modules that have a learning rate and freezes the others. Learning rates are peak values, as these
frameworks publish them, not per 256 samples.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.multimodal.model.geometry import Aspect, Framework
from openvision.multimodal.model.native import LEAST_TOKENS
from openvision.recipe.schema import read_recipe_text
from openvision.recipe.sections import Section
from openvision.recipe.text import apply_override, describe_problems

Fraction = Annotated[float, Field(ge=0, le=1)]


class LearningRates(Section):
    """Peak learning rate of each module; a module without one is frozen."""

    projector: PositiveFloat | None = None
    """Projector and, for anyres, the newline."""
    llm: PositiveFloat | None = None
    """Language model, or its LoRA matrices."""
    encoder: PositiveFloat | None = None
    """Vision tower."""


class Lora(Section):
    """LoRA of the language model's linear layers; merged into the weights at the end of the stage."""

    rank: PositiveInt = 16
    """Inner dimension of the low-rank matrices."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Share of inputs of the low-rank matrices that is dropped."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of linear layers of the language model."""


class HubData(Section):
    """A Hugging Face data set with LLaVA's columns: conversations or messages, image or images."""

    name: str
    """Hub id, or a folder written by `save_to_disk`."""
    config: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Split to train on."""


class VlmStage(Section):
    """One stage of training on one data set, with its own optimizer."""

    name: str
    objective: Literal["answers", "words"] = "answers"
    """answers: next-token prediction of the answers, as in the papers; words: the projector learns the language model's
    embeddings of the answers' words, and the language model is not run (`training/objectives.py`)."""
    conversations: str | tuple[str, ...] | None = None
    """LLaVA JSON or JSON lines files, relative to the data folder."""
    images: str = "."
    """Folder of the images, relative to the data folder."""
    hub: HubData | None = None
    """Replaces `conversations` and `images`."""
    samples: PositiveInt | None = None
    """Samples to train on, in several epochs or part of one; by default one epoch."""
    aspect: Aspect = "pad"
    """pad: pad to a square; crop: the centre square; anyres: tiles, for llava-next; native: one image that keeps its
    aspect, for llava-native."""
    batch_size: PositiveInt
    """Samples of an optimizer step, over all devices."""
    micro_batch: PositiveInt | None = None
    """Overrides run.micro_batch for this stage."""
    learning_rate: LearningRates
    """Peak learning rate of each module that is trained."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps with a linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_length: PositiveInt = 2048
    """Tokens of a sample, visual tokens included; longer samples are truncated."""
    lora: Lora | None = None
    """Train low-rank matrices instead of the weights of the language model."""

    @model_validator(mode="after")
    def _consistent(self) -> "VlmStage":
        if (self.conversations is None) == (self.hub is None):
            raise ValueError("set either conversations (files) or hub (a Hugging Face data set)")
        rates = self.learning_rate
        if not any((rates.projector, rates.llm, rates.encoder)):
            raise ValueError("learning_rate is empty: set projector, llm or encoder")
        if self.lora is not None and rates.llm is None:
            raise ValueError("lora needs learning_rate.llm")
        if self.objective == "words" and (rates.llm or rates.encoder):
            raise ValueError("objective 'words' trains the projector only: remove learning_rate.llm and .encoder")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Conversation files."""
        return (self.conversations,) if isinstance(self.conversations, str) else self.conversations or ()


class VlmRun(Section):
    """Execution settings, which are not part of the published recipe."""

    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute dtype; auto: bfloat16 on devices that multiply it faster. Trained parameters are float32."""
    float32_matmul: Literal["highest", "high"] = "high"
    """Products and convolutions of float32 on CUDA: high rounds their inputs to TF32 where the device has it, several
    times as fast; highest is exact."""
    micro_batch: PositiveInt = 8
    """Samples of a micro-batch on one device; gradients are accumulated over the batch."""
    batching: Literal["random", "length", "packed"] = "length"
    """length: samples of similar length share a batch; packed: one row without padding, for flash attention."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer state over the processes of torchrun."""
    cache_features: Literal["auto", "always", "never"] = "auto"
    """Cache features of a frozen encoder; auto: when they fit on the disk and are read more than once."""
    cache_folder: str | None = None
    """Folder of the cache, which runs may share; by default inside the run folder."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """Stop at an unusable sample, or skip and count it; missing images are always skipped and counted."""
    loader_workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes that decode images; 0 decodes in the training process."""
    log_every: PositiveInt = 10
    """Optimizer steps between log lines."""
    checkpoint_every: PositiveInt = 500
    """Optimizer steps between checkpoints."""


class VlmRecipe(Section):
    """Everything a run needs except the folders of model, data and results."""

    name: str
    description: str = ""
    framework: Framework
    """How images become tokens: one square, tiles, or one grid of the image's own shape."""
    max_tokens: PositiveInt | None = None
    """Budget of patches of an image in llava-native; by default that with which the model was built."""
    seed: Annotated[int, Field(ge=0)] = 42
    image_first: bool = True
    """Move `<image>` to the start of its question, as LLaVA does."""
    stages: Annotated[tuple[VlmStage, ...], Field(min_length=1)]
    run: VlmRun = VlmRun()

    @model_validator(mode="after")
    def _consistent(self) -> "VlmRecipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have different names, not {names}")
        fitting = {"llava-1.5": ("pad", "crop"), "llava-next": ("anyres",), "llava-native": ("native",)}
        for stage in self.stages:
            if stage.aspect not in fitting[self.framework]:
                raise ValueError(
                    f"stage {stage.name}: aspect {stage.aspect!r} does not fit {self.framework}; "
                    "use anyres for llava-next, native for llava-native, pad or crop for llava-1.5"
                )
        if self.max_tokens is not None:
            if self.framework != "llava-native":
                raise ValueError(f"max_tokens is of llava-native alone, not of {self.framework}; leave it out")
            if self.max_tokens < LEAST_TOKENS:
                raise ValueError(
                    f"max_tokens {self.max_tokens} is too small for an image of 4 to 1; set it to {LEAST_TOKENS} "
                    "or more"
                )
        return self


def load_vlm_recipe(path: Path, overrides: list[str] | None = None) -> VlmRecipe:
    """Read a recipe and apply `key.path=value` overrides; raises OpenVisionError for an invalid recipe."""
    try:
        data = tomllib.loads(read_recipe_text(path))
    except tomllib.TOMLDecodeError as error:
        raise OpenVisionError(f"recipe {path} is not valid TOML: {error}") from error
    for override in overrides or []:
        apply_override(data, override)
    return parse_vlm_recipe(data, str(path))


def parse_vlm_recipe(data: JsonObject, source: str) -> VlmRecipe:
    """Validate a recipe; raises OpenVisionError, in which `source` names the recipe."""
    try:
        return VlmRecipe.model_validate(data)
    except ValidationError as error:
        problems = describe_problems(error, VlmRecipe.model_json_schema(), {})
        raise OpenVisionError(f"recipe {source}: {problems}") from error


def is_vlm_recipe(text: str, recipe: VlmRecipe) -> bool:
    """Whether a TOML text, perhaps of an earlier version, is this recipe: keys that it lacks have their defaults."""
    try:
        return parse_vlm_recipe(tomllib.loads(text), "of the folder") == recipe
    except (tomllib.TOMLDecodeError, OpenVisionError):
        return False


def dump_vlm_recipe(recipe: VlmRecipe) -> str:
    """The recipe as TOML; `load_vlm_recipe` reads the same recipe back."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
