"""Tests for people with one NVIDIA GPU: `make test-gpu`. Without one every test is skipped and counted.

Whoever changes these tests without a GPU runs their bodies on the CPU, which finds every mistake that is not CUDA's:

    OPENVISION_TEST_DEVICE=cpu python -m pytest tests/gpu

What only CUDA has is skipped then, and compiled blocks are traced but not compiled. What the tests measure is listed at
the end.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from openvision.runtime import use_float32_matmul

DEVICE = torch.device(os.environ.get("OPENVISION_TEST_DEVICE", "cuda:0"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where their device is missing."""
    missing = DEVICE.type == "cuda" and not torch.cuda.is_available()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or what OPENVISION_TEST_DEVICE names."""
    return DEVICE


@pytest.fixture
def cuda(device) -> torch.device:
    """The GPU, for what no other device has."""
    if device.type != "cuda":
        pytest.skip("only CUDA has it")
    return device


@pytest.fixture
def measured(record_property) -> Callable[[str], None]:
    """Takes a line for the list of what was measured."""
    return lambda line: record_property("measured", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was measured, by test, whichever process ran it."""
    reports = [report for kind in ("passed", "failed", "skipped") for report in terminalreporter.getreports(kind)]
    lines = [
        f"{report.nodeid.partition('::')[2]}: {line}"
        for report in reports
        if report.when == "call"
        for name, line in report.user_properties
        if name == "measured"
    ]
    if lines:
        terminalreporter.section("measured")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Products and convolutions of float32 exact, and whatever a run sets for its process set back."""
    use_float32_matmul("highest")
    yield
    use_float32_matmul("highest")
    torch.use_deterministic_algorithms(False)
