"""Entry point of the command line: catches signals, runs a command, and maps errors to exit codes.

Exit code 1 and one sentence on standard error for a user error, 130 for an interrupted job, 75 for a training run that
the scheduler stopped.
"""

import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from openvision.errors import OpenVisionError, describe_exhaustion, describe_torchvision
from openvision.training.run.signals import Interrupted
from openvision.training.run.startup import SignalWatch
from openvision.training.run.watchdog import AlreadyReportedError, exit_immediately

# Commands that train, and tell the watch their run folder.
_TRAINING = (["train"], ["quickstart"], ["vlm", "train"])

if TYPE_CHECKING:
    import typer

    app: typer.Typer


def __getattr__(name: str) -> "typer.Typer":
    # Importing the commands takes a fifth of a second, and signals come first.
    if name == "app":
        from openvision.cli.app import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the console script."""
    # A scheduler may stop a training within its first second.
    trains = any(sys.argv[1 : 1 + len(command)] == command for command in _TRAINING)
    with SignalWatch() if trains else nullcontext():
        _run_command()


def _run_command() -> None:
    try:
        from openvision.cli.app import app

        app()
    except OpenVisionError as error:
        _fail(describe_exhaustion(error) or str(error), 1)
    except AlreadyReportedError:
        _leave(1)
    except Interrupted as stop:
        # One process of torchrun reports for all of them.
        _fail("" if os.environ.get("RANK", "0") != "0" else str(stop), stop.exit_code)
    except (OSError, MemoryError) as error:
        sentence = describe_exhaustion(error)
        if sentence is None:
            raise
        _fail(sentence, 1)
    except RuntimeError as error:
        # transformers imports torchvision when one of its classes is first asked for.
        sentence = describe_torchvision(error) or _describe_memory(error)
        if sentence is None:
            raise
        _fail(sentence, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _describe_memory(error: RuntimeError) -> str | None:
    """A sentence for a device without memory, with what this command has against it; None for other errors."""
    if "torch" not in sys.modules:
        return None
    from openvision.runtime import out_of_memory_on

    device = out_of_memory_on(error)
    if device is None:
        return None
    options = _options()
    batch = "--batch-size" if "--batch-size" in options else "batch"
    resolution = "--resolution" if "--resolution" in options else "resolution"
    other = ", or another --device" if "--device" in options else ""
    return f"out of memory on {device}; use a smaller {batch} or {resolution}{other}"


def _options() -> set[str]:
    """Options of the command that was given."""
    from typer.main import get_command

    from openvision.cli.app import app

    # Versions of typer differ in whose classes of click they return.
    command: Any = get_command(app)
    for word in sys.argv[1:]:
        inside = getattr(command, "commands", {})
        if word not in inside:
            break
        command = inside[word]
    return {name for parameter in command.params for name in parameter.opts}


def _fail(message: str, code: int) -> None:
    if message:
        from openvision.terminal import Console

        Console(stderr=True).print(f"openvision: {message}", markup=False, highlight=False, soft_wrap=True)
    _leave(code)


def _leave(code: int) -> None:
    """Exit; a process of torchrun does not join threads, which may wait for the other processes."""
    if "RANK" in os.environ:
        exit_immediately(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
