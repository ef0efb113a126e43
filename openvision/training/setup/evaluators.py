"""Evaluators of a recipe: its tables `[[evaluate]]`, parsed and checked before training begins."""

from pathlib import Path

from openvision.evaluation.evaluators.base import Evaluator, parse_evaluators
from openvision.evaluation.evaluators.in_training import check_evaluators
from openvision.recipe.schema import Recipe
from openvision.recipe.sections import EvaluatorTable


def complete_evaluators(recipe: Recipe, source: str) -> Recipe:
    """`recipe` with the defaults of its evaluators filled in.

    Raises OpenVisionError that names `source` and the key for an option that an evaluator does not have.
    """
    if not recipe.evaluate:
        return recipe
    parsed = _parse(recipe.evaluate, source)
    tables = tuple(EvaluatorTable(**one.model_dump(mode="json", exclude_none=True)) for one in parsed)
    return recipe.model_copy(update={"evaluate": tables})


def build_evaluators(recipe: Recipe, data_folder: str | Path) -> list[Evaluator]:
    """Evaluators that run during training.

    Raises OpenVisionError for an unknown option, for missing data, and for a text evaluator without a text tower.
    """
    evaluators = _parse(recipe.evaluate, f"recipe {recipe.name}") if recipe.evaluate else []
    check_evaluators(
        evaluators,
        data_folder,
        has_text=recipe.context_length is not None,
        has_decoder=recipe.caption_length is not None,
    )
    return evaluators


def _parse(tables: tuple[EvaluatorTable, ...], source: str) -> list[Evaluator]:
    return parse_evaluators([table.model_dump(exclude_unset=True) for table in tables], source)
