"""`openvision classify` and `openvision search` as a user calls them."""

import pytest
import typer
from typer.testing import CliRunner

from openvision.cli.classify import classify
from openvision.cli.search import search
from openvision.errors import OpenVisionError

app = typer.Typer()
app.command()(classify)
app.command()(search)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)


def test_classify_prints_every_label_with_its_share(model_folder, pictures) -> None:
    done = run("classify", pictures / "red.png", "--labels", "red, green,red", "--checkpoint", model_folder)
    assert done.exit_code == 0
    lines = done.output.strip().splitlines()
    assert sorted(line.split()[-1] for line in lines) == ["green", "red"]
    shares = [float(line.split()[0].rstrip("%")) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_search_prints_scores_and_paths(model_folder, pictures) -> None:
    (pictures / "broken.png").write_bytes(b"")
    done = run("search", pictures, "red", "--top", 2, "--checkpoint", model_folder)
    assert done.exit_code == 0
    found = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert len(found) == 2
    assert all(-1 <= float(score) <= 1 and path.endswith(".png") for score, path in found)
    assert "broken.png" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "PICTURES/red.png", "--labels", " , "), "no labels"),
        (("classify", "PICTURES/none.png", "--labels", "a", "--checkpoint", "MODEL"), "does not exist"),
        (("classify", "PICTURES/notes.txt", "--labels", "a", "--checkpoint", "MODEL"), "cannot be used"),
        (("classify", "PICTURES/red.png", "--labels", "a", "--checkpoint", "PICTURES"), "not a model folder"),
        (("search", "MODEL", "red", "--checkpoint", "MODEL"), "has no images"),
        (("search", "PICTURES/none", "red", "--checkpoint", "MODEL"), "not a folder"),
    ],
)
def test_bad_input_is_one_sentence(model_folder, pictures, arguments, message) -> None:
    filled = [a.replace("PICTURES", str(pictures)).replace("MODEL", str(model_folder)) for a in arguments]
    done = run(*filled)
    # The command line prints such an error as one sentence and exits with 1.
    assert isinstance(done.exception, OpenVisionError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
