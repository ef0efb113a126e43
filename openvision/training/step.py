"""The training step, top to bottom: fetch, forward and backward, agree, update, count, log.

Losses stay on the device until they are read; every process of a run goes through the same lines. What the processes
must decide alike (is everything finite, stop, save) they decide once a step, before the update.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from openvision.data.batch import Batch
from openvision.files import JsonObject
from openvision.models.flops import training_flops
from openvision.objectives.gather import all_sum
from openvision.recipe.sections import Stage
from openvision.runtime import HostCopy, autocast
from openvision.training.checkpoint.folders import Progress
from openvision.training.dense import DenseObjective
from openvision.training.distillation import DistilledObjective
from openvision.training.gradient_caching import cached_backward, joint_backward, sort_by_shape
from openvision.training.guards import DeferredGuard, Spike, find_spike, raise_not_finite
from openvision.training.objective import Losses, Objective, of_stage, weighted_losses
from openvision.training.optimizer.build import learning_rate
from openvision.training.optimizer.update import apply_update, gradient_norm
from openvision.training.randomness import SampleRandomness, stochastic_depth
from openvision.training.run.log import NoLog, RunLog
from openvision.training.run.signals import StopRequest
from openvision.training.run.throughput import Meter, seconds_left
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.data import DeviceBatches
from openvision.training.setup.parallel import DistributedModel
from openvision.training.setup.parts import RunParts


@dataclass(frozen=True)
class Agreed:
    """What all processes decided in a step to do after it."""

    stop: bool
    requeue: bool
    """Whether a scheduler asked for the stop, not a person."""
    checkpoint: bool


@dataclass
class Step:
    """One training step of a stage for each call."""

    run: RunParts
    stage: Stage
    batches: DeviceBatches
    meter: Meter
    log: RunLog | NoLog
    watchdog: Watchdog
    stop: StopRequest
    deferred: DeferredGuard | None = None
    """The guard of a run on an accelerator."""

    def __post_init__(self) -> None:
        stage = self.stage
        self._steps = stage.steps
        self._learning_rate = partial(
            learning_rate, steps=stage.steps, warmup_steps=stage.warmup_steps, peak=stage.peak_learning_rate
        )
        self._objective = of_stage(self.run.objective, stage)
        self._told_of_equal_texts = False

    def __call__(self, checkpoint_at: float | None = None) -> Agreed:
        """Take the step; a checkpoint is due once `time.monotonic()` has passed `checkpoint_at` in any process.

        Raises OpenVisionError in every process, before the update, when a loss or the gradient of any is not finite.
        """
        run, stage, progress, processes = self.run, self.stage, self.run.progress, self.run.processes
        rate = self._learning_rate(progress.stage_step)
        logged = is_due(progress.stage_step + 1, run.recipe.run.log_every, self._steps)

        self._beat("waiting for a batch")
        begin = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - begin
        caption_tokens = batch.label_mask.sum().item() / len(batch.images)
        text_tokens = _text_tokens(batch, run.recipe.loss.texts)

        self._beat("forward, backward and update")
        run.optimizer.zero_grad(set_to_none=True)
        randomness = SampleRandomness(run.recipe.seed, batch.positions.numpy(), stage.drop_path)
        losses = forward_backward(run.model, self._objective, batch, randomness, run.precision, stage.micro_batches)
        norm = gradient_norm(run.optimizer)

        agreed = self._agree(losses, norm, checkpoint_at)
        norms, settings, selected = None, run.recipe.optimizer, None
        if self.deferred is None:
            spikes = self._spikes(losses)
        else:
            spikes = self.deferred.learn()
            selected = self.deferred.select(losses, norm)
        if selected is not None or not any(spike.skipped for _, spike in spikes):
            norms = apply_update(run.optimizer, rate, norm, settings.clip_norm, settings.ema, logged, selected)
        if isinstance(self._objective, DenseObjective):
            self._objective.follow()

        if progress.stage_step + 1 < self._steps:
            begin = time.perf_counter()
            self.batches.prefetch()
            waited += time.perf_counter() - begin

        if progress.stage_step == 0:
            # The first step compiles and opens connections; from now on a lost process is noticed sooner.
            processes.shorten_timeouts(run.recipe.parallel.step_timeout_seconds)
        texts, tokens = len(run.recipe.loss.texts), (caption_tokens, text_tokens)
        frozen = run.recipe.frozen_towers
        flops = training_flops(run.recipe.model, stage.resolution, texts, *tokens, frozen) * stage.batch_size
        progress.step += 1
        progress.stage_step += 1
        progress.position += stage.batch_size
        progress.tflops += flops / 1e12
        progress.seconds += self.meter.step(stage.batch_size, flops, waited)

        self.log.step(progress.step, f"stage {progress.stage + 1} at {stage.resolution} px")
        for step, spike in spikes:
            self.log.event(log_position(progress, stage.resolution), spike.describe(step))
        if logged:
            terms = losses.values()
            means = dict(zip(terms, processes.mean(list(terms.values())), strict=True))
            measured = {"gradient_norm": HostCopy(norm).values()[0]} if norms is None else norms.values()
            trimmed = {} if text_tokens is None else {"text_tokens": round(text_tokens, 2)}
            numbers = {**means, "lr": rate, **measured, **self._equal_texts(batch), **trimmed, **self.meter.read()}
            left = seconds_left(run.recipe.model, texts, run.recipe.stages, progress, *tokens, frozen)
            self.log.train(log_position(progress, stage.resolution), numbers, left)
        return agreed

    def _equal_texts(self, batch: Batch) -> dict[str, float]:
        """How many texts of the global batch occur in it more than once; the first such batch of a stage is told."""
        counts = self.run.objective.equal_texts(batch)
        if not counts:
            return {}
        numbers = dict(zip(counts, HostCopy(torch.stack(list(counts.values())).float()).values(), strict=True))
        if any(numbers.values()) and not self._told_of_equal_texts:
            self._told_of_equal_texts = True
            found = ", ".join(f"{kind} {number:.0f}" for kind, number in numbers.items())
            loss = self.run.recipe.loss
            right = loss.equal_texts == "positives"
            how = _SHARED if loss.kind == "softmax" else _ALL_RIGHT if right else _WRONG_ANSWERS
            self.log.say(f"texts that occur more than once in a batch of {self.stage.batch_size}: {found}; {how}")
        return {f"equal_texts_{kind}": number for kind, number in numbers.items()}

    def _spikes(self, losses: Losses) -> list[tuple[int, Spike]]:
        """The spike that this step is, if it is one."""
        if self.run.recipe.guards.spikes == "off":
            return []
        (loss,) = self.run.processes.mean([losses.total.item()])
        spike = find_spike(loss, self.run.progress, self.run.recipe.guards)
        return [] if spike is None else [(self.run.progress.step + 1, spike)]

    def _agree(self, losses: Losses, norm: Tensor, checkpoint_at: float | None) -> Agreed:
        """Decide with the other processes, or raise OpenVisionError in all of them."""
        self._beat("agreeing with the other processes")
        broken: list[str] = []
        if self.deferred is None:
            broken = losses.not_finite() or ([] if norm.isfinite() else ["the gradient"])
        late = checkpoint_at is not None and time.monotonic() > checkpoint_at
        flags = [bool(broken), self.stop.wanted, self.stop.requeue, late]
        failed, stop, requeue, checkpoint = self.run.processes.any_rank(flags)
        if failed:
            raise_not_finite(broken, self.run.progress.step + 1, self.run.processes)
        return Agreed(stop, requeue, checkpoint)

    def _beat(self, what: str) -> None:
        self.watchdog.beat(self.run.progress.step, what)


def _text_tokens(batch: Batch, kinds: Sequence[str]) -> float | None:
    """Mean number of ids, class token included, of the contrasted texts; None where they are not trimmed, or absent."""
    if batch.text_lengths is None or not kinds:
        return None
    return batch.text_lengths[:, [("alt", "sentence").index(kind) for kind in kinds]].double().mean().item() + 1


_SHARED = "the softmax divides each among its images, so that its loss stays above 0; there is nothing to set"
_ALL_RIGHT = "each counts as right for all its images"
_WRONG_ANSWERS = (
    "each counts as right for its own image and wrong for the others of the same text; "
    'loss.equal_texts = "positives" counts it as right for all'
)


def forward_backward(
    model: DistributedModel,
    objective: Objective,
    batch: Batch,
    randomness: SampleRandomness,
    precision: torch.dtype = torch.float32,
    micro_batches: int = 1,
) -> Losses:
    """Add the gradient of the global batch to the parameters; returns the losses of this process's batch.

    The mean over processes of the losses is that of the global batch. More than one of `micro_batches`, which must
    divide the batch, takes less memory and changes nothing else (gradient_caching.py).
    """
    processes = model.processes
    if isinstance(objective, DistilledObjective):
        batch = objective.taught_batch(batch, micro_batches, precision)
    # Divided by this count the mean over processes of their caption losses is that of the global batch. The mask is on
    # the CPU: counting makes no accelerator wait.
    target_tokens = batch.label_mask.sum()
    if processes.group is not None:
        target_tokens = all_sum(target_tokens, processes.group) / processes.size
    cached = micro_batches > 1
    if batch.shapes is not None:
        batch, randomness = sort_by_shape(batch, randomness)
        # Every process averages its gradients at the end, or every one on the way: their shapes may differ.
        cached = cached or batch.shapes is not None or processes.group is not None
    if cached:
        with model.no_sync():
            # Blocks that are recomputed in the backward pass drop what was drawn for the last shape alone.
            if micro_batches == 1 and batch.shapes is not None and not randomness.drop_path:
                losses = joint_backward(objective, batch, randomness, precision, target_tokens)
            else:
                losses = cached_backward(objective, batch, randomness, micro_batches, precision, target_tokens)
    else:
        with stochastic_depth(objective.vision_blocks, randomness):
            with autocast(batch.images.device.type, precision):
                embeds, terms = objective.forward(batch, randomness, target_tokens)
                losses = weighted_losses(objective.weights, objective.coupled(embeds, batch) | terms)
            losses.total.backward()
    if processes.group is not None:
        model.finish_gradients(synced=not cached)
    return losses


def is_due(stage_step: int, every: int, steps: int) -> bool:
    """Whether something is done after `stage_step` of `steps` updates: every so many, and at the end of the stage."""
    return stage_step % every == 0 or stage_step == steps


def log_position(progress: Progress, resolution: int) -> JsonObject:
    """What every line of the log begins with."""
    return {
        "step": progress.step,
        "stage": progress.stage,
        "resolution": resolution,
        "samples": progress.position,
        "seconds": round(progress.seconds, 3),
        "tflops": round(progress.tflops, 3),
    }
