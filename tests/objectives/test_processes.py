"""Losses over several processes equal those of one: values, and gradients as DDP averages them."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_those_of_one_process(ranks, tmp_path):
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), str(ranks), str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
