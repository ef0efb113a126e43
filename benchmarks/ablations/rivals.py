"""open_clip's CLIP and CoCa, trained by open_clip's own code on the same shards.

Theirs: model classes, initial values, augmentation, loss, AdamW with its groups and betas, schedule, training loop.
From here: widths, depths, heads and patches of the towers, batch, vocabulary, and the order of the samples. They train
at the last resolution throughout, as open_clip does. Needs `open_clip_torch`.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchvision_operators as torchvision_operators
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ablations.budget import ENDLESS, Speed, clock, plan_samples, synchronize
from ablations.runs import Task, Trained, validation_numbers
from ablations.variants import MEASUREMENTS, WARMUP, Profile, Variant, recipe_of
from openvision.data.mixture import Mixture, Ordering
from openvision.data.shards.dataset import ShardDataset
from openvision.evaluation.evaluators.model import EvaluatedModel
from openvision.files import JsonObject
from openvision.models.layers import unit
from openvision.models.openvision import OpenVisionConfig
from openvision.models.vision import VisionConfig, VisionFeatures
from openvision.recipe.schema import Recipe
from openvision.runtime import resolve_device, resolve_precision, use_float32_matmul
from openvision.text.tokenizer import Tokenizer

_CURVE_POINTS = 3
# Names that the trainer's log gives to numbers of the validation.
_CURVE = {
    "top1": "names/top1",
    "top5": "names/top5",
    "alt_t2i_r1": "alt-texts/t2i_r1",
    "sentence_t2i_r1": "first sentences/t2i_r1",
    "sentence_t2i_r5": "first sentences/t2i_r5",
}
_LOG_EVERY = 20
_CAPTION_CONTEXT = 73
"""Ids of a text where captions are read, one of them our class token, which open_clip is not given."""


class ScenesDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples `start` to `start + samples` of a run's stream as open_clip's transform and our vocabulary give them."""

    def __init__(
        self, shards: ShardDataset, seed: int, start: int, samples: int, text: "TextReader", transform: Any
    ) -> None:
        self.shards, self.start, self.samples = shards, start, samples
        self.stream = Mixture([shards]).stream(seed, Ordering())
        self.text, self.transform = text, transform

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        position = self.start + index
        sample = self.shards[self.stream[position][1]]
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        caption = self.text.captions and position % 2 == 1
        return self.transform(image), self.text(str(sample.synthetic if caption else sample.alt))


@dataclass(frozen=True)
class TextReader:
    """Texts to ids without our class token."""

    tokenizer: Tokenizer
    context: int
    captions: bool

    def __call__(self, text: str) -> Tensor:
        """Ids (context - 1,): [bos], tokens, [eos], padding."""
        return torch.from_numpy(self.tokenizer.encode([text], self.context)[0, :-1])


class TimedLoader:
    """Batches until the time is up, for measuring speed through open_clip's own loop."""

    num_batches = ENDLESS
    num_samples = ENDLESS

    def __init__(self, loader: Any, seconds: float, warm_batches: int, device: torch.device) -> None:
        self.loader, self.seconds, self.warm_batches, self.device = loader, seconds, warm_batches, device
        self.startup, self.since, self.counted, self.waited = 0.0, 0.0, 0, 0.0

    def __iter__(self) -> Iterator[list[Tensor]]:
        begin = asked = clock(self.device)
        for number, batch in enumerate(self.loader):
            now = clock(self.device)
            if number == 0:
                self.startup = now - begin
            if number == self.warm_batches:
                synchronize(self.device)
                self.since = now = clock(self.device)
            elif number > self.warm_batches:
                self.counted += 1
                self.waited += now - asked
                if now - self.since > self.seconds:
                    return
            yield batch
            asked = clock(self.device)


def build(recipe: Recipe, program: str, tokenizer: Tokenizer, context: int) -> nn.Module:
    """open_clip's model with the sizes of the recipe's towers and decoder."""
    open_clip = __import__("open_clip")
    config = cast(OpenVisionConfig, recipe.model)
    vision = {
        "image_size": config.vision.image_size,
        "layers": config.vision.depth,
        "width": config.vision.width,
        "head_width": config.vision.width // config.vision.heads,
        "mlp_ratio": config.vision.mlp_dim / config.vision.width,
        "patch_size": config.vision.patch_size,
    }
    text = _text_options(config.text, context - 1) | {"vocab_size": tokenizer.vocab_size}
    if program == "clip":
        pooled = {"pool_type": "eos", "eos_id": tokenizer.eos_id}
        return open_clip.model.CLIP(
            config.embed_dim,
            open_clip.CLIPVisionCfg(**vision),
            open_clip.CLIPTextCfg(**text, **pooled),
            output_dict=True,
        )
    assert config.decoder is not None
    vision |= {"attentional_pool": True, "attn_pooler_heads": config.text.heads, "output_tokens": True}
    decoder = _text_options(config.text, context - 1) | {
        # Its decoder reads the text tower's tokens: their width is its own.
        "layers": config.decoder.depth,
        "attn_pooler_heads": config.text.heads,
        "vocab_size": tokenizer.vocab_size,
    }
    # Text tower, decoder and image tokens must have the width of the embedding.
    text |= {"embed_cls": True, "output_tokens": True}
    model = open_clip.CoCa(config.text.width, decoder, text, vision, pad_id=tokenizer.pad_id)
    # Release 3.3 leaves it as it comes from the memory allocator, often NaN: its init_parameters is never called
    # (open_clip, pull request 551). These are the values that method has for it.
    nn.init.normal_(model.text_decoder.text_projection, std=config.text.width**-0.5)
    return model


def _text_options(config: Any, length: int) -> dict[str, Any]:
    return {
        "context_length": length,
        "width": config.width,
        "heads": config.heads,
        "layers": config.depth,
        "mlp_ratio": config.mlp_dim / config.width,
    }


def build_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with the groups and values of open_clip's main script for ViTs."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    spared = {
        name
        for name, parameter in named
        if parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
    }
    groups = [
        {"params": [parameter for name, parameter in named if name in spared], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in named if name not in spared], "weight_decay": 0.2},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)


@dataclass
class Rival:
    """What a training of a rival works with."""

    task: Task
    chosen: Variant
    profile: Profile
    recipe: Recipe
    tokenizer: Tokenizer
    context: int
    device: torch.device

    @property
    def rate(self) -> float:
        """Peak learning rate of its batch."""
        return self.recipe.stages[0].peak_learning_rate

    def new_model(self) -> nn.Module:
        """Initial values of the run's seed."""
        torch.manual_seed(self.task.seed)
        return build(self.recipe, self.chosen.program, self.tokenizer, self.context).to(self.device)

    def loader(self, start: int, samples: int) -> Any:
        """open_clip's kind of loader over the samples from `start` on."""
        open_clip = __import__("open_clip")
        transform = open_clip.image_transform(self.recipe.model.vision.image_size, is_train=True)
        text = TextReader(self.tokenizer, self.context, self.chosen.captions)
        shards = ShardDataset(Path(self.task.data) / "train")
        dataset = ScenesDataset(shards, self.task.seed, start, samples, text, transform)
        loader: Any = DataLoader(
            dataset,
            self.profile.batch_size,
            num_workers=self.task.workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
        )
        loader.num_batches, loader.num_samples = samples // self.profile.batch_size, samples
        return loader

    def train_one_epoch(self, model: nn.Module, optimizer: Any, scheduler: Any, loader: Any, epoch: int) -> None:
        """open_clip's loop."""
        from open_clip import ClipLoss, CoCaLoss
        from open_clip_train.train import train_one_epoch

        clip = self.chosen.program == "clip"
        loss = ClipLoss() if clip else CoCaLoss(2.0, 1.0, pad_id=self.tokenizer.pad_id)
        bfloat16 = resolve_precision(self.recipe.run.precision, self.device) == torch.bfloat16
        arguments = SimpleNamespace(
            device=str(self.device),
            precision="amp_bf16" if bfloat16 else "fp32",
            batch_size=self.profile.batch_size,
            log_every_n_steps=_LOG_EVERY,
            accum_freq=1,
            distill=False,
            skip_scheduler=False,
            horovod=False,
            grad_clip_norm=None,
            rank=0,
            local_rank=0,
            world_size=1,
            wandb=False,
        )
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda number: None)}
        train_one_epoch(model, data, loss, epoch, optimizer, None, scheduler, None, arguments)
        synchronize(self.device)

    def measure_speed(self) -> Speed:
        """Speed under the load of the group; the model is thrown away."""
        model = self.new_model()
        loader = self.loader(0, 2**24)
        seconds = self.profile.calibration_seconds
        # The others of the group measure their other stages meanwhile: this one measures as long as they do.
        speed = Speed(0.0, 0.0, 0.0)
        for index in range(MEASUREMENTS):
            self.task.meeting.wait(f"measure{index}")
            timed = TimedLoader(loader, seconds, self.profile.warm_batches, self.device)
            self.train_one_epoch(model, build_optimizer(model, self.rate), lambda step: None, timed, 0)
            elapsed = clock(self.device) - timed.since
            speed = Speed(timed.startup, timed.counted * self.profile.batch_size / elapsed, timed.waited / elapsed)
        return speed

    def evaluated(self, model: nn.Module) -> EvaluatedModel:
        """The model as our evaluators take it."""
        adapted = RivalModel(model, self.recipe, self.context)
        return EvaluatedModel(
            cast(Any, adapted.vision),
            cast(Any, adapted),
            self.tokenizer,
            batch_size=256,
            autocast=torch.bfloat16 if self.device.type == "cuda" else None,
        )


def _rival(task: Task, chosen: Variant, profile: Profile) -> Rival:
    settings = (f"run.device={task.device}",)
    recipe = recipe_of(chosen, profile, [ENDLESS], task.rate, task.seed, Path(task.vocabulary), settings)
    use_float32_matmul(recipe.run.float32_matmul)
    tokenizer = Tokenizer.load(Path(task.vocabulary))
    context = _CAPTION_CONTEXT if chosen.captions else cast(OpenVisionConfig, recipe.model).text.context_length
    return Rival(task, chosen, profile, recipe, tokenizer, context, resolve_device(task.device))


def rival_speed(task: Task, chosen: Variant, profile: Profile) -> Speed:
    """Speed of open_clip's model in open_clip's loop."""
    return _rival(task, chosen, profile).measure_speed()


def train_rival(task: Task, chosen: Variant, profile: Profile) -> Trained:
    """Train open_clip's model for the time of the task."""
    rival = _rival(task, chosen, profile)
    # As many points of a curve as our stages give: the training is cut into so many of open_clip's epochs.
    batch, epochs = profile.batch_size, _CURVE_POINTS if rival.recipe.data.validation else 1
    speeds = list(task.speeds)
    if task.seconds is None:
        assert task.samples is not None
        samples = task.samples
    else:
        speeds = speeds or [rival.measure_speed()]
        starting = replace(speeds[0], startup=epochs * speeds[0].startup)
        samples = plan_samples([starting], [1.0], task.seconds, batch)[0]
    epoch_samples = max(1, samples // (epochs * batch)) * batch
    task.meeting.wait("train")
    model, seconds, curve = _train(rival, epochs, epoch_samples)
    facts = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "context": rival.context}
    return Trained(rival.evaluated(model), speeds, [epochs * epoch_samples], seconds, curve, facts)


def _train(rival: Rival, epochs: int, samples: int) -> tuple[nn.Module, float, list[JsonObject]]:
    """The trained model, its seconds, and the validation after every epoch of so many samples but a single one."""
    from open_clip_train.scheduler import cosine_lr

    model = rival.new_model()
    optimizer, steps = build_optimizer(model, rival.rate), epochs * samples // rival.profile.batch_size
    scheduler = cosine_lr(optimizer, rival.rate, max(1, math.ceil(WARMUP * steps)), steps)
    seconds, curve = 0.0, []
    for epoch in range(epochs):
        begin = clock(rival.device)
        rival.train_one_epoch(model, optimizer, scheduler, rival.loader(epoch * samples, samples), epoch)
        seconds += clock(rival.device) - begin
        if epochs > 1:
            numbers = validation_numbers(rival.evaluated(model), Path(rival.task.data))
            point = {name: numbers[metric] for name, metric in _CURVE.items()}
            curve.append({"seconds": round(seconds, 1), "samples": (epoch + 1) * samples, **point})
    return model, seconds, curve


class RivalTower(nn.Module):
    """open_clip's vision tower as evaluators ask for one."""

    def __init__(self, tower: Any, config: VisionConfig, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.tower, self.config = tower, config
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.head = SimpleNamespace(out_features=tower.proj.shape[1])

    def forward_features(self, images: Tensor) -> VisionFeatures:
        """uint8 (B, 3, H, W) -> its tokens after the last block, and what it projects.

        CoCa pools to the width of its embedding: zeros fill the rest, which tell a probe nothing.
        """
        pixels = (images.float() / 255 - cast(Tensor, self.mean)) / cast(Tensor, self.deviation)
        tokens = self.tower.transformer(self.tower._embeds(pixels))
        pooled, _ = self.tower._pool(tokens)
        pooled = F.pad(pooled, (0, self.config.width - pooled.shape[1]))
        return VisionFeatures(tokens[:, 1:], tokens[:, 0], pooled, self.config.grid(*images.shape[-2:]))

    def project(self, pooled: Tensor) -> Tensor:
        """(B, D) -> (B, E), not normalised."""
        return pooled[:, : len(self.tower.proj)].float() @ self.tower.proj.float()


class RivalModel(nn.Module):
    """open_clip's model as evaluators ask for one; its captions are not measured."""

    decoder = None

    def __init__(self, model: Any, recipe: Recipe, context: int) -> None:
        super().__init__()
        open_clip = __import__("open_clip")
        device = next(model.parameters()).device
        mean, deviation = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        self.model, self.logit_scale = model, model.logit_scale
        self.vision = RivalTower(model.visual, recipe.model.vision, mean, deviation)
        self.text = SimpleNamespace(context_length=context)
        self.config = SimpleNamespace(text=self.text, embed_dim=int(np.prod(model.visual.proj.shape[1:])))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (B, context), our class token last -> unit vectors (B, E)."""
        return unit(self.model.encode_text(ids[:, :-1]).float())
