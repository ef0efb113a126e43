"""Speed counts training and nothing else; MFU only where a peak is known."""

import pytest
import torch

from openvision.training.run import throughput as module
from openvision.training.run.throughput import Meter, peak_flops, peak_memory

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_pauses_are_left_out_and_waiting_is_a_share(clock):
    meter = Meter(CPU, peak=4e12)
    for _ in range(2):
        clock.now += 4
        assert meter.step(images=8, flops=4e12, waited=1) == 4
        with meter.paused():
            clock.now += 100
    values = meter.read()
    assert values["images_per_second"] == 2
    assert values["tflops_per_second"] == 1
    assert values["mfu"] == 0.25
    assert values["data_wait"] == 0.25
    clock.now += 1
    meter.step(images=8, flops=4e12, waited=0)
    assert meter.read()["images_per_second"] == 8


def test_no_mfu_without_a_peak(clock):
    meter = Meter(CPU, peak_flops(CPU))
    clock.now += 1
    meter.step(8, 1e12, 0)
    assert "mfu" not in meter.read()


def test_memory_is_that_of_the_process():
    assert 50 * 2**20 < peak_memory(CPU) < 2**40
