"""Models on the meta device, and the operations they are seen to compute."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


def count(run: Callable[..., Any], *inputs: Any) -> int:
    """Operations of `run(*inputs)`, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops()


@pytest.fixture
def meta(monkeypatch):
    """Let models run on the meta device, which torch.autocast refuses: it is off there, as in float32 training."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda device, *a, **k: contextlib.nullcontext() if device == "meta" else autocast(device, *a, **k),
    )
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda device=None: False if device == "meta" else enabled(device or "cpu")
    )
    with torch.device("meta"):
        yield
