"""`transformers.Trainer` with learning rates by module, our own sample order, and checkpoints of trained weights only.

A checkpoint holds no frozen weight, and counts only when it contains the file `complete`.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import append_lines, atomic_write_text, read_json_lines
from openvision.multimodal.data.batching import Collator, SampleOrder
from openvision.multimodal.data.dataset import ConversationDataset
from openvision.multimodal.model.huggingface import transformers
from openvision.multimodal.recipe import VlmStage
from openvision.multimodal.training.modules import module_of, parameter_groups
from openvision.multimodal.training.objectives import Objective
from openvision.runtime import Processes
from openvision.training.run.signals import StopRequest

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

COMPLETE = "complete"
_WEIGHTS = "model.safetensors"


@dataclass
class StageLog:
    """Where a stage writes its metrics."""

    stage: VlmStage
    metrics: Path
    """JSON lines file."""
    say: Callable[[str], None]
    """Prints a line for the user."""


def make_trainer(
    objective: Objective,
    dataset: ConversationDataset,
    collator: Collator,
    arguments: "TrainingArguments",
    log: StageLog,
    stop: StopRequest,
    processes: Processes,
) -> "Trainer":
    """The trainer of one stage; the class is defined here because transformers is imported late."""
    library, stage = transformers(), log.stage

    class VlmTrainer(library.Trainer):
        """See the module."""

        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            """AdamW with a learning rate for each module."""
            if self.optimizer is None:
                groups = parameter_groups(model or self.model, stage.learning_rate, stage.weight_decay)
                self.optimizer = torch.optim.AdamW(
                    [{**group} for group in groups], lr=arguments.learning_rate, betas=(0.9, 0.999), eps=1e-8
                )
            return self.optimizer

        def _get_train_sampler(self, train_dataset: object = None) -> SampleOrder:
            lengths = dataset.lengths() if arguments.train_sampling_strategy == "group_by_length" else None
            return SampleOrder(len(dataset), stage.batch_size, arguments.max_steps, arguments.seed, lengths)

        def _save(self, output_dir: str | None = None, state_dict: Mapping[str, object] | None = None) -> None:
            if arguments.should_save:
                folder = Path(output_dir or str(arguments.output_dir))
                folder.mkdir(parents=True, exist_ok=True)
                save_file(_trained(self.model, state_dict), folder / _WEIGHTS, metadata={"format": "pt"})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_trained(model or self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    trainer = VlmTrainer(
        model=objective,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[_make_callback(log, stop, processes)],
    )
    # Its lines are in our log.
    trainer.remove_callback(library.PrinterCallback)
    return trainer


def on_one_device(arguments: "TrainingArguments", device: torch.device) -> "TrainingArguments":
    """The arguments for a run of one process on `device`.

    transformers takes cuda:0 for it and spreads every batch over all devices that it sees.
    """
    if device.type == "cuda":
        # The cached property of what transformers chose.
        vars(arguments)["_setup_devices"] = device
        arguments._n_gpu = 1
        # accelerate puts batches on the current device.
        torch.cuda.set_device(device)
    return arguments


def agreed_stop(stop: StopRequest, processes: Processes) -> bool:
    """Whether a process was asked to stop, which all of them do then; every process must call it.

    A signal reaches them in different steps, and whoever stops alone leaves the others waiting for it.
    """
    wanted, requeue = processes.any_rank([stop.wanted, stop.requeue])
    if wanted:
        stop.ask(requeue)
    return wanted


def trained_state(trainer: "Trainer") -> dict[str, Tensor]:
    """All trained weights on the CPU, gathered on the main process when sharded; every process must call it."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    return _trained(trainer.accelerator.unwrap_model(trainer.model), state)


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load trained weights into a model that is prepared for the stage; raises OpenVisionError when names differ."""
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if expected != state.keys():
        different = sorted(expected ^ state.keys())
        raise OpenVisionError(
            f"the checkpoint holds other trained weights than the recipe: {different[:5]}; choose another run folder"
        )
    model.load_state_dict(state, strict=False)


def last_checkpoint(folder: Path, main: bool) -> Path | None:
    """The newest complete checkpoint; the `main` process removes incomplete ones, which kill -9 leaves."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete.append((int(path.name.rpartition("-")[2]), path))
        elif main:
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def _trained(model: nn.Module, state: Mapping[str, object] | None) -> dict[str, Tensor]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if state is not None and not state:
        # Sharded weights are gathered on the main process only.
        return {}
    tensors = dict(model.named_parameters()) if state is None else state
    return {name: tensor.detach().cpu().contiguous() for name in names if isinstance(tensor := tensors[name], Tensor)}


def _make_callback(log: StageLog, stop: StopRequest, processes: Processes) -> "TrainerCallback":
    name, batch_size = log.stage.name, log.stage.batch_size

    class StageCallback(transformers().TrainerCallback):
        """Writes the log, marks checkpoints as complete, and stops after the step when asked to."""

        def on_train_begin(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
        ) -> None:
            self.start, self.first = time.perf_counter(), state.global_step
            if args.should_save:
                _drop_later_lines(log.metrics, name, state.global_step)

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            optimizer: torch.optim.Optimizer,
            logs: Mapping[str, float] | None = None,
            **_: object,
        ) -> None:
            if not args.should_save or not logs or "loss" not in logs:
                return
            seconds = time.perf_counter() - self.start
            rate = (state.global_step - self.first) / seconds
            line = {
                "kind": "train",
                "stage": name,
                "step": state.global_step,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                **{f"lr_{group['module']}": group["lr"] for group in optimizer.param_groups},
                "samples_per_second": round(rate * batch_size, 2),
            }
            append_lines(log.metrics, json.dumps(line) + "\n")
            minutes, rest = divmod(round((state.max_steps - state.global_step) / rate), 60)
            log.say(
                f"{name}  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"{rate * batch_size:.1f} samples/s  {minutes}:{rest:02d} left"
            )

        def on_step_end(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
        ) -> "TrainerControl":
            if agreed_stop(stop, processes):
                control.should_save = control.should_training_stop = True
            return control

        def on_save(
            self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **_: object
        ) -> None:
            if args.should_save:
                atomic_write_text(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE, "")

    return StageCallback()


def _drop_later_lines(metrics: Path, stage: str, step: int) -> None:
    """Drop the lines of steps after `step`, which are repeated."""
    if not metrics.exists():
        return
    lines = read_json_lines(metrics)
    kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
    atomic_write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trained parameters by module."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[module_of(name)] = counts.get(module_of(name), 0) + parameter.numel()
    return counts
