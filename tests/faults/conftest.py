"""A bench: starts real training processes with faults in them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench
from forks import ForkServer


@pytest.fixture(scope="session")
def server():
    opened = ForkServer()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def bench(server, shapes_folder, tmp_path_factory):
    return Bench(server, shapes_folder, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def mixed_bench(server, mixed_folder, tmp_path_factory):
    """The same with images of several shapes."""
    return Bench(server, mixed_folder, tmp_path_factory.mktemp("faults"))
