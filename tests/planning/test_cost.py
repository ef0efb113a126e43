"""Hours, traffic and money of small cases that can be done by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from openvision.errors import OpenVisionError
from openvision.hardware import DEVICES, device_named, model_flops_utilisation
from openvision.models.flops import sample_flops
from openvision.models.variants import variant, variant2
from openvision.planning.arguments import range_argument
from openvision.planning.cost import StepTime, cost, decode_rate, line_rate, step_time, stretch
from openvision.planning.parameters import count_parameters

H100 = DEVICES["h100"]


def test_mfu_is_model_flops_over_the_peak():
    assert model_flops_utilisation(1e12, 989 / 2, 989e12) == pytest.approx(0.5)


def test_a_measured_mfu_is_the_committed_result():
    report = json.loads((Path(__file__).parents[2] / "benchmarks/results/train_gpu.json").read_text())
    assert report["machine"]["accelerator"] == "NVIDIA H200"
    found = [row["mfu"] for row in report["results"] if row["mfu"] is not None and row["compiled"]]
    low, high = DEVICES["h200"].mfu
    assert DEVICES["h200"].measured
    assert found
    assert all(low <= mfu <= high for mfu in found)


def test_ten_hours_on_four_devices():
    bill = cost((10, 20), H100, 4, price=(2, 3))
    assert bill.device_hours == (40, 80)
    assert bill.dollars == (80, 240)
    assert bill.kilowatt_hours == pytest.approx((40 * 0.7 * 0.8, 80 * 0.7 * 1.9))
    assert (bill + bill).hours == (20, 40)


def test_backward_hides_gradients_until_it_is_shorter():
    hidden = StepTime(compute=(0.3, 0.6), gradients=0.2, features=0.0, optimizer=0.01)
    assert hidden.total == pytest.approx((0.31, 0.61))
    assert hidden.limit == "compute"
    bare = replace(hidden, gradients=1.0)
    assert bare.exposed == pytest.approx((0.81, 0.61))
    assert bare.limit == "network"


def test_step_time_of_one_device_is_arithmetic_and_update():
    config = variant("tiny", 16, 160)
    parameters = count_parameters(config)
    time = step_time(config, parameters, H100, 1, (0.5, 0.5), 100, 989e9, 2, sharded=False)
    assert time.compute == pytest.approx((0.2, 0.2))
    assert time.gradients == time.features == 0
    assert time.optimizer == pytest.approx(26 * parameters.total / 3.35e12)
    sharded = step_time(config, parameters, H100, 8, (0.5, 0.5), 100, 989e9, 2, sharded=True)
    assert sharded.optimizer == pytest.approx(time.optimizer / 8)
    assert sharded.features > 0


def test_many_hosts_are_as_slow_as_their_network():
    assert line_rate(H100, 8) == H100.link
    assert line_rate(H100, 16) == H100.network


@pytest.mark.parametrize("config", [variant("large", 14, 224), variant2("large", 14, 224)])
def test_what_is_computed_twice(config):
    towers = sample_flops(config, 224, 2)
    assert stretch(towers, config, "none", 1).factor == 1
    full = stretch(towers, config, "full", 1)
    assert 0.3 < full.checkpointing < 1 / 3 + 0.01
    cached = stretch(towers, config, "selective", 4)
    # OpenVision 2 has no loss that couples samples: accumulating costs nothing.
    assert (cached.factor == 1) == (config == variant2("large", 14, 224))


def test_decoding_gets_slower_with_pixels():
    assert decode_rate(84) == pytest.approx(1110)
    assert decode_rate(224) == pytest.approx(563)
    assert decode_rate(160) > decode_rate(224) > decode_rate(384)
    assert decode_rate(16) <= 2 * 1110


def test_ranges_as_typed():
    assert range_argument("--mfu", None, (1, 2)) == (1, 2)
    assert range_argument("--mfu", "0.4", (1, 2)) == (0.4, 0.4)
    assert range_argument("--mfu", "0.3-0.45", (1, 2)) == (0.3, 0.45)
    for wrong in ("fast", "0.5-0.3", "-0.3", "nan", "0.1-inf", ""):
        with pytest.raises(OpenVisionError, match="--mfu"):
            range_argument("--mfu", wrong, (1, 2))


def test_unknown_device():
    with pytest.raises(OpenVisionError, match="h100, h200, a100, 4090, cpu"):
        device_named("tpu")
