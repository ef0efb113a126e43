"""`openvision data make`, `stats`, `verify` and `preview`: write shards from other formats, and inspect them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openvision.cli.progress import ProgressLine
from openvision.terminal import counted, echo
from openvision.untrusted import json_text, one_line

if TYPE_CHECKING:
    from openvision.data.shards.dataset import ShardDataset
    from openvision.data.tools.make import MakeResult
    from openvision.data.tools.preview import PreviewOptions
    from openvision.data.tools.readers import Columns, Rows
    from openvision.data.tools.verify import VerifyResult
    from openvision.recipe.schema import Recipe
    from openvision.text.tokenizer import Tokenizer

Shards = Annotated[str, typer.Argument(help="Folder of shards, local or any fsspec URL.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", help="tokenizer.json, a folder that holds one, or a vocab.txt.")
]
SyntheticKey = Annotated[str, typer.Option(help="Field of a sample's json that holds the synthetic caption.")]

# Findings printed on the terminal; the file lists all of them.
_LISTED = 10
# Beyond any run: positions are 64-bit numbers.
_LAST_POSITION = 10**15
# Size of a vocabulary learnt for a preview, and number of texts it is learnt from.
_LEARNT, _LEARNT_FROM = 8192, 20_000


def register(app: typer.Typer) -> None:
    """Add the commands to `openvision data`."""
    for command in (make, stats, verify, preview):
        app.command()(command)


def stats(
    shards: Shards,
    tokenizer: TokenizerPath = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder to write captions.png and images.png into.")] = None,
    limit: Annotated[int | None, typer.Option(help="Read this many samples, spread evenly.", min=1)] = None,
    synthetic_key: SyntheticKey = "synthetic",
) -> None:
    """Sizes, formats and bytes of the images; lengths and variety of alt-texts and captions."""
    from openvision.data.tools.stats import gather
    from openvision.data.tools.stats_report import tables, write_plots
    from openvision.errors import require
    from openvision.files import atomic_write_text
    from openvision.terminal import Console

    if plots:
        require("matplotlib", extra="report")
    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    line = ProgressLine("sample")
    found = gather(_open(shards, synthetic_key), loaded, limit, lambda done, total: line(done, done / total))
    summary = found.summary()
    for table in tables(summary):
        Console().print(table)
    for reason, count in sorted((Counter(summary["left_out"]) + Counter(summary["rejected"])).items()):
        echo(f"left out, {reason}: {count}")
    if output:
        atomic_write_text(output, json_text(summary, indent=2) + "\n")
        echo(f"numbers: {output}")
    if plots:
        echo(f"plots: {', '.join(map(str, write_plots(found, plots)))}")


def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of shards.")],
    rejects: Annotated[Path | None, typer.Option(help="File to list the findings in, one JSON object a line.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that read and decode.", min=1)] = 2,
    tokenizer: TokenizerPath = None,
) -> None:
    """Check the hash of every sample and decode every image; exit code 1 when there are findings.

    What training would use although it looks wrong is listed as suspicious, and is no finding.
    """
    from openvision.data.tools.verify import verify, write_findings

    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    result = verify(shards, threads, ProgressLine("sample"), loaded)
    if rejects:
        write_findings(result.findings + result.suspicious, rejects)
    _report_findings(result, rejects)
    if result.findings:
        raise typer.Exit(1)


def _report_findings(result: "VerifyResult", rejects: Path | None) -> None:
    for finding in result.findings[:_LISTED]:
        echo(f"{finding.reason}: {one_line(finding.detail)}", err=True)
    if len(result.findings) > _LISTED:
        echo(f"... and {len(result.findings) - _LISTED} more", err=True)
    for suspicion in result.suspicious[:_LISTED]:
        echo(f"suspicious, {suspicion.reason}: {one_line(suspicion.detail)}", err=True)
    if len(result.suspicious) > _LISTED:
        echo(f"... and {len(result.suspicious) - _LISTED} more", err=True)
    for reason, count in sorted(result.reasons.items()):
        echo(f"{reason}: {count}")
    for reason, count in sorted(Counter(one.reason for one in result.suspicious).items()):
        echo(f"suspicious, {reason}: {count}")
    verdict = counted(len(result.findings), "finding") if result.findings else "all good"
    echo(f"{counted(result.samples, 'sample')} in {counted(result.shards, 'shard')}: {verdict}")
    if rejects:
        echo(f"list: {rejects}")


def preview(
    shards: Shards,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe that sets augmentation, lengths and seed.")] = None,
    tokenizer: TokenizerPath = None,
    count: Annotated[int, typer.Option(help="Samples to show.", min=1)] = 64,
    views: Annotated[int, typer.Option(help="Views of each sample: that of the run, then later epochs.", min=1)] = 4,
    stage: Annotated[int, typer.Option(help="Stage of the recipe, from 0.", min=0)] = 0,
    position: Annotated[
        int, typer.Option(help="Position of the first sample within the stage.", min=0, max=_LAST_POSITION)
    ] = 0,
) -> None:
    """Write an HTML page of model inputs: augmented crops, and decoded token ids."""
    from openvision.data.tools.preview import build_preview
    from openvision.recipe.schema import load_recipe
    from openvision.training.setup.start import shape_of

    loaded = load_recipe(recipe, fill=shape_of) if recipe else None
    keys = (loaded.data.synthetic_key, loaded.data.alt_key) if loaded else ("synthetic",)
    dataset = _open(shards, *keys)
    options, order = _preview_options(loaded, stage, position, count, len(dataset))
    words, origin = _preview_tokenizer(loaded, tokenizer, dataset)
    facts = {"shards": shards, "samples": f"{len(dataset):,}", "order": order, "vocabulary": origin}
    if loaded:
        facts = {"recipe": f"{loaded.name}, stage {stage}", **facts}
    options = replace(options, views=views)
    shown = build_preview(dataset, words, options, output, facts)
    for reason, count in sorted((dataset.left_out + shown.rejected).items()):
        echo(f"left out, {reason}: {count}")
    echo(f"{counted(len(shown.cards), 'sample')}: {output}")


def _preview_options(
    recipe: "Recipe | None", stage: int, position: int, count: int, samples: int
) -> "tuple[PreviewOptions, str]":
    """What a page of `count` samples shows, and how its order relates to that of the run."""
    from openvision.data.distinct import Grid
    from openvision.data.loader import InputSpec
    from openvision.data.tools.preview import PreviewOptions
    from openvision.errors import OpenVisionError
    from openvision.training.setup.data import ordering_of

    if recipe is None:
        return PreviewOptions(position=position, count=count), "of seed 0; that of a run follows from its --recipe"
    if stage >= len(recipe.stages):
        raise OpenVisionError(f"recipe {recipe.name} has the stages 0 to {len(recipe.stages) - 1}, no stage {stage}")
    lengths = [one.steps * one.batch_size for one in recipe.stages]
    if position >= lengths[stage]:
        raise OpenVisionError(
            f"stage {stage} of recipe {recipe.name} has the positions 0 to {lengths[stage] - 1}, no position {position}"
        )
    chosen, begin = recipe.stages[stage], sum(lengths[:stage])
    grid, order = Grid(chosen.batch_size, begin) if recipe.is_contrastive else None, "that of the run"
    if not isinstance(recipe.data.train, str):
        grid, order = None, "of these shards alone; the run mixes its sources"
    elif grid is not None and samples < chosen.batch_size:
        grid, order = None, f"without batches; a run refuses fewer images than a batch of {chosen.batch_size}"
    options = PreviewOptions(
        InputSpec(chosen.resolution, recipe.context_length, recipe.caption_length, recipe.augment),
        ordering_of(recipe.data),
        grid,
        recipe.seed,
        begin + position,
        min(count, lengths[stage] - position),
    )
    return options, order


def _preview_tokenizer(recipe: "Recipe | None", path: Path | None, dataset: "ShardDataset") -> "tuple[Tokenizer, str]":
    """The tokenizer of a page, and its description for the page."""
    from itertools import islice

    from openvision.data.shards.dataset import all_texts
    from openvision.data.tools.preview import learn_tokenizer

    path = path or (Path(recipe.data.tokenizer) if recipe and recipe.data.tokenizer else None)
    if path:
        loaded = _load_tokenizer(path)
        return loaded, f"{loaded.vocab_size:,} entries, {path}"
    if recipe and recipe.data.vocab_size:
        learnt = learn_tokenizer(list(all_texts(dataset)), recipe.data.vocab_size)
        return learnt, f"{learnt.vocab_size:,} entries, learnt from these shards, as in the recipe"
    learnt = learn_tokenizer(list(islice(all_texts(dataset), _LEARNT_FROM)), _LEARNT)
    return learnt, f"{learnt.vocab_size:,} entries, learnt for this page: another vocabulary truncates texts elsewhere"


def make(
    out: Annotated[Path, typer.Argument(help="Folder to write: train/ and, with --holdout, validation/.")],
    table: Annotated[Path | None, typer.Option(help=".csv, .tsv or .jsonl with image paths and texts.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of images: a .txt beside each, or subfolders named by class.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hugging Face dataset: a folder written by save_to_disk, or a name on the Hub.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of --dataset.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Column with the image.")] = None,
    alt_column: Annotated[str | None, typer.Option(help="Column with the alt-text.")] = None,
    synthetic_column: Annotated[str | None, typer.Option(help="Column with the synthetic caption.")] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(help='What separates the columns of a .csv or .tsv, "\\t" for a tab; found by default.'),
    ] = None,
    max_side: Annotated[
        int | None, typer.Option(help="Longest side, pixels; larger images are downscaled.", min=1)
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of images for validation.", min=0, max=0.99)] = 0.0,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in a shard.", min=1)] = 10_000,
    threads: Annotated[int, typer.Option(help="Threads that read and decode.", min=1)] = 2,
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Keep images without a text, to be captioned later.")
    ] = False,
) -> None:
    """Write shards from a table, a folder of images or a Hugging Face dataset."""
    from openvision.data.tools.make import make_shards
    from openvision.data.tools.readers import Columns

    columns = Columns(image_column, alt_column, synthetic_column)
    not_taken: Counter[str] = Counter()
    made = make_shards(
        _rows(table, folder, dataset, split, columns, delimiter, not_taken),
        out,
        holdout=holdout,
        max_side=max_side,
        samples_per_shard=samples_per_shard,
        threads=threads,
        description={"source": str(table or folder or dataset)},
        progress=ProgressLine("row"),
        not_taken=not_taken,
        without_text=without_text,
    )
    if not_taken:
        counts = ", ".join(f"{suffix} {count}" for suffix, count in not_taken.most_common())
        echo(f"files not taken: {one_line(counts)}")
    _report_made(made, out)


def _rows(
    table: Path | None,
    folder: Path | None,
    dataset: str | None,
    split: str,
    columns: "Columns",
    delimiter: str | None,
    not_taken: Counter[str],
) -> "Rows":
    from openvision.data.tools.readers import folder_rows, hugging_face_rows, table_rows
    from openvision.errors import OpenVisionError

    if sum(source is not None for source in (table, folder, dataset)) != 1:
        raise OpenVisionError("give exactly one of --table, --folder and --dataset")
    if delimiter is not None:
        delimiter = delimiter.replace("\\t", "\t")
        if table is None or len(delimiter) != 1 or delimiter in '"\r\n':
            raise OpenVisionError(f"--delimiter is one character between the columns of a --table, not {delimiter!r}")
    if table is not None:
        return table_rows(table, columns, delimiter)
    return folder_rows(folder, not_taken) if folder is not None else hugging_face_rows(str(dataset), split, columns)


def _report_made(made: "MakeResult", out: Path) -> None:
    for reason, count in sorted(made.reasons.items()):
        echo(f"left out, {reason}: {count}")
    for change, count in sorted(made.changed.items()):
        echo(f"{change}: {count}")
    if made.rejects:
        echo(f"list: {out / 'rejects.jsonl'}")
    for reason, count in sorted(Counter(one["reason"] for one in made.suspicious).items()):
        echo(f"suspicious, {reason}: {count}")
    if made.suspicious:
        echo(f"list: {out / 'suspicious.jsonl'}")
    counts = ", ".join(f"{count} for {split}" for split, count in sorted(made.samples.items()))
    echo(f"samples: {counts}: {out}")


def _open(shards: str, synthetic_key: str, alt_key: str = "txt") -> "ShardDataset":
    from openvision.data.shards.dataset import ShardDataset

    return ShardDataset(shards, synthetic_key, alt_key)


def _load_tokenizer(path: Path) -> "Tokenizer":
    from openvision.text.tokenizer import Tokenizer

    return Tokenizer.from_vocabulary(path) if path.suffix == ".txt" else Tokenizer.load(path)
