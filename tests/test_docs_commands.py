"""Every command block of README and docs is run, or checked against `--help`.

The line before a block says what it is: `<!-- run -->` (executed here, on a small run), `<!-- run: slow -->` (the
same, by `make test-slow`), `<!-- slow -->` (by `make test-slow`, in a fresh clone), `<!-- run: oracle -->` (by
tests/oracle, where timm and open_clip are), `<!-- needs: hub -->` or gpu, cluster, dataset (parsed, checked). A block
without is an error.
"""

import copy
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from torch.distributed.run import get_args_parser

from openvision.cli.main import app
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.recipe.schema import parse_recipe
from openvision.training.trainer import Trainer
from tests.conftest import TINY_RECIPE
from tests.preloaded import Preloaded

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(bash|console|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"hub", "gpu", "cluster", "dataset"}
# What recipes/quickstart.toml sets of the towers, beside their sizes.
QUICKSTART_MODEL = {"vision": {"init": "by_width"}, "text": {"pad_id": 0, "pool": "mean"}}


@dataclass(frozen=True)
class Block:
    document: Path
    marker: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}: {self.text.splitlines()[0]}"


def blocks() -> list[Block]:
    return [
        Block(document, *match.groups(default=""))
        for document in DOCUMENTS
        for match in FENCE.finditer(document.read_text(encoding="utf-8"))
    ]


def name_of(document: Path) -> str:
    """Path of a document in the repository: two folders have a search.md."""
    return document.relative_to(ROOT).as_posix()


def with_marker(marker: str) -> list[Block]:
    return [block for block in blocks() if block.marker == marker]


def test_every_block_is_marked():
    known = {"run", "run: slow", "run: oracle", "slow", *(f"needs: {need}" for need in NEEDS)}
    assert [str(block) for block in blocks() if block.marker not in known] == []
    assert with_marker("run")
    assert with_marker("slow")


def command_lines(block: Block) -> list[list[str]]:
    joined = block.text.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if shlex.split(line, comments=True)]


def check_openvision(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"openvision has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word.startswith("-"):
            assert word.split("=")[0] in options | {"--help"}, f"{command.name} has no option {word}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"the Makefile has no target {word}"


def check_torchrun(words: list[str]) -> None:
    """By torchrun's own parser, which takes `--run` for an abbreviation of its own unless `--` stands before."""
    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    assert parsed.training_script == "openvision.cli.main"
    check_openvision(parsed.training_script_args)


@pytest.mark.parametrize("example", ["examples/slurm/train.sbatch", "examples/skypilot/train.yaml"])
def test_examples_start_what_they_say(example):
    text = (ROOT / example).read_text().replace("\\\n", " ")
    (command,) = re.findall(r"torchrun (.*openvision\.cli\.main.*?)(?: &| \|\| .*)$", text, re.MULTILINE)
    numbers = re.sub(r"\$\w+_(?:NUM|GPUS)_\w+", "2", command)
    check_torchrun(shlex.split(numbers))


@pytest.mark.parametrize("block", [b for b in blocks() if b.language != "python"], ids=str)
def test_commands_exist(block):
    for words in command_lines(block):
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        program = Path(words[0]).name if words else ""
        if program == "openvision":
            check_openvision(words[1:])
        elif program == "make":
            check_make(words[1:])
        elif program == "torchrun":
            check_torchrun(words[1:])
        elif program == "python" and words[1] not in ("-", "-c"):
            script = Path(words[2].replace(".", "/") + ".py") if words[1] == "-m" else Path(words[1])
            assert (ROOT / script).is_file(), f"{script} does not exist"


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "python"], ids=str)
def test_python_compiles(block):
    compile(block.text, str(block.document), "exec")


def anchors(document: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


TABLES = [*DOCUMENTS, *sorted((ROOT / "benchmarks").rglob("*.md"))]


@pytest.mark.parametrize("document", TABLES, ids=name_of)
def test_tables_have_a_head_and_as_many_cells_in_every_row(document):
    """An empty line within a table makes text of the rows below it."""
    lines = document.read_text(encoding="utf-8").splitlines()
    for table, rows in itertools.groupby(enumerate(lines, 1), lambda numbered: numbered[1].startswith("|")):
        if table:
            (first, head), *rest = rows
            ruler = rest[0][1] if rest else ""
            assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", ruler), f"line {first} of {name_of(document)}: {head}"
            for number, row in rest:
                assert cells(row) == cells(head), f"line {number} of {name_of(document)}: {row}"


def cells(row: str) -> int:
    return row.replace(r"\|", "").count("|")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name} links to {link}"
            assert not anchor or anchor in anchors(target), f"{document.name} links to {link}"


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory, shapes_folder) -> Path:
    """The tiny run with the quickstart's text tower, which masks padding: stock classes take no such tower."""
    content: dict[str, Any] = copy.deepcopy(TINY_RECIPE)
    for part, added in QUICKSTART_MODEL.items():
        content["model"][part] |= added
    run = tmp_path_factory.mktemp("run") / "quickstart"
    Trainer(parse_recipe(content, "quickstart"), shapes_folder, run).run()
    return run


def test_the_stand_in_has_what_the_quickstart_adds():
    model = tomllib.loads((ROOT / "recipes/quickstart.toml").read_text())["model"]
    sizes = {"width", "depth", "mlp_dim", "heads", "patch_size", "image_size", "vocab_size", "context_length"}
    added = {part: {key: model[part][key] for key in model[part].keys() - sizes} for part in ("vision", "text")}
    assert added == QUICKSTART_MODEL


def make_workshop(folder: Path, quickstart: Path, shapes_folder: Path) -> Path:
    """A folder that looks like a checkout after the quickstart, with a small run in its place."""
    shutil.copytree(quickstart, folder / "runs/quickstart")
    # The small run was trained on shapes somewhere else; docs measure it on the quickstart's data.
    (folder / "runs/quickstart/data.json").unlink()
    make_scenes(folder / "runs/scenes", Options(train=40, held_out=12, objects=5), workers=1)
    # Shapes stand in for emoji, which take longer to draw.
    for split in ("train", "validation", "heldout_random", "heldout_compositional"):
        shutil.copytree(shapes_folder / "train", folder / "runs/openmoji" / split)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, small_quickstart, shapes_folder) -> Path:
    return make_workshop(tmp_path_factory.mktemp("workshop"), small_quickstart, shapes_folder)


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Iterator[Path]:
    """A folder with an `openvision` that need not import torch: it would take half of the time of all blocks."""
    with Preloaded(tmp_path_factory.mktemp("programs")) as preloaded:
        yield preloaded.folder


def execute(block: Block, folder: Path, programs: Path | None = None) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    path = f"{programs}{os.pathsep}{path}" if programs else path
    python = str(programs / "openvision") if programs else sys.executable
    command = [python, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*command, block.text], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", dict.fromkeys(b.document for b in with_marker("run")), ids=name_of)
def test_run(document, workshop, programs):
    for block in with_marker("run"):
        if block.document == document:
            execute(block, workshop, programs)


@pytest.mark.slow
@pytest.mark.parametrize("document", dict.fromkeys(b.document for b in with_marker("run: slow")), ids=name_of)
def test_run_slow(document, tmp_path, small_quickstart, shapes_folder, programs):
    """The whole page in order, in a workshop of its own: blocks that take long stand on those before them."""
    folder = make_workshop(tmp_path, small_quickstart, shapes_folder)
    for block in blocks():
        if block.document == document and block.marker in ("run", "run: slow"):
            execute(block, folder, programs)


@pytest.mark.slow
@pytest.mark.parametrize("block", with_marker("slow"), ids=str)
def test_slow(block, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    execute(block, clone)
