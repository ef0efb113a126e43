"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openvision.errors import OpenVisionError
from openvision.terminal import echo

if TYPE_CHECKING:
    from openvision.images.preprocess import Preprocessing

MODEL_HELP = "Run, model folder, released name, Hub id, or weights file (.safetensors, .bin, .npz)."

# Every command takes the same sources of a model, which `openvision.weights.load.load_checkpoint` resolves.
Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
# --checkpoint is the name that earlier versions gave it.
CheckpointOption = Annotated[str, typer.Option("--model", "--checkpoint", metavar="MODEL", help=MODEL_HELP)]
EncoderOption = Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)]
Vocabulary = Annotated[
    Path | None, typer.Option(help="vocab.txt of bert-base-uncased, for weights that come without a vocabulary.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only the local cache of the Hub.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Training resolution of a JAX checkpoint, which does not store it.", min=1)
]
Decoder = Annotated[
    bool, typer.Option("--decoder", help="Load the JAX checkpoint from the Hub: only it has the caption decoder.")
]
Resolution = Annotated[int | None, typer.Option(help="Image size in pixels; by default the model's own.", min=1)]
Squash = Annotated[
    bool, typer.Option("--squash", help="Resize to a square, as the released configurations do, instead of cropping.")
]
Native = Annotated[
    bool, typer.Option("--native", help="Keep the aspect of each image, within the patches of the square.")
]

RecipeFile = Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/quickstart.toml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a value of the recipe, e.g. --set stages.0.batch_size=64; repeatable."),
]
Device = Annotated[str, typer.Option(help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1 or mps.")]
ShardFolders = Annotated[
    str | None, typer.Option(help="Folder or URL that contains the shard folders named in the recipe.")
]

DeviceOverride = Annotated[
    str | None, typer.Option("--device", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1 or mps: run.device.")
]


def with_device(overrides: list[str] | None, device: str | None) -> list[str] | None:
    """The overrides of a recipe with that of `run.device`, if `--device` was given."""
    return overrides if device is None else [*(overrides or []), f'run.device="{device}"']


def preprocessing_of(squash: bool, native: bool) -> "Preprocessing":
    """What --squash and --native ask for; raises OpenVisionError for both."""
    if squash and native:
        raise OpenVisionError("--squash changes the aspect and --native keeps it; give one of them")
    return "squash" if squash else "native" if native else "crop"


def tell_shapes(aspects: tuple[float, ...], how: "Preprocessing") -> None:
    """Say where a model that was trained on native shapes reads squares."""
    from openvision.images.native import remark_on_shapes

    if remark := remark_on_shapes(aspects, how):
        echo(remark, err=True)


DEFAULT_CHECKPOINT = "runs/quickstart"

RayWorkers = Annotated[int, typer.Option(help="Processes on a Ray cluster; 0: this process alone.", min=0)]
RayAddress = Annotated[str | None, typer.Option(help="A running cluster, e.g. auto; default: Ray on this machine.")]
RayGpus = Annotated[float, typer.Option(help="GPUs of each Ray worker, e.g. 1 or 0.5.", min=0)]
