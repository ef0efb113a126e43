"""`openvision doctor`: examine this machine and installation."""

from pathlib import Path
from typing import Annotated

import typer

from openvision.cli.options import Device
from openvision.errors import OpenVisionError
from openvision.terminal import echo


def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs and data will be written.")] = Path(),
    device: Device = "auto",
) -> None:
    """Examine device, precision, image decoders, extras, disk, shared memory and limits; say what will be slow."""
    from openvision.doctor import examine

    problems = 0
    for finding in examine(folder, device):
        problems += finding.state == "problem"
        echo(f"{finding.state:<8} {finding.topic:<14} {finding.text}")
    if problems:
        raise OpenVisionError(f"{problems} problem{'s' * (problems > 1)} found; see the lines above")
