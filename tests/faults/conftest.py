"""A bench: starts real training processes with faults in them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench
from forks import ForkServer


@pytest.fixture(scope="session")
def bench(shapes_folder, tmp_path_factory):
    server = ForkServer()
    yield Bench(server, shapes_folder, tmp_path_factory.mktemp("faults"))
    server.close()
