"""`transformers.Trainer` with learning rates by module, our order of samples, and checkpoints of what is trained only.

No checkpoint holds a frozen weight, and none counts until a file says that it is complete.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import append_text, atomic_write_text, read_json_lines
from openvision.multimodal.data.sampler import SampleOrder
from openvision.multimodal.model.stock import transformers
from openvision.multimodal.recipe import Stage
from openvision.multimodal.training.modules import module_of, parameter_groups

COMPLETE = "complete"
_WEIGHTS = "model.safetensors"


@dataclass
class Watch:
    """What happens around steps: the log, the line for a person, the wish to stop."""

    stage: str
    metrics: Path
    say: Callable[[str], None]
    batch_size: int
    stop_requested: bool = False


def make_trainer(model: Any, dataset: Any, collator: Any, arguments: Any, stage: Stage, watch: Watch) -> Any:
    """A trainer of one stage; the class is made here because transformers is imported late."""
    library = transformers()

    class VlmTrainer(library.Trainer):
        """See the module."""

        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            """AdamW with a learning rate for each module."""
            if self.optimizer is None:
                groups = parameter_groups(model or self.model, stage.learning_rate, stage.weight_decay)
                self.optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.999), eps=1e-8)
            return self.optimizer

        def _get_train_sampler(self, train_dataset: Any = None) -> SampleOrder:
            lengths = dataset.lengths() if arguments.train_sampling_strategy == "group_by_length" else None
            return SampleOrder(len(dataset), stage.batch_size, arguments.max_steps, arguments.seed, lengths)

        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            if arguments.should_save:
                folder = Path(output_dir or arguments.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(_trained(self.model, state_dict), folder / _WEIGHTS, metadata={"format": "pt"})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                load_trained(model or self.model, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    trainer = VlmTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[_make_callback(watch)],
    )
    # Ours says it all.
    trainer.remove_callback(library.PrinterCallback)
    return trainer


def trained_state(trainer: Any) -> dict[str, Tensor]:
    """Everything the stage trained, on CPU, gathered where it is sharded; to be called by every process."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    return _trained(trainer.accelerator.unwrap_model(trainer.model), state)


def load_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put trained weights into a model that has been set up for the stage; raises OpenVisionError when names differ."""
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if expected != state.keys():
        different = sorted(expected ^ state.keys())
        raise OpenVisionError(
            f"the checkpoint trains other weights than the recipe: {different[:5]}; choose another run"
        )
    model.load_state_dict(state, strict=False)


def last_checkpoint(folder: Path, main: bool) -> Path | None:
    """The newest complete checkpoint; `main` removes what kill -9 left incomplete."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete.append((int(path.name.rpartition("-")[2]), path))
        elif main:
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def _trained(model: nn.Module, state: dict[str, Any] | None) -> dict[str, Tensor]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if state is None:
        state = dict(model.named_parameters())
    elif not state:
        # Sharded training gathers on the main process only.
        return {}
    return {name: state[name].detach().cpu().contiguous() for name in names}


def _make_callback(watch: Watch) -> Any:
    library = transformers()

    class WatchCallback(library.TrainerCallback):
        """Writes the log, marks checkpoints complete, honours the wish to stop."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start, self.first = time.perf_counter(), state.global_step
            if args.should_save:
                _forget(watch.metrics, watch.stage, state.global_step)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kept: Any
        ) -> None:
            if not args.should_save or not logs or "loss" not in logs:
                return
            seconds = time.perf_counter() - self.start
            rate = (state.global_step - self.first) / seconds
            rates = {f"lr_{group['module']}": group["lr"] for group in kept["optimizer"].param_groups}
            line = {
                "kind": "train",
                "stage": watch.stage,
                "step": state.global_step,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                **rates,
                "samples_per_second": round(rate * watch.batch_size, 2),
            }
            append_text(watch.metrics, json.dumps(line) + "\n")
            minutes, rest = divmod(round((state.max_steps - state.global_step) / rate), 60)
            watch.say(
                f"{watch.stage}  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"{rate * watch.batch_size:.1f} samples/s  {minutes}:{rest:02d} left"
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if watch.stop_requested:
                control.should_save = control.should_training_stop = True
            return control

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.should_save:
                atomic_write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE, "")

    return WatchCallback()


def _forget(metrics: Path, stage: str, step: int) -> None:
    """Drop lines of steps that are taken again."""
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
