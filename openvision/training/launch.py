"""A run as the command line starts it: alone, or one of the processes that torchrun started."""

from pathlib import Path

from openvision.files import make_folder
from openvision.recipe.schema import Recipe
from openvision.runtime import join_processes
from openvision.training.run.watchdog import clear_failure, report_once
from openvision.training.trainer import Trainer


def launch(recipe: Recipe, data_folder: str | Path, run_folder: Path, force: bool = False) -> Path | None:
    """Train what is left of a run; returns the folder of the trained model, None in all processes but the main one.

    Raises Interrupted when the run was asked to stop and has saved its state.
    """
    make_folder(run_folder)
    with join_processes(recipe.parallel.start_timeout_seconds, recipe.parallel.replicate) as processes:
        if processes.is_main:
            clear_failure(run_folder)
        processes.barrier()
        trainer: Trainer | None = None

        def how_far() -> str:
            return "before the first step" if trainer is None else f"step {trainer.progress.step + 1}"

        with report_once(run_folder, processes.rank, processes.size, how_far):
            trainer = Trainer(recipe, data_folder, run_folder, processes, force)
            trainer.run()
        return trainer.model_folder if processes.is_main else None
