"""A training run of a LLaVA model: stages, cached features, checkpoints, resume after kill -9.

    run/recipe.toml               the resolved recipe
    run/metrics.jsonl             loss, learning rates, samples a second
    run/LOCK                      locked by the main process: one trainer at a time
    run/rejects.jsonl             dropped samples and reasons
    run/stages/0-align/           checkpoints, and the model when the stage is complete
    run/model/                    the trained model, in the format of `openvision vlm build`

The same command resumes the run. Under torchrun every process calls `train`; only the main process writes.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from openvision.errors import OpenVisionError, require
from openvision.files import atomic_folder, atomic_write_text, make_folder
from openvision.multimodal.data.batching import Collator
from openvision.multimodal.data.dataset import (
    Collection,
    ConversationDataset,
    ReadOptions,
    read_hub_dataset,
    read_llava_json,
)
from openvision.multimodal.data.feature_cache import CachedTower, FeatureCache, encoder_key, patch_features
from openvision.multimodal.data.images import ImageSource
from openvision.multimodal.model.build import PROVENANCE
from openvision.multimodal.model.generate import Assistant, load_assistant
from openvision.multimodal.model.geometry import Aspect, model_geometry, set_budget
from openvision.multimodal.model.huggingface import Llava, quiet, transformers
from openvision.multimodal.recipe import VlmRecipe, VlmStage, dump_vlm_recipe, is_vlm_recipe
from openvision.multimodal.training.modules import add_lora, choose_trained, merge_lora
from openvision.multimodal.training.objectives import AnswerLoss, Objective, WordAlignment, count_words
from openvision.multimodal.training.trainer import (
    StageLog,
    agreed_stop,
    count_trained,
    last_checkpoint,
    load_trained,
    make_trainer,
    on_one_device,
    trained_state,
)
from openvision.provenance import describe_run
from openvision.runtime import (
    Processes,
    autocast,
    describe_device,
    describe_memory,
    explain_out_of_memory,
    has_tf32,
    resolve_device,
    resolve_precision,
    use_float32_matmul,
)
from openvision.training.run.folder import lock_run
from openvision.training.run.signals import Interrupted, StopRequest, begin_session, clear_requeue, mark_requeue
from openvision.training.run.startup import active_watch
from openvision.training.run.watchdog import report_once

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# Tokens of a sample up to which eager attention is used on a CPU (gain: benchmarks/vlm_attention.py); the attention
# scores of longer ones need much memory.
SHORT_SAMPLE = 256
# Reads of a feature from which caching it pays.
_READS = 1.5
_TYPES = {"llava-1.5": "llava", "llava-next": "llava_next", "llava-native": "llava"}


def train(
    recipe: VlmRecipe,
    model: Path,
    data: Path,
    run: Path,
    say: Callable[[str], None] = lambda _: None,
    device: str = "auto",
) -> Path:
    """Train the model in folder `model` by `recipe`, and return the folder of the trained model.

    `data` holds the files named in the recipe, `run` checkpoints and results; `say` prints one line of progress;
    `device` as for `resolve_device`. Raises OpenVisionError for bad input, and Interrupted after SIGINT, SIGTERM or
    SIGUSR1 when the state is saved.
    """
    chosen = resolve_device(device)
    if chosen.type == "cuda" and "RANK" in os.environ and chosen.index != int(os.environ.get("LOCAL_RANK", 0)):
        # accelerate looks at the rank alone.
        raise OpenVisionError(
            f"device {device} under torchrun, where a process takes the device of its rank; use cuda, and choose "
            "devices with CUDA_VISIBLE_DEVICES"
        )
    precision = resolve_precision(recipe.run.precision, chosen)
    # Not left to transformers, which refuses the rounding on a device without it, and takes another API of torch.
    use_float32_matmul(recipe.run.float32_matmul if has_tf32(chosen) else "highest")
    # Joins the processes of torchrun, as the Trainer would do later.
    require("accelerate", extra="vlm").PartialState(cpu=chosen.type == "cpu", timeout=timedelta(minutes=30))
    processes = Processes.current()
    say = say if processes.is_main else lambda _: None
    return _VlmRun(recipe, data, make_folder(run), say, processes, chosen, precision).train(model)


@dataclass(frozen=True)
class _VlmRun:
    """One run, in each of its processes."""

    recipe: VlmRecipe
    data: Path
    run: Path
    say: Callable[[str], None]
    processes: Processes
    device: torch.device
    precision: torch.dtype

    def train(self, model: Path) -> Path:
        """Train the stages that are not complete."""
        begin_session()
        with (
            lock_run(self.run, self.processes),
            report_once(self.run, self.processes.rank, self.processes.size, lambda: "training a language model"),
        ):
            if self.processes.is_main:
                clear_requeue(self.run)
            self._claim_folder()
            return self._train_stages(model)

    def _train_stages(self, model: Path) -> Path:
        last = len(self.recipe.stages) - 1
        for index, stage in enumerate(self.recipe.stages):
            target = (self.run if index == last else self._stage_folder(index)) / "model"
            if not (target / "config.json").is_file():
                self._train_stage(index, stage, model, target)
            model = target
        return model

    def _train_stage(self, index: int, stage: VlmStage, start: Path, target: Path) -> None:
        """Train one stage from the model in `start` and write the result to `target`."""
        arguments = self._arguments(index, stage)
        assistant = self._load(start)
        self._check_framework(assistant)
        dataset = self._dataset(assistant, stage)
        arguments.max_steps = math.ceil((stage.samples or len(dataset)) / stage.batch_size)
        arguments.warmup_steps = math.ceil(stage.warmup_ratio * arguments.max_steps)
        self._choose_trained(assistant.model, index)
        self._cache_features(assistant.model, dataset, stage, arguments.max_steps * stage.batch_size)
        if self.device.type == "cpu" and max(dataset.lengths()) <= SHORT_SAMPLE:
            assistant.model.model.language_model.set_attn_implementation("eager")
        objective, collator = self._objective(assistant.model, dataset, stage), self._collator(dataset, stage)
        stop, watch = StopRequest(), active_watch()
        log = StageLog(stage, self.run / "metrics.jsonl", self.say)
        trainer = make_trainer(objective, dataset, collator, arguments, log, stop, self.processes)
        checkpoints = self._stage_folder(index) / "checkpoints"
        checkpoint = last_checkpoint(checkpoints, self.processes.is_main)
        self._announce(stage, trainer, objective, len(dataset), checkpoint)
        with stop, quiet(), explain_out_of_memory(partial(self._no_room, stage, arguments.per_device_train_batch_size)):
            if watch is not None:
                watch.begin_training()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if watch is not None:
                watch.end_training()
        stopped = agreed_stop(stop, self.processes)
        if trainer.state.global_step < arguments.max_steps:
            self._leave(trainer.state.global_step, stop)
        if watch is not None:
            watch.begin_work(f"after the steps of stage {stage.name}")
        state = trained_state(trainer)
        if self.processes.is_main:
            self._write(index, start, target, state)
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.processes.barrier()
        for reason, count in sorted(dataset.replaced.items()):
            self.say(f"{stage.name}  samples replaced, {reason}: {count}")
        if stopped and index < len(self.recipe.stages) - 1:
            self._leave(trainer.state.global_step, stop)

    def _load(self, folder: Path) -> Assistant:
        """A model on the CPU, with the recipe's budget of patches where it reads native shapes."""
        assistant = load_assistant(folder, "cpu", "float32")
        if self.recipe.max_tokens is None or assistant.geometry.native is None:
            return assistant
        set_budget(assistant.model.config, self.recipe.max_tokens)
        return replace(assistant, geometry=model_geometry(assistant.model.config))

    def _leave(self, step: int, stop: StopRequest) -> NoReturn:
        if stop.requeue and self.processes.is_main:
            mark_requeue(self.run, f"after step {step}")
        raise Interrupted(f"stopped after step {step}; the same command resumes the run", stop.exit_code)

    def _no_room(self, stage: VlmStage, micro_batch: int) -> str:
        return (
            f"out of memory on {describe_memory(self.device)} in stage {stage.name}, micro-batches of {micro_batch} "
            f"samples of up to {stage.max_length} tokens; choose another run folder and --set run.micro_batch="
            f"{max(1, micro_batch // 2)} or run.gradient_checkpointing=true"
        )

    def _dataset(self, assistant: Assistant, stage: VlmStage) -> ConversationDataset:
        rejects = self.run / "rejects.jsonl" if self.processes.is_main else None
        options = ReadOptions(self.recipe.image_first, self.recipe.run.bad_samples == "skip", rejects)
        collection = self._collection(stage, options)
        for line in collection.report():
            self.say(f"{stage.name}  {line}")
        return ConversationDataset(
            collection.samples, assistant.processor, assistant.geometry, stage.aspect, stage.max_length, options
        )

    def _collection(self, stage: VlmStage, options: ReadOptions) -> Collection:
        if stage.hub is not None:
            return read_hub_dataset(stage.hub.name, stage.hub.config, stage.hub.split, options)
        return read_llava_json([self.data / file for file in stage.files], self.data / stage.images, options)

    def _choose_trained(self, model: Llava, index: int) -> None:
        """Freeze and unfreeze modules, and add LoRA."""
        stage = self.recipe.stages[index]
        if stage.lora is not None:
            add_lora(model, stage.lora, self.recipe.seed + index)
        choose_trained(model, stage.learning_rate, stage.lora)

    def _objective(self, model: Llava, dataset: ConversationDataset, stage: VlmStage) -> Objective:
        if stage.objective == "words":
            return WordAlignment(model, count_words(dataset.answers(), dataset.processor.tokenizer.all_special_ids))
        return AnswerLoss(model)

    def _collator(self, dataset: ConversationDataset, stage: VlmStage) -> Collator:
        return Collator(
            dataset.processor.tokenizer.pad_token_id,
            dataset.processor.image_token_id,
            dataset.geometry,
            packed=self.recipe.run.batching == "packed" and stage.objective == "answers",
            blank=self.processes.size > 1 or stage.learning_rate.llm is None,
            cached=dataset.features is not None,
        )

    def _cache_features(self, model: Llava, dataset: ConversationDataset, stage: VlmStage, samples: int) -> None:
        """Replace pixels by cached features when the encoder is frozen, for `samples` samples of training."""
        choice = self.recipe.run.cache_features
        if stage.learning_rate.encoder is not None:
            if choice == "always":
                self.say(f"{stage.name}  the encoder is trained: its features are not cached")
            return
        if choice == "never":
            return
        images = [image for sample in dataset.samples for image in sample.images]
        key = encoder_key(model, dataset.processor, self.precision)
        folder = Path(self.recipe.run.cache_folder or self.run / "features")
        cache = FeatureCache(folder, key, dataset.geometry, self.precision)
        missing = None
        if self.processes.is_main:
            missing = _to_be_cached(cache, images, stage.aspect, samples * len(images) / len(dataset), choice)
        # Another run may be filling the same cache: the processes would see different features missing.
        missing = self.processes.broadcast(missing)
        if missing is None:
            return
        mine = [(missing[row][0], images[missing[row][1]]) for row in self.processes.rows(len(missing))]
        if mine:
            model.model.vision_tower.to(self.device)
            with autocast(self.device.type, self.precision):
                cache.fill(mine, dataset.pixels, partial(patch_features, model), self._report_features(stage))
        self.processes.barrier()
        cache.scan()
        dataset.features = cache
        model.model.vision_tower = CachedTower(
            dataset.geometry.prefix_tokens, dataset.geometry.depth, dataset.geometry.patch_size
        )

    def _report_features(self, stage: VlmStage) -> Callable[[int, float], None]:
        reported = 0.0

        def report(done: int, share: float) -> None:
            nonlocal reported
            if share - reported >= 0.1 or share >= 1:
                reported = share
                self.say(f"{stage.name}  features of {done} images  {share:.0%}")

        return report

    def _arguments(self, index: int, stage: VlmStage) -> "TrainingArguments":
        run, rates, size = self.recipe.run, stage.learning_rate, self.processes.size
        micro = min(stage.micro_batch or run.micro_batch, max(1, stage.batch_size // size))
        if stage.batch_size % (micro * size):
            raise OpenVisionError(
                f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of micro_batch {micro} times "
                f"{size} processes; set micro_batch of the stage or of run to a divisor"
            )
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2}} if run.fsdp and size > 1 else {}
        arguments = transformers().TrainingArguments(
            output_dir=str(self._stage_folder(index) / "checkpoints"),
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=stage.batch_size // (micro * size),
            learning_rate=max(rate for rate in rates.model_dump().values() if rate is not None),
            lr_scheduler_type=stage.schedule,
            weight_decay=stage.weight_decay,
            bf16=self.precision == torch.bfloat16,
            use_cpu=self.device.type == "cpu",
            seed=self.recipe.seed + index,
            logging_steps=run.log_every,
            save_strategy="steps",
            save_steps=run.checkpoint_every,
            save_total_limit=2,
            train_sampling_strategy="group_by_length" if run.batching == "length" else "random",
            dataloader_num_workers=run.loader_workers,
            remove_unused_columns=False,
            label_names=["labels"],
            ddp_find_unused_parameters=False,
            activation_checkpointing=run.gradient_checkpointing,
            report_to="none",
            disable_tqdm=True,
            **fsdp,
        )
        return on_one_device(arguments, self.device) if size == 1 else arguments

    def _check_framework(self, assistant: Assistant) -> None:
        found = assistant.model.config.model_type
        native = assistant.geometry.native is not None
        if found != _TYPES[self.recipe.framework] or native != (self.recipe.framework == "llava-native"):
            raise OpenVisionError(
                f"{assistant.folder} holds a {found} model{' of native shapes' if native else ''}, but the recipe is "
                f"for {self.recipe.framework}; build the model with --framework {self.recipe.framework}"
            )

    def _announce(
        self, stage: VlmStage, trainer: "Trainer", objective: Objective, samples: int, checkpoint: Path | None
    ) -> None:
        run, counts = self.recipe.run, count_trained(objective)
        trained = ", ".join(f"{module} {count / 1e6:.2f}M" for module, count in counts.items())
        start = f"resuming from {checkpoint.name}" if checkpoint else "starting"
        self.say(
            f"{stage.name}  {start}: {samples} samples, {trainer.args.max_steps} steps of {stage.batch_size}; trained: "
            f"{trained}; {describe_device(self.device, self.precision, run.precision, run.float32_matmul)}; "
            f"processes: {self.processes.size}{', sharded' if trainer.is_fsdp_enabled else ''}"
        )
        if self.recipe.run.fsdp and self.processes.size > 1 and not trainer.is_fsdp_enabled:
            self.say(f"{stage.name}  run.fsdp shards on accelerators only: every process holds the whole model")

    def _write(self, index: int, start: Path, target: Path, state: dict[str, Tensor]) -> None:
        """Write a stock model: the stage's initial model with the trained weights, LoRA merged."""
        stage = self.recipe.stages[index]
        assistant = self._load(start)
        self._choose_trained(assistant.model, index)
        load_trained(assistant.model, state)
        if stage.lora is not None:
            merge_lora(assistant.model)
        text = dump_vlm_recipe(self.recipe)
        provenance = describe_run(text, "", self.recipe.seed, ["openvision", "vlm", "train"]) | {"stage": stage.name}
        built = start / PROVENANCE
        if built.is_file():
            provenance["built"] = json.loads(built.read_text(encoding="utf-8"))
        with atomic_folder(target) as temporary, quiet():
            assistant.model.save_pretrained(temporary)
            assistant.processor.save_pretrained(temporary)
            (temporary / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
            (temporary / "recipe.toml").write_text(text, encoding="utf-8")

    def _stage_folder(self, index: int) -> Path:
        return self.run / "stages" / f"{index}-{self.recipe.stages[index].name}"

    def _claim_folder(self) -> None:
        path, resolved = self.run / "recipe.toml", dump_vlm_recipe(self.recipe)
        if not path.exists():
            if self.processes.is_main:
                atomic_write_text(path, resolved)
        elif not is_vlm_recipe(path.read_text(encoding="utf-8"), self.recipe):
            raise OpenVisionError(
                f"{self.run} holds a run of another recipe (compare {path}); choose another run folder"
            )


def _to_be_cached(
    cache: FeatureCache, images: Sequence[ImageSource], aspect: Aspect, reads: float, choice: str
) -> list[tuple[str, int]] | None:
    """What `FeatureCache.missing` says; None where features are not worth caching."""
    # Before hashing files: caching does not pay for images that are read once, unless a previous run cached them.
    if choice == "auto" and not len(cache) and reads < _READS * len(set(images)):
        return None
    missing = cache.missing(images, aspect)
    return None if choice == "auto" and not _worth_caching(cache, len(missing), reads) else missing


def _worth_caching(cache: FeatureCache, missing: int, reads: float) -> bool:
    """Whether features are read more often than computed, and take less than half of the free disk."""
    free = shutil.disk_usage(cache.folder).free
    return reads >= _READS * missing and cache.bytes_for(missing) < free / 2
