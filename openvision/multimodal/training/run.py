"""A run from a built model to a trained one: stages, features of a frozen encoder, checkpoints, going on after kill -9.

    run/recipe.toml               the resolved recipe
    run/metrics.jsonl             loss, learning rates, samples a second
    run/rejects.jsonl             samples left out, with the reason
    run/stages/0-align/           checkpoints, and the model once the stage is done
    run/model/                    the trained model, as `openvision vlm build` writes one

The same command goes on with what is left. Under torchrun every process runs `train`; only the first one writes.
"""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openvision.errors import OpenVisionError
from openvision.files import atomic_folder, atomic_write_text, make_folder
from openvision.multimodal.data.collate import Collator
from openvision.multimodal.data.dataset import Collection, ConversationDataset, Rules, read_hub_dataset, read_llava_json
from openvision.multimodal.data.feature_cache import CachedTower, FeatureCache, encoder_key, patch_features
from openvision.multimodal.model.build import PROVENANCE
from openvision.multimodal.model.generate import Assistant, load_assistant
from openvision.multimodal.model.stock import quiet, transformers
from openvision.multimodal.recipe import Stage, VlmRecipe, dump_vlm_recipe
from openvision.multimodal.training.answer_logits import answer_logits_only
from openvision.multimodal.training.modules import add_lora, choose_trained, merge_lora
from openvision.multimodal.training.trainer import (
    Watch,
    count_trained,
    last_checkpoint,
    load_trained,
    make_trainer,
    trained_state,
)
from openvision.multimodal.training.word_alignment import align_words, count_words
from openvision.provenance import describe_run
from openvision.runtime import resolve_precision

# Tokens of a sample up to which attention is written out on a CPU (gain: benchmarks/vlm_attention.py); beyond, scores
# need much memory.
SHORT_SAMPLE = 256
# Reads of a feature from which computing it beforehand pays.
_READS = 1.5
_TYPES = {"llava-1.5": "llava", "llava-next": "llava_next"}


def train(recipe: VlmRecipe, model: Path, data: Path, run: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Train `model` by `recipe` on the data folder into the run folder; returns the folder of the trained model.

    `say` is told one line at a time. Raises OpenVisionError for anything the user can mend, Interrupted after Ctrl-C or
    SIGTERM when the state is saved.
    """
    return _Run(recipe, model, data, make_folder(run), say if _is_main() else lambda _: None).train()


class _Run:
    """One run; processes of torchrun each hold one."""

    def __init__(self, recipe: VlmRecipe, model: Path, data: Path, run: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.start, self.data, self.run, self.say = recipe, model, data, run, say
        self.model_folder = run / "model"
        rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.precision = resolve_precision(recipe.run.precision, self.device)
        self._claim_folder()

    def train(self) -> Path:
        """Run what is left."""
        folder = self.start
        for index, stage in enumerate(self.recipe.stages):
            last = index == len(self.recipe.stages) - 1
            target = self.model_folder if last else self._stage_folder(index) / "model"
            if not (target / "config.json").is_file():
                self._run_stage(index, stage, folder, target)
            folder = target
        return self.model_folder

    def _run_stage(self, index: int, stage: Stage, start: Path, target: Path) -> None:
        """Train one stage from the model in `start` and write the result to `target`."""
        arguments = self._arguments(index, stage)
        assistant = load_assistant(start, "cpu", "float32")
        self._check_framework(assistant)
        collection = self._collection(stage)
        for line in collection.report():
            self.say(f"{stage.name}  {line}")
        dataset = ConversationDataset(
            collection.records, assistant.processor, assistant.geometry, stage.aspect, stage.max_length, self._rules()
        )
        self._set_steps(arguments, stage, len(dataset))
        self._prepare(assistant, stage, self.recipe.seed + index)
        self._use_cache(assistant, dataset, stage, arguments)
        self._set_objective(assistant, dataset, stage)
        if self.device.type == "cpu" and max(dataset.lengths()) <= SHORT_SAMPLE:
            assistant.model.model.language_model.set_attn_implementation("eager")
        watch = Watch(stage.name, self.run / "metrics.jsonl", self.say, stage.batch_size)
        trainer = make_trainer(
            assistant.model, dataset, self._collator(assistant, dataset, stage), arguments, stage, watch
        )
        checkpoint = last_checkpoint(Path(arguments.output_dir), arguments.should_save)
        self._announce(stage, assistant, trainer, len(dataset), checkpoint)
        with _stop_on_signal(watch), quiet():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < arguments.max_steps:
            # The command line knows it; importing it brings the encoder's trainer along.
            from openvision.training.trainer import Interrupted

            raise Interrupted(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
        state = trained_state(trainer)
        if arguments.should_save:
            self._write(stage, start, target, state, index)
            shutil.rmtree(arguments.output_dir, ignore_errors=True)
        _wait(arguments)
        for reason, count in sorted(dataset.rejected.items()):
            self.say(f"{stage.name}  samples replaced, {reason}: {count}")

    def _prepare(self, assistant: Assistant, stage: Stage, seed: int) -> None:
        """Freeze and unfreeze, and put LoRA in."""
        if stage.lora is not None:
            add_lora(assistant.model, stage.lora, seed)
        choose_trained(assistant.model, stage.learning_rate, stage.lora)

    def _set_objective(self, assistant: Assistant, dataset: ConversationDataset, stage: Stage) -> None:
        if stage.objective == "words":
            special = assistant.processor.tokenizer.all_special_ids
            align_words(assistant.model, count_words(dataset.answers(), special))
        else:
            answer_logits_only(assistant.model)

    def _write(self, stage: Stage, start: Path, target: Path, state: dict[str, Any], index: int) -> None:
        """What the stage began with, what it trained, merged: a stock model."""
        assistant = load_assistant(start, "cpu", "float32")
        self._prepare(assistant, stage, self.recipe.seed + index)
        load_trained(assistant.model, state)
        if stage.lora is not None:
            merge_lora(assistant.model)
        text = dump_vlm_recipe(self.recipe)
        made = describe_run(text, "", self.recipe.seed, ["openvision", "vlm", "train"]) | {"stage": stage.name}
        built = start / PROVENANCE
        if built.is_file():
            made["built"] = json.loads(built.read_text(encoding="utf-8"))
        with atomic_folder(target) as temporary, quiet():
            assistant.model.save_pretrained(temporary)
            assistant.processor.save_pretrained(temporary)
            (temporary / PROVENANCE).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
            (temporary / "recipe.toml").write_text(text, encoding="utf-8")

    def _use_cache(self, assistant: Assistant, dataset: ConversationDataset, stage: Stage, arguments: Any) -> None:
        """Give the data set features in place of pixels, where the encoder is frozen and that is wanted."""
        choice = self.recipe.run.cache_features
        if stage.learning_rate.encoder is not None:
            if choice == "always":
                self.say(f"{stage.name}  the encoder is trained: no features are cached")
            return
        if choice == "never":
            return
        pictures = [picture for record in dataset.records for picture in record.pictures]
        reads = arguments.max_steps * stage.batch_size * len(pictures) / len(dataset)
        folder = Path(self.recipe.run.cache_folder or self.run / "features")
        model = assistant.model
        cache = FeatureCache(
            folder, encoder_key(model, assistant.processor, self.precision), assistant.geometry, self.precision
        )
        # Before anything is hashed: pictures read once are not worth it, unless another run has left their features.
        if choice == "auto" and not len(cache) and reads < _READS * len(set(pictures)):
            return
        missing = cache.missing(pictures, stage.aspect)
        _wait(arguments)
        if choice == "auto" and not self._worth_it(cache, len(missing), reads):
            return
        share = missing[arguments.process_index :: arguments.world_size]
        if share:
            model.model.vision_tower.to(self.device)
            with self._autocast():
                cache.fill(share, dataset, partial(patch_features, model), self._tell_features(stage))
        _wait(arguments)
        cache.scan()
        dataset.features = cache
        model.model.vision_tower = CachedTower(assistant.geometry.prefix_tokens, assistant.geometry.depth)

    def _worth_it(self, cache: FeatureCache, missing: int, reads: float) -> bool:
        """Whether features are read more often than computed, and fit on the disk with room to spare."""
        enough = shutil.disk_usage(cache.folder).free / 2
        return reads >= _READS * missing and cache.bytes_for(missing) < enough

    def _tell_features(self, stage: Stage) -> Callable[[int, float], None]:
        told = 0.0

        def tell(done: int, share: float) -> None:
            nonlocal told
            if share - told >= 0.1 or share >= 1:
                told = share
                self.say(f"{stage.name}  features of {done} pictures  {share:.0%}")

        return tell

    def _autocast(self) -> Any:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def _collection(self, stage: Stage) -> Collection:
        rules = self._rules()
        if stage.hub is not None:
            return read_hub_dataset(stage.hub.name, stage.hub.config, stage.hub.split, rules)
        return read_llava_json([self.data / file for file in stage.files], self.data / stage.images, rules)

    def _rules(self) -> Rules:
        rejects = self.run / "rejects.jsonl" if _is_main() else None
        return Rules(self.recipe.image_first, self.recipe.run.bad_samples == "skip", rejects)

    def _collator(self, assistant: Assistant, dataset: ConversationDataset, stage: Stage) -> Collator:
        return Collator(
            assistant.processor.tokenizer.pad_token_id,
            assistant.processor.image_token_id,
            assistant.geometry,
            packed=self.recipe.run.batching == "packed" and stage.objective == "answers",
            blank=_world_size() > 1 or stage.learning_rate.llm is None,
            cached=dataset.features is not None,
        )

    def _arguments(self, index: int, stage: Stage) -> Any:
        run, rates = self.recipe.run, stage.learning_rate
        micro = min(stage.micro_batch or run.micro_batch, max(1, stage.batch_size // _world_size()))
        if stage.batch_size % (micro * _world_size()):
            raise OpenVisionError(
                f"stage {stage.name}: batch_size {stage.batch_size} is no multiple of micro_batch {micro} times "
                f"{_world_size()} processes; set micro_batch, the stage's or run's, to a divisor"
            )
        fsdp = {"fsdp": True, "fsdp_config": {"version": 2}} if run.fsdp and _world_size() > 1 else {}
        arguments = transformers().TrainingArguments(
            output_dir=str(self._stage_folder(index) / "checkpoints"),
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=stage.batch_size // (micro * _world_size()),
            learning_rate=max(rate for rate in rates.model_dump().values() if rate is not None),
            lr_scheduler_type=stage.schedule,
            weight_decay=stage.weight_decay,
            bf16=self.precision == torch.bfloat16,
            use_cpu=self.device.type == "cpu",
            tf32=True if self.device.type == "cuda" else None,
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
        if arguments.n_gpu > 1:
            raise OpenVisionError(
                f"{arguments.n_gpu} GPUs are visible to one process; start it with torchrun --nproc-per-node "
                f"{arguments.n_gpu}, or set CUDA_VISIBLE_DEVICES to one"
            )
        return arguments

    def _set_steps(self, arguments: Any, stage: Stage, samples: int) -> None:
        arguments.max_steps = math.ceil((stage.samples or samples) / stage.batch_size)
        arguments.warmup_steps = math.ceil(stage.warmup_ratio * arguments.max_steps)

    def _check_framework(self, assistant: Assistant) -> None:
        found = assistant.model.config.model_type
        if found != _TYPES[self.recipe.framework]:
            raise OpenVisionError(
                f"{assistant.folder} is a {found}, the recipe is for {self.recipe.framework}; build the model with "
                f"--framework {self.recipe.framework}"
            )

    def _announce(
        self, stage: Stage, assistant: Assistant, trainer: Any, samples: int, checkpoint: Path | None
    ) -> None:
        counts = count_trained(assistant.model)
        trained = ", ".join(f"{module} {count / 1e6:.2f}M" for module, count in counts.items())
        begun = f"going on from {checkpoint.name}" if checkpoint else "beginning"
        self.say(
            f"{stage.name}  {begun}: {samples} samples, {trainer.args.max_steps} steps of {stage.batch_size}; trained: "
            f"{trained}; {str(self.precision).removeprefix('torch.')} on {self.device.type}, "
            f"processes: {_world_size()}{', sharded' if trainer.is_fsdp_enabled else ''}"
        )
        if self.recipe.run.fsdp and _world_size() > 1 and not trainer.is_fsdp_enabled:
            self.say(f"{stage.name}  run.fsdp shards on accelerators only: every process holds the whole model")

    def _stage_folder(self, index: int) -> Path:
        return self.run / "stages" / f"{index}-{self.recipe.stages[index].name}"

    def _claim_folder(self) -> None:
        path, resolved = self.run / "recipe.toml", dump_vlm_recipe(self.recipe)
        if not path.exists():
            if _is_main():
                atomic_write_text(path, resolved)
        elif path.read_text(encoding="utf-8") != resolved:
            raise OpenVisionError(
                f"{self.run} holds a run of another recipe (compare {path}); choose another run folder"
            )


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _wait(arguments: Any) -> None:
    if arguments.world_size > 1:
        torch.distributed.barrier()


@contextmanager
def _stop_on_signal(watch: Watch) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request that is honoured after the step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(*_: Any) -> None:
        watch.stop_requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
