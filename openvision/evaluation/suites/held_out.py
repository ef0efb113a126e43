"""The whole evaluation of a run: both held-out sets, the model beside what needs no learning, one JSON file.

Held-out sets are read here and in the report only; every choice (prompts, learning rates, sizes) is made on the
validation split, which training measures through `evaluate_split`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from openvision.data.shards.dataset import ShardDataset
from openvision.encoding import PLAIN, class_embeddings, encode_images, text_encoder
from openvision.errors import OpenVisionError
from openvision.evaluation.data.split import Split, read_split
from openvision.evaluation.evaluators.baselines import evaluate_baselines, known_pictures
from openvision.evaluation.evaluators.retrieval import retrieval
from openvision.evaluation.evaluators.zero_shot import candidates_of, classification, classification_ranks
from openvision.evaluation.metrics.ranks import with_interval, within
from openvision.evaluation.suites.artefact import describe_artefact
from openvision.files import atomic_write_text
from openvision.models.openvision import OpenVision
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import load_folder

HELD_OUT = ("heldout_compositional", "heldout_random")
TRAIN = "train"

Result = dict[str, Any]


def evaluate_split(
    model: OpenVision,
    tokenizer: Tokenizer,
    dataset: ShardDataset,
    resolution: int,
    batch_size: int = 256,
    templates: Sequence[str] = PLAIN,
) -> Result:
    """Zero-shot accuracy and retrieval of one split as a flat dictionary.

    Shares are 0 to 1 and carry `<name>_ci`, their 95 % interval: `top1`, `top5` over the split's own names;
    `t2i_r1` ... `i2t_r10` with names as texts, the same with `alt_` for alt-texts and `sentence_` for first
    sentences of synthetic captions; `category_top1` over groups. Counts: `pictures`, `candidates`. The model is
    left in the mode it came in.
    """
    split = read_split(dataset, resolution)
    return evaluate_pictures(model, tokenizer, split, batch_size, templates)


def evaluate_pictures(
    model: OpenVision,
    tokenizer: Tokenizer,
    split: Split,
    batch_size: int = 256,
    templates: Sequence[str] = PLAIN,
    categories: Sequence[str] | None = None,
) -> Result:
    """`evaluate_split` for pictures already read; `categories` are the groups to choose among (else the split's)."""
    encode = text_encoder(model, tokenizer, batch_size)
    images = encode_images(model, split.images, batch_size)
    candidates, targets = candidates_of(split.names)
    classes = class_embeddings(encode, candidates, templates)
    result: Result = {"pictures": len(split), "candidates": len(candidates), "rejected": sum(split.rejected.values())}
    result |= classification(classification_ranks(images, classes, targets), split.categories)
    result |= retrieval(images, classes[targets])
    result |= retrieval(images, encode(split.alts), prefix="alt_")
    if (first := split.first_sentences) is not None:
        result |= retrieval(images, encode(first), prefix="sentence_")
    if split.categories is not None:
        groups = sorted(set(split.categories).union(categories or ()))
        texts = class_embeddings(encode, [readable(group) for group in groups], templates)
        right = np.array([groups.index(category) for category in split.categories])
        result |= with_interval("category_top1", within(classification_ranks(images, texts, right), 1))
        result["categories"] = len(groups)
    return result


def readable(category: str) -> str:
    """The words of a group's identifier: "people-body" -> "people body"."""
    return " ".join(category.replace("-", " ").replace("_", " ").replace("&", " ").split())


def evaluate_run(
    run_folder: Path,
    data_folder: Path,
    batch_size: int = 256,
    templates: Sequence[str] = PLAIN,
    command: Sequence[str] | None = None,
) -> Result:
    """Evaluate RUN/model on both held-out sets and write RUN/evaluation.json; returns what it wrote.

    The resolution is the model's own (`vision.image_size`). `sets[name]` holds `chance`, `majority`, two pixel
    baselines and `model`, each as `evaluate_split` gives it.
    """
    model, tokenizer, provenance = load_folder(run_folder / "model")
    resolution = model.config.vision.image_size
    datasets = {name: ShardDataset(data_folder / name) for name in (TRAIN, *HELD_OUT)}
    train = read_split(datasets[TRAIN], resolution)
    known = known_pictures(train)
    sets: dict[str, dict[str, Result]] = {}
    for name in HELD_OUT:
        split = read_split(datasets[name], resolution)
        ours = evaluate_pictures(model, tokenizer, split, batch_size, templates, known.categories)
        sets[name] = {**evaluate_baselines(split, known), "model": ours}
    evaluation: Result = {
        "artefact": describe_artefact(
            run_folder / "model",
            {name: dataset.manifest_hash() for name, dataset in datasets.items()},
            list(sys.argv if command is None else command),
        ),
        "training": provenance,
        "protocol": {"resolution": resolution, "templates": list(templates), "train_samples": len(train)},
        "sets": sets,
    }
    atomic_write_text(run_folder / "evaluation.json", json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def load_evaluation(path: Path) -> Result:
    """Read an evaluation.json; raises OpenVisionError when it is missing or broken."""
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OpenVisionError(f"{path} cannot be read: {error.strerror}; run `openvision eval` first") from error
    except json.JSONDecodeError as error:
        raise OpenVisionError(f"{path} is not JSON ({error}); run `openvision eval` again") from error
    if not isinstance(evaluation, dict) or not {"artefact", "protocol", "sets"} <= evaluation.keys():
        raise OpenVisionError(f"{path} is not an evaluation; run `openvision eval` again")
    return evaluation


# Rows of the table: key of a result -> what people call it.
METRICS = {
    "top1": "zero-shot top-1",
    "top5": "zero-shot top-5",
    "t2i_r1": "text to image R@1",
    "t2i_r5": "text to image R@5",
    "t2i_r10": "text to image R@10",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "image to text R@5",
    "i2t_r10": "image to text R@10",
    "alt_t2i_r1": "alt to image R@1",
    "alt_t2i_r10": "alt to image R@10",
    "sentence_t2i_r1": "sentence to image R@1",
    "sentence_t2i_r10": "sentence to image R@10",
    "category_top1": "group, zero-shot",
}


def percent(row: Result, metric: str, digits: int = 1) -> str:
    """A share of a result in %, with its interval to `digits`: "52.1 (47.2-57.0)", "0.25", or "" when not measured."""
    if metric not in row:
        return ""
    value = 100 * row[metric]
    text = f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2f}"
    interval = row.get(f"{metric}_ci")
    if not interval:
        return text
    low, high = (f"{100 * bound:.{digits}f}" for bound in interval)
    return f"{text} ({low}-{high})"


def set_title(name: str) -> str:
    """What people call a held-out set: "heldout_random" -> "held-out, random"."""
    return name.replace("heldout_", "held-out, ").replace("_", " ")


def tables(evaluation: Result) -> list[Table]:
    """One rich table a held-out set: metrics down, baselines and model across, in % with 95 % intervals."""
    result = []
    for name, rows in evaluation["sets"].items():
        ours = rows["model"]
        title = f"{set_title(name)}: {ours['pictures']} pictures, {ours['candidates']} names; % (95 % interval)"
        # Narrow enough for a terminal of 80 columns.
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        table.add_column("", no_wrap=True)
        for column in rows:
            table.add_column(column.replace(", ", "\n"), justify="right", style="bold" if column == "model" else None)
        for metric, label in METRICS.items():
            if metric in ours:
                table.add_row(label.replace(" to ", "-"), *(percent(row, metric, digits=0) for row in rows.values()))
        result.append(table)
    return result


def print_tables(evaluation: Result, console: Console | None = None) -> None:
    """Print the tables of an evaluation."""
    for table in tables(evaluation):
        (console or Console()).print(table)
