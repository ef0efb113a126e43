"""A training run from recipe to model folder: stages, steps, measurements, checkpoints, exact continuation.

- Data order, crops, jitter and the choice of captions are functions of (seed, position): a continued run is the
  uninterrupted one, bit for bit on a CPU.
- Each stage starts its own optimizer and schedule; only parameters carry over (spec section 6).
- Every process of a run goes through the same lines; what they must agree on they vote on once a step (`_admit`).
- Asked to stop by a signal it finishes the step, saves and leaves; the same command goes on (signals.py).
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from openvision.data.loader import Batch, InputSpec, Loader, LoaderOptions
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.in_training import check_evaluators, due, less_is_better, measure_in_training
from openvision.files import make_folder
from openvision.provenance import describe_run
from openvision.recipe.schema import Recipe, Stage, dump_recipe
from openvision.runtime import SINGLE_PROCESS, Processes, resolve_precision
from openvision.training.checkpoint.folders import checkpoints
from openvision.training.checkpoint.manager import Checkpoints
from openvision.training.data import open_training_data, open_validation_data, ordering_of, to_device
from openvision.training.guards import Jump, refuse_together, watch_loss, why_broken
from openvision.training.losses import Losses
from openvision.training.objective import build_objective
from openvision.training.optimizer import build_optimizer, learning_rate
from openvision.training.randomness import Draws
from openvision.training.run import messages as reporting
from openvision.training.run.folder import claim_data, claim_recipe, claim_tokenizer
from openvision.training.run.log import RunLog
from openvision.training.run.sessions import Record
from openvision.training.run.signals import Interrupted, StopRequest, clear_requeue, mark_requeue
from openvision.training.run.throughput import Meter
from openvision.training.run.watchdog import Watchdog
from openvision.training.setup.model import build_spread, whole_model
from openvision.training.step import Step
from openvision.training.validation import headline, validate
from openvision.weights.folder import save_folder

__all__ = ["Interrupted", "Trainer"]


class Trainer:
    """One run of one recipe in one folder; `run` trains what is left of it."""

    def __init__(
        self,
        recipe: Recipe,
        data_folder: str | Path,
        run_folder: Path,
        processes: Processes = SINGLE_PROCESS,
        force: bool = False,
    ) -> None:
        """Open the data, the tokenizer and the newest checkpoint, if the run was begun before.

        `force` accepts a recipe or data other than the run was begun with, and records it.
        """
        self.recipe = recipe
        self.processes = processes
        self.run_folder = make_folder(run_folder)
        self.log: RunLog | reporting.NoLog = reporting.NoLog()
        accepted = self._first(lambda: claim_recipe(recipe, run_folder, force)) or []
        self.dataset = open_training_data(recipe, data_folder)
        self.validation = open_validation_data(recipe, data_folder)
        self.data_folder = data_folder
        check_evaluators(recipe.evaluate or (), data_folder, has_text=recipe.context_length is not None)
        data, changes = self._first(lambda: claim_data(self.dataset, run_folder, force)) or ({}, [])
        # The main process makes the tokenizer; the others wait for it and read it.
        self.tokenizer = self._first(lambda: claim_tokenizer(recipe, self.dataset, run_folder)) or claim_tokenizer(
            recipe, self.dataset, run_folder
        )
        self.objective = build_objective(recipe, self.tokenizer.bos_id, processes.group)
        self.precision = resolve_precision(recipe.run.precision, processes.device)
        self.spread = build_spread(recipe, processes, fresh=not checkpoints(run_folder / "checkpoints"))
        self.model = self.spread.module
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.stop = StopRequest()
        self.record = Record(run_folder, processes, self.spread.mode) if processes.is_main else None
        self.checkpoints = Checkpoints(
            run_folder / "checkpoints",
            processes,
            keep=recipe.run.checkpoints_kept,
            say=self._say,
            written_by={"mode": self.spread.mode, "manifest_sha256": self.dataset.manifest_hash()},
        )
        self.progress = self.checkpoints.restore(self.model, self.optimizer)
        if self.record is not None:
            accepted = [*accepted, *changes]
            self.record.begin(dump_recipe(recipe), data, recipe.seed, self.progress.step, accepted)
        # A signal that comes after the vote of a step waits for the next one: all processes leave after the same step.
        self._leaving = self._save_due = False
        self._last_save = time.monotonic()
        self._jump: Jump | None = None
        self._caption_tokens = 0.0

    @property
    def model_folder(self) -> Path:
        """Where the trained model is written."""
        return self.run_folder / "model"

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self.progress.step == self.recipe.steps

    def run(self) -> None:
        """Train to the end and write the model folder; raises Interrupted after saving when asked to stop."""
        with ExitStack() as open_parts:
            if self.processes.is_main:
                clear_requeue(self.run_folder)
                self.log = open_parts.enter_context(RunLog(self.recipe, self.run_folder, self.progress.step))
            open_parts.callback(self.checkpoints.close)
            open_parts.enter_context(self.stop)
            limit = self.recipe.run.hang_seconds
            self.watchdog = open_parts.enter_context(Watchdog(self.run_folder, self.processes.rank, limit, self._say))
            self._say(
                reporting.announcement(self.recipe, self.progress, self.spread, len(self.dataset), self.precision),
                main_only=True,
            )
            for index, stage in enumerate(self.recipe.stages):
                if index >= self.progress.stage:
                    self._run_stage(index, stage)
            self._write_model()

    def _run_stage(self, index: int, stage: Stage) -> None:
        if index > self.progress.stage:
            self.progress.stage, self.progress.stage_step = index, 0
            self.optimizer = build_optimizer(self.model, self.recipe.optimizer)
        step = Step(
            self.model, self.objective, self.optimizer, self.precision, stage.accumulate, self.spread, self._admit
        )
        meter = Meter(self.processes.device, reporting.peak_of(self.recipe, self.processes.device, self.processes.size))
        with self._loader(stage) as loader:
            batches = iter(loader)
            while self.progress.stage_step < stage.steps:
                self._step(step, stage, batches, meter)
                with meter.paused():
                    self._evaluate(stage)
                    if self._leaving or self._save_due or self._due(self.recipe.run.checkpoint_every, stage):
                        self._save()
                if self._leaving:
                    self._leave()
            for line in reporting.left_out(loader, self.recipe):
                self.log.say(line)

    def _step(self, step: Step, stage: Stage, batches: Iterator[Batch], meter: Meter) -> None:
        """One update and what is written about it."""
        self.model.train()
        rate = learning_rate(stage, self.progress.stage_step)
        logged = self._due(self.recipe.run.log_every, stage, after=1)
        self._beat("waiting for a batch")
        with meter.wait():
            batch = to_device(next(batches), self.processes.device)
        draws = Draws(self.recipe.seed, batch.positions, stage.drop_path)
        self._beat("forward, backward and update")
        try:
            losses = step(batch, draws, rate, measure=logged)
        except OpenVisionError as error:
            raise OpenVisionError(f"step {self.progress.step + 1}: {error}") from error
        self._advance(stage, batch, meter)
        self.log.step(self.progress.step, f"stage {self.progress.stage + 1} at {stage.resolution} px")
        if self._jump is not None:
            self.log.event(reporting.where(self.progress, stage), self._jump.describe())
        if logged:
            self._log_step(step, stage, losses, rate, meter)

    def _log_step(self, step: Step, stage: Stage, losses: Losses, rate: float, meter: Meter) -> None:
        own = losses.values()
        values = dict(zip(own, self.processes.mean(list(own.values())), strict=True))
        numbers = {**values, "lr": rate, **step.norms(), **meter.read()}
        left = reporting.seconds_left(self.recipe, self.progress, self._caption_tokens)
        self.log.train(reporting.where(self.progress, stage), numbers, left)

    def _admit(self, losses: Losses, gradient_norm: Tensor) -> bool:
        """Whether a step may update the parameters, and what else all processes decide together.

        Raises OpenVisionError in every process when a loss or gradient of any is not finite.
        """
        self._beat("agreeing with the other processes")
        broken = why_broken(losses, gradient_norm)
        minutes = self.recipe.run.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._last_save > 60 * minutes
        flags = [bool(broken), self.stop.wanted, self.stop.requeue, late]
        any_broken, self._leaving, requeue, self._save_due = self.processes.any_rank(flags)
        if any_broken:
            refuse_together(broken, self.processes)
        if self._leaving:
            self.stop.ask(requeue)
        self._jump = None
        if self.recipe.guards.spikes != "off":
            (loss,) = self.processes.mean([losses.total.item()])
            self._jump = watch_loss(loss, self.progress, self.recipe.guards)
        return self._jump is None or not self._jump.skipped

    def _advance(self, stage: Stage, batch: Batch, meter: Meter) -> None:
        """Count the step that was done."""
        if self.progress.stage_step == 0:
            self.processes.shorten_timeouts(self.recipe.parallel.step_seconds)
        self._caption_tokens = batch.label_mask.sum().item() / len(batch.images)
        flops = reporting.sample_flops(self.recipe, stage, self._caption_tokens) * stage.batch_size
        self.progress.step += 1
        self.progress.stage_step += 1
        self.progress.position += stage.batch_size
        self.progress.tflops += flops / 1e12
        self.progress.seconds += meter.step(stage.batch_size, flops)

    def _due(self, every: int, stage: Stage, after: int = 0) -> bool:
        """Whether something is done every so many steps, and at the end of the stage, `after` steps from now."""
        step = self.progress.stage_step + after
        return step % every == 0 or step == stage.steps

    def _loader(self, stage: Stage) -> Loader:
        rank = self.processes.rank
        inputs = InputSpec(
            stage.resolution, self.recipe.context_length, self.recipe.caption_length, self.recipe.augment
        )
        return Loader(
            self.dataset,
            self.tokenizer,
            inputs,
            batch_size=stage.batch_size,
            seed=self.recipe.seed,
            start=self.progress.position,
            options=LoaderOptions(
                ordering=ordering_of(self.recipe),
                threads=self.recipe.run.loader_threads,
                workers=self.recipe.run.loader_workers,
                rank=rank,
                world_size=self.processes.size,
                reject_budget=self.recipe.data.reject_budget,
                rejects_file=self.run_folder / (f"rejects-{rank:05d}.jsonl" if rank else "rejects.jsonl"),
            ),
        )

    def _evaluate(self, stage: Stage) -> None:
        """Measure what is due after this step, on the validation split and by the recipe's evaluators."""
        every, last = self.recipe.run.evaluate_every, self.progress.stage_step == stage.steps
        evaluators = due(self.recipe.evaluate or (), self.progress.stage_step, every, last)
        split = self.validation if self._due(every, stage) else None
        if split is None and not evaluators:
            return
        self._beat("measuring on the validation shards")
        model, numbers = self._whole_model(), {}
        if evaluators:
            measured = measure_in_training(
                evaluators, model, self.tokenizer, self.data_folder, stage.resolution, beat=self._beat
            )
            numbers |= measured
            self.log.evaluation({**reporting.where(self.progress, stage), "split": "evaluators"}, measured)
        if split is not None:
            measured = validate(model, self.tokenizer, split, stage.resolution, self.processes)
            numbers |= measured
            self.log.evaluation({**reporting.where(self.progress, stage), "split": "validation"}, measured)
            self.log.say(f"step {self.progress.step}: {headline(measured)}")
        self._remember_best(numbers)

    def _beat(self, what: str) -> None:
        """This process is alive and begins something."""
        self.watchdog.beat(self.progress.step, what)

    def _remember_best(self, numbers: dict[str, float]) -> None:
        """Mark this step as the best so far, which has it saved and kept."""
        metric = self.recipe.run.checkpoint_best
        if metric is None:
            return
        if metric not in numbers:
            # An evaluator may have a period of its own; the last step of a stage measures everything.
            if self.progress.stage_step < self.recipe.stages[self.progress.stage].steps:
                return
            raise OpenVisionError(f"run.checkpoint_best {metric!r} is not measured; known are {', '.join(numbers)}")
        value, best = numbers[metric], self.progress.best
        if best is None or (value < best["value"] if less_is_better(metric) else value > best["value"]):
            self.progress.best = {"value": value, "step": self.progress.step}
            self._save_due = True

    def _save(self) -> None:
        self._beat("saving")
        self.optimizer.require_finite()
        self.checkpoints.save(self.model, self.optimizer, self.progress)
        self._last_save = time.monotonic()
        if self.record is not None:
            self.record.reached(self.progress.step)

    def _leave(self) -> None:
        """The state has been handed over for saving: wait until it is on disk, and go."""
        self.checkpoints.finish()
        message = f"stopped after step {self.progress.step}; the same command goes on from there"
        stop = Interrupted(message, self.stop.exit_code)
        if self.record is not None:
            self.record.reached(self.progress.step, "stopped by the scheduler" if self.stop.requeue else "interrupted")
            if self.stop.requeue:
                mark_requeue(self.run_folder, self.progress.step)
        raise stop

    def _whole_model(self) -> Any:
        """The model as it is measured and written, all parameters in full; all processes must ask."""
        with self.optimizer.averaged():
            # Averaged parameters lie where the trained ones lie only as long as the context lasts.
            averaged = self.recipe.optimizer.ema is not None
            state = self.spread.whole_state()
            state = {name: tensor.clone() for name, tensor in state.items()} if averaged else state
        return whole_model(self.recipe, state)

    def _write_model(self) -> None:
        self.checkpoints.finish()
        model = self._whole_model()
        if self.record is None:
            return
        self.record.reached(self.progress.step, "finished")
        toml = dump_recipe(self.recipe)
        provenance = describe_run(toml, self.dataset.manifest_hash(), self.recipe.seed, sys.argv)
        provenance |= {
            "samples_seen": self.progress.position,
            "training_seconds": round(self.progress.seconds, 1),
            "training_tflops": round(self.progress.tflops, 1),
            "precision": str(self.precision).removeprefix("torch."),
            "updates_skipped": self.progress.skipped,
            **self.record.summary(),
        }
        save_folder(self.model_folder, model, self.tokenizer, toml, provenance)

    def _first(self, work: Any) -> Any:
        """`work` done by the main process before the others go on; None in those."""
        result = work() if self.processes.is_main else None
        self.processes.barrier()
        return result

    def _say(self, message: str, main_only: bool = False) -> None:
        """A line for a person, from any process and any thread."""
        if not isinstance(self.log, reporting.NoLog):
            self.log.say(message)
        elif not main_only:
            print(message, flush=True)
