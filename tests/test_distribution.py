"""The wheel, from an sdist, outside the repository: recipes, data files, types and the command are in it."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import openvision

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: object, folder: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=clean | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git tracks and what is new, by way of an sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    files = run("git", "ls-files", "-co", "--exclude-standard", folder=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    backend = "import setuptools.build_meta as backend; print(backend.build_sdist({!r}))"
    run(sys.executable, "-c", backend.format(str(folder)), folder=folder / "source")
    (archive,) = folder.glob("*.tar.gz")
    run("tar", "xzf", archive, folder=folder)
    (unpacked,) = folder.glob("openvision_encoders-*/")
    backend = "import setuptools.build_meta as backend; print(backend.build_wheel({!r}))"
    run(sys.executable, "-c", backend.format(str(folder)), folder=unpacked)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "openvision"
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {
        f"openvision/recipe/shipped/{path.relative_to(ROOT / 'recipes')}" for path in (ROOT / "recipes").rglob("*.toml")
    }
    assert ours | recipes <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "recipes", "docs"))]


def test_it_runs_outside_the_repository(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    # Dependencies are those of this environment; the package itself is the wheel's, which comes first on the path.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        wheel,
        folder=tmp_path,
    )
    where = run(python, "-c", "import openvision; print(openvision.__file__, openvision.__version__)", folder=tmp_path)
    assert where.split() == [str(site / "openvision/__init__.py"), openvision.__version__]
    command = tmp_path / "venv/bin/openvision"
    assert "Usage" in run(command, "--help", folder=tmp_path)
    run(command, "train", "recipes/quickstart.toml", "--smoke", "--run", "runs/smoke", folder=tmp_path)
    code = "import openvision; print(openvision.load('runs/smoke').encode_texts(['a cat']).shape)"
    assert "torch.Size([1, " in run(python, "-c", code, folder=tmp_path)
