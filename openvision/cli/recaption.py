"""`openvision recaption`: new captions for the images of shards."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from openvision.cli.options import Device, Native, RayAddress, RayGpus, RayWorkers, preprocessing_of, tell_shapes
from openvision.terminal import echo

if TYPE_CHECKING:
    from openvision.recaption.captioners.captioner import AnyCaptioner, LocalCaptioner, Sampling

ANY_LANGUAGE = "any"


def recaption(
    shards: Annotated[str, typer.Argument(help="Folder of shards, which is not changed; a URL with --as shards.")],
    captioner: Annotated[
        str,
        typer.Option(
            help="Model with a caption decoder, transformers:FOLDER or ID, or URL of an endpoint like OpenAI's."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for captions tars and links to the shards.")],
    model: Annotated[str | None, typer.Option(help="Model of the endpoint; default: the only one it has.")] = None,
    key: Annotated[str, typer.Option(help="Name of the new caption.")] = "recaption",
    template: Annotated[str, typer.Option(help="Prompt: v1, v2 (with the alt-text) or a Jinja file.")] = "v1",
    per_image: Annotated[int, typer.Option(help="Captions an image; several need a temperature.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Images decoded, or requests sent, at once.", min=1, max=1024)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Longest caption, tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling; 0 is greedy.", min=0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the likeliest tokens; 0: among all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    language: Annotated[str, typer.Option(help="Language of a good caption, or any.")] = "en",
    retries: Annotated[int, typer.Option(help="Further tries of a bad caption, with another seed.", min=0)] = 1,
    on_bad: Annotated[Literal["drop", "keep"], typer.Option(help="What to do with what is still bad.")] = "drop",
    form: Annotated[
        Literal["captions", "shards"], typer.Option("--as", help="Captions tars and links, or whole new shards.")
    ] = "captions",
    per_minute: Annotated[float, typer.Option(help="Most requests a minute; 0: no limit.", min=0)] = 0.0,
    budget: Annotated[int | None, typer.Option(help="Tokens that all workers may use together.", min=1)] = None,
    part: Annotated[
        str | None, typer.Option(help="Share of the shards of this worker, e.g. 3/16 for the third of 16.")
    ] = None,
    native: Native = False,
    device: Device = "auto",
    ray_workers: RayWorkers = 0,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
) -> None:
    """Caption the images of shards; start it several times to share the work, and again after a stop."""
    from openvision.errors import OpenVisionError
    from openvision.recaption.captioners.captioner import Sampling
    from openvision.recaption.job import Part, recaption_shards
    from openvision.recaption.prompts import load_prompt
    from openvision.recaption.quality import LANGUAGES
    from openvision.recaption.shard import Options

    if language not in (*LANGUAGES, ANY_LANGUAGE):
        raise OpenVisionError(f"--language is {language!r}; choose one of {', '.join(LANGUAGES)} or {ANY_LANGUAGE}")
    share = None if part is None else Part.parse(part)
    if share and ray_workers:
        raise OpenVisionError("--ray-workers shares the shards out by itself; leave out --part")
    prompt = load_prompt(template)
    sampling = Sampling(temperature, top_k, max_tokens)
    load = partial(_captioner, captioner, sampling, model, batch_size, per_minute, device, native)
    spoken = None if language == ANY_LANGUAGE else language
    options = Options(key, per_image, seed, retries, on_bad, spoken, form)
    if ray_workers:
        from openvision.cluster import Cluster
        from openvision.recaption.cluster import recaption_on_ray

        cluster = Cluster(ray_workers, ray_gpus, address=ray_address)
        counts = recaption_on_ray(shards, load, prompt, output, options, echo, cluster, budget)
    else:
        counts = recaption_shards(shards, load(), prompt, output, options, echo, budget=budget, part=share)
    for name, count in sorted(counts.items()):
        echo(f"{name}\t{count}")


def _captioner(
    source: str,
    sampling: "Sampling",
    model: str | None,
    batch_size: int,
    per_minute: float,
    device: str,
    native: bool,
) -> "AnyCaptioner":
    from openvision.errors import OpenVisionError

    if source.startswith(("http://", "https://")):
        if native:
            raise OpenVisionError(
                "--native is for checkpoints of ours, and an endpoint prepares images itself: give it to "
                "`openvision serve`"
            )
        from openvision.recaption.captioners.endpoint import Endpoint
        from openvision.recaption.captioners.request_queue import Patience

        return Endpoint(source, model, sampling, parallel=batch_size, patience=Patience(per_minute=per_minute))
    if model is not None:
        raise OpenVisionError(f"--model names the model of an endpoint, and {source} is none; leave it out")
    return local_captioner(source, sampling, batch_size, device, native)


def local_captioner(
    source: str, sampling: "Sampling", batch_size: int, device: str, native: bool = False
) -> "LocalCaptioner":
    """The captioner that runs in this process: a model of transformers, or a checkpoint with a caption decoder."""
    from openvision.errors import OpenVisionError
    from openvision.recaption.captioners.image_text import PREFIX, is_image_text_folder, load_image_text
    from openvision.runtime import resolve_device

    if source.startswith(PREFIX) or is_image_text_folder(source):
        if native:
            raise OpenVisionError(
                f"--native is for checkpoints of ours, and the processor of {source} prepares images itself; leave it "
                "out"
            )
        return load_image_text(source.removeprefix(PREFIX), resolve_device(device), sampling, batch_size)
    from openvision.recaption.captioners.decoders import load_decoder

    how = preprocessing_of(squash=False, native=native)
    loaded = load_decoder(source, resolve_device(device), sampling, batch_size, how)
    tell_shapes(loaded.model.vision.config.aspects, how)
    return loaded


def progress(
    output: Annotated[Path, typer.Argument(help="Output folder of `openvision recaption`.")],
    price_read: Annotated[float, typer.Option(help="Price of a million tokens read.", min=0)] = 0.0,
    price_written: Annotated[float, typer.Option(help="Price of a million tokens written.", min=0)] = 0.0,
    price_hour: Annotated[float, typer.Option(help="Price of an hour of one worker.", min=0)] = 0.0,
) -> None:
    """Print what every worker of a recaptioning has done, the time left and the cost."""
    from rich.table import Table

    from openvision.recaption.progress import Prices, read_progress
    from openvision.terminal import Console

    found, prices = read_progress(output), Prices(price_read, price_written, price_hour)
    columns = ("worker", "shards", "images", "captions", "bad", "tokens", "images/s", "works on")
    table = Table(*columns)
    for name, worker in sorted(found.workers.items()):
        counts = worker.counts
        bad = sum(number for reason, number in counts.items() if reason.startswith("bad_"))
        tokens = counts["tokens_read"] + counts["tokens_written"]
        numbers = (worker.shards, counts["images"], counts["captions"], bad, tokens)
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{worker.rate:.1f}", ", ".join(worker.holds))
    Console().print(table)
    left = found.seconds_left
    echo(f"shards\t{found.finished} of {found.shards}")
    echo(f"images/s\t{found.rate:.1f}")
    echo(f"time left\t{'unknown' if left is None else _duration(left)}")
    if prices != Prices():
        whole = found.cost_at_the_end(prices)
        so_far = prices.cost(list(found.workers.values()))
        echo(f"cost\t{so_far:.2f} so far, {'unknown' if whole is None else f'{whole:.2f}'} at the end")


def report(
    output: Annotated[Path, typer.Argument(help="Output folder of `openvision recaption`.")],
    page: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")],
    encoder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Encoder that compares images with alt-texts and captions.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Samples to read, spread evenly; 0: all.", min=0)] = 10_000,
    samples: Annotated[int, typer.Option(help="Samples on the page.", min=0)] = 48,
    placeholder: Annotated[int, typer.Option(help="Images so often alike are placeholders.", min=2)] = 10,
    numbers: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    device: Device = "auto",
) -> None:
    """Compare new captions with the alt-texts, find duplicates, and write a page of samples."""
    from openvision.recaption.report import ReportOptions, write_report
    from openvision.runtime import resolve_device

    where, loaded = resolve_device(device), None
    if encoder is not None:
        from openvision.inference.encoder import Encoder

        loaded = Encoder.load(encoder).to(where)
    found = write_report(output, page, ReportOptions(limit or None, samples, placeholder), loaded, numbers)
    for kind, texts in found["texts"].items():
        words = texts["words"]
        length = f", {words['mean']:.1f} words on average" if words else ""
        echo(f"{kind}\t{texts['texts']} texts, {texts['distinct_words']} distinct words{length}")
    if similarity := found.get("similarity"):
        alt, new = similarity["alt"]["mean"], similarity["recaption"]["mean"]
        echo(f"cosine with the image\talt {alt:.3f}, recaption {new:.3f}")
    alike = found["near_duplicates"]
    echo(f"near-duplicates\t{alike['images']} images in {alike['groups']} groups")
    echo(f"placeholders\t{len(alike['placeholders'])} groups; {len(alike['plain'])} plain images")
    echo(f"page\t{page}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
