"""`openvision plan` as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.hardware import DEVICES
from openvision.planning.page import print_plan
from openvision.planning.plan import make_plan
from openvision.planning.stage import Assumptions
from openvision.planning.units import count, number, percent, span
from openvision.recipe.schema import load_recipe
from openvision.terminal import Console

L14 = str(Path(__file__).parents[2] / "recipes/openvision/l14.toml")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_page_without_terminal_is_plain_and_complete():
    page = run(L14, "--devices", "64", "--device", "h100")
    assert not any(character in page for character in "┃│─\x1b…")
    assert max(map(len, page.splitlines())) <= 118
    for part in ("525M", "GFLOP", "InfoNCE, chunked", "sharded (FSDP)", "hours", "kWh", "cores to decode", "MFU is"):
        assert part in page, part


def test_terminal_gets_frames():
    device = DEVICES["h100"]
    plan = make_plan(load_recipe(Path(L14)), Assumptions(device, 8, device.mfu, device.price))
    console = Console(force_terminal=True, width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_plan(plan, console)
    assert "┃" in console.export_text()


def test_json_has_exact_numbers():
    numbers = json.loads(run(L14, "--devices", "64", "--json"))
    assert numbers["parameters"]["total"] == 525_090_817
    assert numbers["stages"][1]["flops_per_sample"]["forward"]["vision"] == 162_025_537_536
    assert numbers["stages"][0]["steps"] == 390_981
    assert [stage["local_batch"] for stage in numbers["stages"]] == [512, 256, 128]


def test_options_reach_the_plan():
    words = ("--mfu", "0.4", "--price", "2", "--caption-tokens", "10", "--pairs", "1000", "--json")
    numbers = json.loads(run(L14, *words, "--set", "stages.0.batch_size=1024"))
    assert numbers["assumptions"]["mfu"] == [0.4, 0.4]
    assert numbers["assumptions"]["price"] == [2, 2]
    assert numbers["assumptions"]["dataset_samples"] == 1000
    assert numbers["stages"][0]["batch_size"] == 1024
    assert numbers["stages"][0]["flops_per_sample"]["forward"]["vocabulary"] == 2 * 768 * 32000 * 10


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("missing.toml",), "does not exist"),
        ((L14, "--device", "tpu"), "unknown device 'tpu'; choose one of h100"),
        ((L14, "--mfu", "fast"), "--mfu 'fast' is neither a number"),
        ((L14, "--mfu", "2"), "must be above 0 and at most 1"),
        ((L14, "--set", "nonsense"), "not of the form key=value"),
    ],
)
def test_mistakes_are_one_sentence(words, part):
    with pytest.raises(OpenVisionError, match=part):
        run(*words)


def test_numbers_for_people():
    assert [number(value) for value in (0, 0.0123, 1.234, 12.34, 123.4, 12345.6)] == [
        "0", "0.0123", "1.23", "12.3", "123", "12,346",
    ]  # fmt: skip
    assert span((1.23, 4.56)) == "1.2-4.6"
    assert span((1.21, 1.24)) == "1.2"
    assert span((9_999.4, 23_456)) == "9,999-23.5k"
    assert percent((0.2, 0.361)) == "20-36 %"
    assert [count(value) for value in (12.8e9, 525e6, 999.8e6, 120)] == ["12.8B", "525M", "1.00B", "120"]
