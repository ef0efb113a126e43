"""The parts of a run, made or restored from its folder: data, tokenizer, model, objective, optimizer, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from openvision.data.mixture import Mixture
from openvision.data.shards.dataset import ShardDataset
from openvision.data.stored_features import StoredFeatures
from openvision.errors import OpenVisionError
from openvision.evaluation.evaluators.base import Evaluator
from openvision.files import JsonObject, make_folder
from openvision.frozen.autoencoder import open_autoencoder
from openvision.frozen.perceptual import open_perceptual
from openvision.models.openvision2 import AnyModel
from openvision.models.openvision3 import OpenVision3Config
from openvision.recipe.schema import Recipe, dump_recipe
from openvision.runtime import (
    SINGLE_PROCESS,
    Processes,
    describe_device,
    resolve_precision,
    use_deterministic_algorithms,
    use_float32_matmul,
)
from openvision.terminal import echo
from openvision.text.tokenizer import Tokenizer
from openvision.training.checkpoint.folders import Progress, checkpoints
from openvision.training.checkpoint.manager import Checkpoints
from openvision.training.dense import with_dense
from openvision.training.distillation import distilled, load_teachers
from openvision.training.objective import Objective, build_objective
from openvision.training.optimizer.adam import Adam
from openvision.training.optimizer.build import build_optimizer
from openvision.training.optimizer.update import averaged_parameters
from openvision.training.run.folder import (
    claim_data,
    claim_recipe,
    claim_tokenizer,
    compare_data,
    compare_recipe,
    is_claimed,
)
from openvision.training.run.sessions import SessionHistory
from openvision.training.setup.data import (
    check_batches,
    open_training_data,
    open_validation_data,
    order_has_changed,
    require_same_data,
)
from openvision.training.setup.evaluators import build_evaluators, complete_evaluators
from openvision.training.setup.model import build_distributed_model, full_model
from openvision.training.setup.parallel import DistributedModel


@dataclass(frozen=True)
class RunParts:
    """What the steps, evaluations and checkpoints of a run work with."""

    recipe: Recipe
    folder: Path
    processes: Processes
    data_folder: str | Path
    dataset: Mixture
    validation: ShardDataset | None
    tokenizer: Tokenizer
    model: DistributedModel
    objective: Objective
    optimizer: Adam
    precision: torch.dtype
    checkpoints: Checkpoints
    progress: Progress
    evaluators: list[Evaluator]
    """What is evaluated beside the validation split."""
    features: tuple[StoredFeatures, ...]
    """What the loader reads beside the images: features of teachers with a cache."""
    record: SessionHistory | None
    """The session history; only the main process has it."""
    new: bool
    """Whether this session claimed the folder; only the main process knows."""

    def full_model(self) -> AnyModel:
        """The model as it is evaluated and written, all parameters in full, averaged ones where the recipe averages.

        All processes must call it.
        """
        with averaged_parameters(self.optimizer):
            state = self.model.full_state_dict()
            if self.recipe.optimizer.ema is not None:
                # The averages stand in the place of the trained parameters only as long as the context lasts.
                state = {name: tensor.clone() for name, tensor in state.items()}
        return full_model(self.recipe.model_after(self.progress.stage), state)

    def describe(self) -> str:
        """One line: what is trained, on what, how."""
        recipe, processes = self.recipe, self.processes
        sizes = {name: parameter.numel() for name, parameter in self.model.module.named_parameters()}
        total, vision = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("vision."))
        step = self.progress.step
        if step == recipe.steps:
            return f"run {recipe.name} is finished: all {step} steps are trained"
        start = f"resuming {recipe.name} from step {step}" if step else f"training {recipe.name}"
        many = f"{processes.size} processes ({self.model.mode}), " if processes.size > 1 else ""
        return (
            f"{start}: {_counted(len(self.dataset), 'sample')}, {total / 1e6:.1f}M parameters ({vision / 1e6:.1f}M in "
            f"the vision encoder), {_counted(len(recipe.stages), 'stage')}, {_counted(recipe.steps, 'step')}, {many}"
            f"{describe_device(processes.device, self.precision, recipe.run.precision, recipe.run.float32_matmul)}"
        )


def set_up_run(
    recipe: Recipe,
    data_folder: str | Path,
    run_folder: Path,
    processes: Processes = SINGLE_PROCESS,
    force: bool = False,
    say: Callable[[str], None] = echo,
) -> RunParts:
    """Open the data and the tokenizer, build the model, and restore the newest checkpoint if the run has one.

    `force` accepts a recipe or data other than the run was begun with, and records it; `say` is told what a person
    should know. Raises OpenVisionError for what does not fit or cannot be read.
    """
    precision = resolve_precision(recipe.run.precision, processes.device)
    recipe = complete_evaluators(recipe, f"recipe {recipe.name}")
    make_folder(run_folder)
    new = not is_claimed(run_folder)
    if processes.is_main:
        compare_recipe(recipe, run_folder, force)
    # A refused recipe ends the run before the other processes open the data.
    processes.barrier()
    dataset = open_training_data(recipe.data, data_folder, recipe.reads_synthetic)
    validation = open_validation_data(recipe.data, data_folder)
    require_same_data(processes, [dataset, validation])
    check_batches(recipe, dataset)
    with processes.main_first():
        # What is downloaded is downloaded once; what is missing ends the run now and not at the stage that needs it.
        _open_frozen(recipe)
    evaluators = build_evaluators(recipe, data_folder)
    with processes.main_first():
        if processes.is_main:
            compare_data(dataset, run_folder, force)
        # The main process makes the tokenizer; the others read it.
        reuse, started = not (processes.is_main and new), list[str]()
        tokenizer = claim_tokenizer(recipe, dataset, run_folder, started.append, reuse)

    use_float32_matmul(recipe.run.float32_matmul)
    use_deterministic_algorithms(recipe.run.deterministic)
    # A run that has checkpoints is filled from one: `recipe.start` is not read again.
    start, warm = recipe.start, recipe.warm_start
    if checkpoints(run_folder / "checkpoints"):
        start, warm = None, warm and warm.model_copy(update={"text": None})
    taught = load_teachers(recipe.teacher or (), recipe.augment, dataset.sources)
    for one in taught:
        started.append(one.description)
        if one.teacher is not None:
            one.teacher.to(processes.device)
    model = build_distributed_model(
        recipe.model,
        recipe.run,
        recipe.parallel,
        processes,
        recipe.seed,
        start,
        started.append,
        taught,
        warm,
        tokenizer,
        recipe.dense,
    )
    objective = distilled(build_objective(model, recipe.loss, tokenizer.bos_id), model, taught)
    optimizer = build_optimizer(model.module, recipe.optimizer, precision)
    store = Checkpoints(
        run_folder / "checkpoints",
        processes,
        keep=recipe.run.checkpoints_kept,
        say=say,
        written_by={
            "mode": model.mode,
            "distinct": recipe.is_contrastive,
            "manifest_sha256": dataset.manifest_hash(),
            "device": processes.device.type,
            "precision": str(precision).removeprefix("torch."),
        },
    )
    progress = store.restore(model.module, optimizer)
    was_distinct = store.restored.get("distinct", False) is True
    reordered = [] if was_distinct else _reordered(recipe, dataset, progress, run_folder, force)
    record = None
    if processes.is_main:
        record = SessionHistory(run_folder, processes, model.mode)
        # The folder is claimed last: a start that fails leaves it to any recipe.
        url = isinstance(data_folder, str) and "://" in data_folder
        facts = {"folder": data_folder if url else str(Path(data_folder).resolve())}
        accepted = claim_recipe(recipe, run_folder, force)
        identity, changes = claim_data(dataset, run_folder, force, facts)
        moved = _moved(store.restored, store.written_by)
        for line in started:
            say(line)
        if moved is not None:
            say(f"{moved}: allowed, and not bit-identical to a run on one kind of device")
        differences = [*accepted, *changes, *reordered]
        record.begin(dump_recipe(recipe), identity, recipe.seed, progress.step, differences, moved, started)
    return RunParts(
        recipe=recipe,
        folder=run_folder,
        processes=processes,
        data_folder=data_folder,
        dataset=dataset,
        validation=validation,
        tokenizer=tokenizer,
        model=model,
        objective=with_dense(objective, model, recipe.dense),
        optimizer=optimizer,
        precision=precision,
        checkpoints=store,
        progress=progress,
        evaluators=evaluators,
        features=tuple(stored for one in taught if one.cache is not None for stored in one.cache.stored()),
        record=record,
        new=new,
    )


def _open_frozen(recipe: Recipe) -> None:
    """Open the frozen networks that any stage of OpenVision 3 uses; raises OpenVisionError for what is missing."""
    if not isinstance(recipe.model, OpenVision3Config) or recipe.loss.reconstruction is None:
        return
    open_autoencoder(recipe.model.vision.autoencoder)
    if any(stage.perceptual for stage in recipe.stages):
        open_perceptual(recipe.loss.reconstruction.perceptual, recipe.loss.reconstruction.folder)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _reordered(recipe: Recipe, data: Mixture, progress: Progress, run_folder: Path, force: bool) -> list[str]:
    """The difference that `force` accepts, of a run whose order could repeat an image in a batch, if it would differ.

    Raises OpenVisionError without `force`.
    """
    if progress.step == 0 or not order_has_changed(recipe, data, progress):
        return []
    if not force:
        raise OpenVisionError(
            f"{run_folder} was started by a version whose batches could hold an image twice, and from step "
            f"{progress.step} on this one reads some samples in another order; finish the run with that version, start "
            "a new one from its weights, or resume with --force, which is recorded"
        )
    return ["order: an image could be in a batch twice -> each image at most once in a batch"]


def _moved(before: JsonObject, now: JsonObject) -> str | None:
    """A sentence when the restored checkpoint was written on another kind of device; None otherwise.

    Checkpoints of earlier versions do not say where they were written.
    """
    if before.get("device", now["device"]) == now["device"]:
        return None
    was, is_now = (f"{by['precision']} on {by['device']}" for by in (before, now))
    return f"the checkpoint was written in {was}, this session continues in {is_now}"
