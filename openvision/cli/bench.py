"""`openvision bench`: latency of exported folders."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.terminal import echo


def bench(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of `openvision export`, of any kind; the first is the measure.")
    ],
    batch: Annotated[list[int] | None, typer.Option(help="Images per batch; repeatable. 1 and 16 by default.")] = None,
    runs: Annotated[int, typer.Option(help="Rounds that are timed.", min=1)] = 30,
    threads: Annotated[int | None, typer.Option(help="Threads; a thread a core by default.", min=1)] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cpu, which is where ONNX graphs are measured, cuda, cuda:1, mps, or auto (CUDA, else MPS, else CPU; "
            "the CPU beside ONNX graphs)."
        ),
    ] = "cpu",
) -> None:
    """Time from prepared pixels to the embedding, for exports that take turns, each in the library it was made for."""
    from openvision.errors import OpenVisionError
    from openvision.inference.latency import measure_latency

    sizes = batch or [1, 16]
    if min(sizes) < 1:
        raise OpenVisionError(f"--batch is {min(sizes)}; it must be at least 1")
    for number, size in enumerate(sizes):
        measured = measure_latency(folders, size, runs, threads, device)
        if number == 0:
            echo("  p50 ms   p95 ms  images/s   speed  batch  folder")
        for found in measured:
            echo(
                f"{1000 * found.p50:8.1f} {1000 * found.p95:8.1f} {found.images_per_second:9.0f} {found.speed:6.2f}x "
                f"{size:6d}  {found.folder} ({found.runtime}, {found.pixels} px)"
            )
    if len(folders) > 1:
        echo(f"speed: times that of {folders[0]}, the median over rounds in which all take turns")
