"""A training run from recipe to model folder: stages of steps, with evaluations and checkpoints between them.

- Data order, crops, jitter and the choice of captions are functions of (seed, position): a resumed run is the
  uninterrupted one, bit for bit on a CPU.
- Each stage starts its own optimizer state and schedule; only parameters carry over (spec section 6).
- A signal finishes the step, saves and exits; the same command resumes (run/signals.py).
"""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from openvision.data.shards.dataset import ShardDataset
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator
from openvision.evaluation.evaluators.in_training import (
    WHEN_OUT_OF_MEMORY,
    due,
    less_is_better,
    measure_in_training,
)
from openvision.files import make_folder
from openvision.planning.remedy import step_memory
from openvision.provenance import describe_run
from openvision.recipe.schema import Recipe, dump_recipe
from openvision.recipe.sections import Stage
from openvision.renamed import read_metrics
from openvision.runtime import SINGLE_PROCESS, Processes, describe_memory, explain_out_of_memory, join_processes
from openvision.training.guards import deferred_guard, require_finite_parameters
from openvision.training.run.display import lasting_output
from openvision.training.run.folder import lock_run, release
from openvision.training.run.log import METRICS, NoLog, RunLog
from openvision.training.run.signals import Interrupted, StopRequest, begin_session, clear_requeue, mark_requeue
from openvision.training.run.startup import active_watch
from openvision.training.run.throughput import Meter, total_peak_flops
from openvision.training.run.watchdog import Watchdog, report_once
from openvision.training.setup.data import (
    DeviceBatches,
    describe_left_out,
    describe_passes,
    describe_unused,
    open_loader,
)
from openvision.training.setup.parts import set_up_run
from openvision.training.step import Agreed, Step, is_due, log_position
from openvision.training.validation import headline, validate
from openvision.weights.folder import save_folder

__all__ = ["Interrupted", "Trainer", "launch"]


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
        """Set up the run, or resume it from its newest checkpoint; arguments as of `set_up_run`."""
        self.log: RunLog | NoLog = NoLog()
        self.stop = StopRequest()
        begin_session()
        if processes.is_main:
            # First of all: a start that fails must not look like a stop.
            clear_requeue(run_folder)
        self.parts = set_up_run(recipe, data_folder, run_folder, processes, force, self._say)
        self.recipe, self.processes, self.progress = self.parts.recipe, processes, self.parts.progress
        self.model_folder = run_folder / "model"
        self.watchdog = Watchdog(run_folder, processes.rank, recipe.run.hang_seconds, self._say)
        self.guard = deferred_guard(recipe.guards, self.progress, processes)
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end and write the model folder; raises Interrupted after saving when asked to stop."""
        with ExitStack() as open_parts:
            open_parts.push(self._release)
            if self.processes.is_main:
                self.log = open_parts.enter_context(RunLog(self.recipe, self.parts.folder, self.progress.step))
                lines = [self.parts.describe(), *describe_left_out(self.parts.dataset)]
                if not self.progress.step:
                    lines += describe_passes(self.recipe, self.parts.dataset)
                for line in lines:
                    self.log.say(line)
            open_parts.callback(self.parts.checkpoints.close)
            open_parts.enter_context(self.stop)
            if (watch := active_watch()) is not None:
                watch.begin_training()
            open_parts.enter_context(self.watchdog)
            for index, stage in enumerate(self.recipe.stages):
                if index > self.progress.stage:
                    self.progress.stage, self.progress.stage_step = index, 0
                    self.parts.optimizer.state.clear()
                if index == self.progress.stage:
                    self._run_stage(stage)
            self._write_model()

    def _release(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give a new run's folder back when not even its first step could be taken."""
        if kind is not None and self.processes.is_main and self.parts.new and not self.progress.step:
            release(self.parts.folder)

    def _run_stage(self, stage: Stage) -> None:
        parts, progress, settings = self.parts, self.progress, self.recipe.run
        device = self.processes.device
        meter = Meter(device, total_peak_flops(device, self.processes.size, settings.peak_tflops))
        with open_loader(
            self.recipe,
            stage,
            parts.dataset,
            parts.tokenizer,
            self.processes,
            progress.position,
            parts.folder,
            parts.features,
        ) as loader:
            batches = DeviceBatches(iter(loader), device)
            step = Step(parts, stage, batches, meter, self.log, self.watchdog, self.stop, self.guard)
            minutes = settings.checkpoint_minutes
            if progress.stage_step and self._evaluate(stage, missing=True):
                self._save(again=True)
            while progress.stage_step < stage.steps:
                with step_memory(self.recipe, progress.stage, self.processes, parts.precision):
                    agreed = step(None if minutes is None else self._saved_at + 60 * minutes)
                last = progress.stage_step == stage.steps
                save_due = is_due(progress.stage_step, settings.checkpoint_every, stage.steps)
                save = agreed.stop or agreed.checkpoint or save_due
                evaluators, split = self._due_evaluations(stage)
                # A pause makes the host wait for the device: after a step that nothing follows there is none.
                if save or evaluators or split is not None:
                    with meter.paused():
                        if save:
                            self._save()
                        if last:
                            # An evaluation that fails or hangs must not cost the stage.
                            parts.checkpoints.finish()
                        if self._evaluate(stage):
                            self._save(again=True)
                if agreed.stop:
                    self._leave(agreed)
            if self.processes.is_main:
                for line in describe_unused(loader, self.recipe.context_length, self.recipe.reads_synthetic):
                    self.log.say(line)

    def _evaluate(self, stage: Stage, missing: bool = False) -> bool:
        """Evaluate what is due after this step; returns whether this step is the best so far.

        `missing` leaves out what the log of a resumed run has of this step.
        """
        parts, last = self.parts, self.progress.stage_step == stage.steps
        evaluators, split = self._due_evaluations(stage)
        done = self._evaluated() if missing else set[str]()
        evaluators = [] if "evaluators" in done else evaluators
        split = None if "validation" in done else split
        if split is None and not evaluators:
            return False
        self._beat("evaluating on the validation shards")
        # The gradients are not read again, and an accelerator needs room for the model as it is evaluated.
        parts.optimizer.zero_grad(set_to_none=True)
        with explain_out_of_memory(self._no_room):
            model = parts.full_model().to(self.processes.device)
        position = log_position(self.progress, stage.resolution)
        numbers: dict[str, float] = {}
        if evaluators:
            numbers = measure_in_training(
                evaluators,
                model,
                parts.tokenizer,
                parts.data_folder,
                stage.resolution,
                processes=self.processes,
                beat=self._beat,
            )
            self.log.evaluation({**position, "split": "evaluators"}, numbers)
        if split is not None:
            native = stage.native is not None
            measured = validate(model, parts.tokenizer, split, stage.resolution, self.processes, native)
            self.log.evaluation({**position, "split": "validation"}, measured)
            if self.processes.is_main:
                self.log.say(f"step {self.progress.step}: {headline(measured)}")
            numbers = numbers | measured
        return self._is_best(numbers, last)

    def _due_evaluations(self, stage: Stage) -> tuple[list[Evaluator], ShardDataset | None]:
        """The evaluators and the validation split that are due after this step."""
        step, every = self.progress.stage_step, self.recipe.run.evaluate_every
        split = self.parts.validation if is_due(step, every, stage.steps) else None
        return due(self.parts.evaluators, step, every, step == stage.steps), split

    def _evaluated(self) -> set[str]:
        """The splits of this step in the log of the run; the same in all processes."""
        path, found = self.parts.folder / METRICS, set[str]()
        if self.processes.is_main and path.exists():
            lines = (line for line in read_metrics(path) if line["step"] == self.progress.step)
            found = {line["split"] for line in lines if line["kind"] == "eval"}
        return self.processes.broadcast(found)

    def _no_room(self) -> str:
        memory = describe_memory(self.processes.device)
        return f"out of memory on {memory} for the parameters to be evaluated; {WHEN_OUT_OF_MEMORY}"

    def _is_best(self, numbers: dict[str, float], last: bool) -> bool:
        """Whether `run.checkpoint_best` has its best value so far, which is then remembered with the step."""
        metric, best = self.recipe.run.checkpoint_best, self.progress.best
        # An evaluator may have a period of its own; the last step of a stage measures everything.
        if metric is None or (metric not in numbers and not last):
            return False
        if metric not in numbers:
            raise OpenVisionError(f"run.checkpoint_best {metric!r} is not measured; known are {', '.join(numbers)}")
        value = numbers[metric]
        if best is not None and not (value < best["value"] if less_is_better(metric) else value > best["value"]):
            return False
        self.progress.best = {"value": value, "step": self.progress.step}
        return True

    def _save(self, again: bool = False) -> None:
        """Save a checkpoint; `again` replaces that of this step, which is now the best."""
        self._beat("saving")
        if self.guard is not None:
            resolution = self.recipe.stages[self.progress.stage].resolution
            for step, spike in self.guard.settle(self.parts.optimizer):
                self.log.event(log_position(self.progress, resolution), spike.describe(step))
        require_finite_parameters(self.parts.optimizer)
        self.parts.checkpoints.save(self.parts.model.module, self.parts.optimizer, self.progress, again)
        self._saved_at = time.monotonic()
        if self.parts.record is not None:
            self.parts.record.reached(self.progress.step)

    def _leave(self, agreed: Agreed) -> None:
        """Wait until the checkpoint is on disk, and stop."""
        self.parts.checkpoints.finish()
        _expect_the_end()
        self.stop.ask(agreed.requeue)
        message = f"stopped after step {self.progress.step}; the same command resumes from there"
        if self.parts.record is not None:
            ended = "stopped by the scheduler" if self.stop.requeue else "interrupted"
            self.parts.record.reached(self.progress.step, ended)
            if self.stop.requeue:
                try:
                    mark_requeue(self.parts.folder, f"after step {self.progress.step}")
                except OpenVisionError as error:
                    self._say(str(error))
        raise Interrupted(message, self.stop.exit_code)

    def _write_model(self) -> None:
        parts, progress = self.parts, self.progress
        parts.checkpoints.finish()
        model = parts.full_model()
        _expect_the_end()
        if parts.record is None:
            return
        parts.record.reached(progress.step, "finished")
        toml = dump_recipe(self.recipe)
        provenance = describe_run(toml, parts.dataset.manifest_hash(), self.recipe.seed, sys.argv)
        provenance |= {
            "samples_seen": progress.position,
            "training_seconds": round(progress.seconds, 1),
            "training_tflops": round(progress.tflops, 1),
            "precision": str(parts.precision).removeprefix("torch."),
            "updates_skipped": progress.skipped,
            **parts.record.summary(),
        }
        save_folder(self.model_folder, model, parts.tokenizer, toml, provenance)

    def _beat(self, what: str) -> None:
        """Tell the watchdog that this process is alive and begins something."""
        self.watchdog.beat(self.progress.step, what)

    def _say(self, message: str) -> None:
        """Print a line for a person, from any process and any thread."""
        self.log.say(message)


def _expect_the_end() -> None:
    """Processes of this run may end from now on without being lost."""
    if (watch := active_watch()) is not None:
        watch.end_training()


def launch(recipe: Recipe, data_folder: str | Path, run_folder: Path, force: bool = False) -> Path | None:
    """Train what is left of a run, alone or as one of the processes that torchrun started.

    Returns the folder of the trained model, None in all processes but the main one. Raises Interrupted when the run was
    asked to stop and has saved its state.
    """
    make_folder(run_folder)
    with (
        lasting_output(),
        join_processes(
            recipe.parallel.start_timeout_seconds, recipe.parallel.replicate, recipe.run.device
        ) as processes,
    ):
        lock = lock_run(run_folder, processes)
        trainer: Trainer | None = None

        def how_far() -> str:
            return "before the first step" if trainer is None else f"step {trainer.progress.step + 1}"

        with lock, report_once(run_folder, processes.rank, processes.size, how_far):
            trainer = Trainer(recipe, data_folder, run_folder, processes, force)
            trainer.run()
        return trainer.model_folder if processes.is_main else None
