"""`openvision encode`: embed the images of a folder or of shards."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import (
    DEFAULT_CHECKPOINT,
    CheckpointOption,
    Device,
    Native,
    Offline,
    RayAddress,
    RayGpus,
    RayWorkers,
    Resolution,
    Revision,
    Squash,
    preprocessing_of,
    tell_shapes,
)
from openvision.cli.progress import ProgressLine
from openvision.errors import OpenVisionError
from openvision.terminal import counted, echo
from openvision.untrusted import one_line


def encode(
    source: Annotated[Path, typer.Argument(help="Folder of images, including subfolders, or of tar shards.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Output: a folder, in which `openvision search` can search; or one file, .safetensors or .parquet.",
        ),
    ],
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    kind: Annotated[
        str | None, typer.Option("--format", help="Shards of an output folder: npy (the default) or parquet.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    threads: Annotated[int, typer.Option(help="Decoding threads.", min=1)] = 2,
    device: Device = "auto",
    resolution: Resolution = None,
    squash: Squash = False,
    native: Native = False,
    revision: Revision = None,
    offline: Offline = False,
    ray_workers: RayWorkers = 0,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
) -> None:
    """Embed images into vectors. The same command resumes after a stop."""
    from openvision.cluster import Cluster, check_ray
    from openvision.inference.embed import embed, images_of
    from openvision.inference.encode_cluster import encode_on_ray
    from openvision.inference.load import load_vision
    from openvision.inference.vector_folder import encode_folder

    # A folder's name may have a dot; a file that cannot be written is named by `embed`.
    into_file = bool(output.suffix) and not output.is_dir()
    if into_file and kind is not None:
        raise OpenVisionError("--format is for an output folder; the suffix of an output file says its format")
    if into_file and ray_workers:
        raise OpenVisionError("--ray-workers share the shards of an output folder; give a folder with -o")
    # Check folder and device before loading the model.
    images_of(source)
    load = partial(
        load_vision,
        Path(checkpoint).resolve() if Path(checkpoint).exists() else checkpoint,
        device=device,
        resolution=resolution,
        preprocessing=preprocessing_of(squash, native),
        revision=revision,
        offline=offline,
    )
    line = ProgressLine("image")

    def progress(done: int, total: int) -> None:
        line(done, done / total)

    if ray_workers:
        check_ray()
    encoder = load()
    tell_shapes(encoder.vision.config.aspects, encoder.preprocessing)
    if ray_workers:
        cluster = Cluster(ray_workers, ray_gpus, address=ray_address)
        result = encode_on_ray(
            encoder, load, source, output, cluster, batch_size, threads, kind=kind or "npy", progress=progress
        )
    elif into_file:
        result = embed(encoder, source, output, batch_size, threads, progress=progress)
    else:
        result = encode_folder(encoder, source, output, batch_size, threads, kind=kind or "npy", progress=progress)
    for name, reason in result.skipped:
        echo(f"skipped: {one_line(name)}: {one_line(reason)}", err=True)
    echo(f"{counted(result.encoded, 'image')} encoded, {len(result.skipped)} skipped: {output}")
