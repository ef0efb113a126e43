"""A training run from recipe to model folder: stages, steps, measurements, checkpoints, exact continuation.

- Data order, crops, jitter and the choice of captions are functions of (seed, position): a continued run is the
  uninterrupted one, bit for bit on a CPU.
- Each stage starts its own optimizer and schedule; only parameters carry over (spec section 6).
- Ctrl-C or SIGTERM finishes the step, saves and leaves; the same command goes on.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from openvision.data.loader import Loader, Reading
from openvision.errors import OpenVisionError
from openvision.evaluation.suite import evaluate_split
from openvision.files import atomic_write_text, make_folder
from openvision.models.flops import training_flops
from openvision.models.openvision import OpenVision
from openvision.provenance import describe_run
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint
from openvision.training.data import open_training_data, open_validation_data, ordering_of
from openvision.training.metrics import MetricsLog
from openvision.training.optimizer import build_optimizer
from openvision.training.progress import TrainingDisplay
from openvision.training.recipe import Recipe, Stage, dump_recipe
from openvision.training.schedule import learning_rate
from openvision.training.step import resolve_precision, train_step
from openvision.weights.folder import save_folder


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop and has saved its state."""


class Trainer:
    """One run of one recipe in one folder; `run` trains what is left of it."""

    def __init__(self, recipe: Recipe, data_folder: str | Path, run_folder: Path) -> None:
        """Open the data, the tokenizer and the newest checkpoint, if the run was begun before."""
        self.recipe = recipe
        self.run_folder = make_folder(run_folder)
        self._claim_folder()
        self.dataset = open_training_data(recipe, data_folder)
        self.validation = open_validation_data(recipe, data_folder)
        self.tokenizer = self._tokenizer()
        self.precision = resolve_precision(recipe.run.precision, torch.device("cpu"))
        torch.manual_seed(recipe.seed)
        self.model = OpenVision(recipe.model)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.progress = self._resume()
        self.stop_requested = False

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
        metrics = MetricsLog(self.run_folder / "metrics.jsonl", self.progress.step)
        try:
            with TrainingDisplay(self.recipe.steps) as display, self._stop_on_signal():
                self._announce(display)
                for index, stage in enumerate(self.recipe.stages):
                    if index >= self.progress.stage:
                        self._run_stage(index, stage, metrics, display)
        finally:
            metrics.close()
        self._write_model()

    def _run_stage(self, index: int, stage: Stage, metrics: MetricsLog, display: TrainingDisplay) -> None:
        if index > self.progress.stage:
            self.progress.stage, self.progress.stage_step = index, 0
            self.optimizer = build_optimizer(self.model, self.recipe.optimizer)
        flops = training_flops(self.recipe.model, stage.resolution, len(self.recipe.loss.texts)) * stage.batch_size
        with self._loader(stage) as loader:
            batches = iter(loader)
            mark = time.perf_counter()
            since_log = 0.0
            while self.progress.stage_step < stage.steps:
                rate = learning_rate(stage, self.progress.stage_step)
                values = self._step(next(batches), rate)
                self.progress.step += 1
                self.progress.stage_step += 1
                self.progress.position = loader.position
                self.progress.tflops += flops / 1e12
                now = time.perf_counter()
                self.progress.seconds += now - mark
                since_log += now - mark
                display.step(self.progress.step, f"stage {index + 1} at {stage.resolution} px")
                if self._due(self.recipe.run.log_every, stage):
                    steps = self.progress.stage_step % self.recipe.run.log_every or self.recipe.run.log_every
                    speed = stage.batch_size * steps / since_log
                    self._log(stage, values, rate, speed, metrics, display)
                    since_log = 0.0
                if self._due(self.recipe.run.evaluate_every, stage):
                    self._evaluate(stage, metrics, display)
                if self.stop_requested or self._due(self.recipe.run.checkpoint_every, stage):
                    self._save()
                if self.stop_requested:
                    raise Interrupted(f"stopped after step {self.progress.step}; the same command goes on from there")
                mark = time.perf_counter()
            self._report_rejected(loader, display)

    def _due(self, every: int, stage: Stage) -> bool:
        return self.progress.stage_step % every == 0 or self.progress.stage_step == stage.steps

    def _step(self, batch: Any, rate: float) -> dict[str, float]:
        self.model.train()
        try:
            return train_step(self.model, self.optimizer, batch, self.recipe.loss, rate, self.precision)
        except OpenVisionError as error:
            raise OpenVisionError(f"step {self.progress.step + 1}: {error}") from error

    def _loader(self, stage: Stage) -> Loader:
        return Loader(
            self.dataset,
            self.tokenizer,
            resolution=stage.resolution,
            batch_size=stage.batch_size,
            context_length=self.recipe.model.text.context_length,
            caption_length=self.recipe.caption_length,
            augment=self.recipe.augment,
            seed=self.recipe.seed,
            start=self.progress.position,
            reading=Reading(
                ordering=ordering_of(self.recipe),
                threads=self.recipe.run.loader_threads,
                workers=self.recipe.run.loader_workers,
                reject_budget=self.recipe.data.reject_budget,
                rejects_file=self.run_folder / "rejects.jsonl",
            ),
        )

    def _log(
        self,
        stage: Stage,
        values: dict[str, float],
        rate: float,
        speed: float,
        metrics: MetricsLog,
        display: TrainingDisplay,
    ) -> None:
        metrics.write("train", {**self._where(stage), **values, "lr": rate, "images_per_second": round(speed, 1)})
        display.log(self.progress.step, values, speed, self._seconds_left())

    def _where(self, stage: Stage) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "stage": self.progress.stage,
            "resolution": stage.resolution,
            "samples": self.progress.position,
            "seconds": round(self.progress.seconds, 3),
            "tflops": round(self.progress.tflops, 3),
        }

    def _seconds_left(self) -> float:
        """Compute left over the rate of compute so far: later stages cost more a step."""
        texts = len(self.recipe.loss.texts)
        total = sum(
            stage.steps * stage.batch_size * training_flops(self.recipe.model, stage.resolution, texts)
            for stage in self.recipe.stages
        )
        done = self.progress.tflops * 1e12
        return (total - done) * self.progress.seconds / done

    def _evaluate(self, stage: Stage, metrics: MetricsLog, display: TrainingDisplay) -> None:
        if self.validation is None:
            return
        self.model.eval()
        result = evaluate_split(self.model, self.tokenizer, self.validation, stage.resolution)
        numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
        metrics.write("eval", {**self._where(stage), "split": "validation", **numbers})
        display.say(
            f"step {self.progress.step}: validation zero-shot top-1 {result['top1']:.1%}, top-5 {result['top5']:.1%}"
        )

    def _save(self) -> None:
        save_checkpoint(self.run_folder / "checkpoints", self.model, self.optimizer, self.progress)

    def _resume(self) -> Progress:
        found = checkpoints(self.run_folder / "checkpoints")
        return load_checkpoint(found[-1], self.model, self.optimizer) if found else Progress()

    def _write_model(self) -> None:
        toml = dump_recipe(self.recipe)
        provenance = describe_run(toml, self.dataset.manifest_hash(), self.recipe.seed, sys.argv)
        provenance |= {
            "samples_seen": self.progress.position,
            "training_seconds": round(self.progress.seconds, 1),
            "training_tflops": round(self.progress.tflops, 1),
            "precision": str(self.precision).removeprefix("torch."),
        }
        save_folder(self.model_folder, self.model, self.tokenizer, toml, provenance)

    def _tokenizer(self) -> Tokenizer:
        """The run's own tokenizer, learnt or copied on the first start."""
        folder = self.run_folder / "tokenizer"
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
        data = self.recipe.data
        if data.tokenizer is not None:
            path = Path(data.tokenizer)
            tokenizer = Tokenizer.from_vocabulary(path) if path.suffix == ".txt" else Tokenizer.load(path)
        else:
            assert data.vocab_size is not None
            tokenizer = Tokenizer.train(self.dataset.texts(), data.vocab_size)
        smallest = min(c.vocab_size for c in (self.recipe.model.text, self.recipe.model.decoder) if c is not None)
        if tokenizer.vocab_size > smallest:
            raise OpenVisionError(
                f"the tokenizer has {tokenizer.vocab_size} entries, the model only {smallest}: raise vocab_size"
            )
        make_folder(folder)
        tokenizer.save(folder)
        return tokenizer

    def _claim_folder(self) -> None:
        """Write the resolved recipe into the run folder, or refuse to go on with another one."""
        path, resolved = self.run_folder / "recipe.toml", dump_recipe(self.recipe)
        if not path.exists():
            atomic_write_text(path, resolved)
        elif path.read_text(encoding="utf-8") != resolved:
            raise OpenVisionError(
                f"{self.run_folder} holds a run of another recipe (compare {path}); choose another run folder"
            )

    def _announce(self, display: TrainingDisplay) -> None:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        vision = sum(parameter.numel() for parameter in self.model.vision.parameters())
        verb = f"going on from step {self.progress.step} of" if self.progress.step else "training"
        display.say(
            f"{verb} {self.recipe.name}: {len(self.dataset)} samples, {parameters / 1e6:.1f}M parameters "
            f"({vision / 1e6:.1f}M in the vision encoder), {len(self.recipe.stages)} stages, "
            f"{self.recipe.steps} steps, "
            f"{str(self.precision).removeprefix('torch.')} on {torch.get_num_threads()} threads"
        )

    def _report_rejected(self, loader: Loader, display: TrainingDisplay) -> None:
        for reason, count in sorted(loader.rejected.items()):
            display.say(f"rejected samples, {reason}: {count}")
        if loader.captions_missing and self.recipe.reads_synthetic:
            display.say(f"samples without a synthetic caption, alt-text taken: {loader.captions_missing}")
        if loader.texts_cut:
            length = self.recipe.model.text.context_length
            display.say(f"texts longer than {length} ids, cut: {loader.texts_cut}")

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a request that is honoured after the step."""

        if threading.current_thread() is not threading.main_thread():
            # Python lets only the main thread take signals; a run in another thread is stopped by its owner.
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True

        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
