"""A profile accounts for the whole step, leaves nothing wrapped behind, and writes a trace."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.recipe.schema import dump_recipe, parse_recipe
from openvision.training.profile import Phases, _idle_share_of, idle_share, profile_recipe
from tests.conftest import TINY_RECIPE


def test_parts_cover_the_step_and_the_trace_can_be_read(tiny_recipe, shapes_folder, tmp_path):
    backward = torch.autograd.backward
    result = profile_recipe(tiny_recipe, str(shapes_folder), tmp_path, stage_number=1, steps=2)
    named = {row.name: row for row in result.parts}
    expected = {"data", "vision tower", "text tower", "caption decoder", "losses", "backward", "optimizer", "other"}
    assert named.keys() == expected
    assert sum(row.share for row in result.parts) == pytest.approx(1)
    # Every part was entered; how long it took is the machine's affair.
    assert all(row.milliseconds > 0 for row in result.parts)
    assert result.images_per_second > 0
    assert all("::" in row.name for row in result.operations)
    events = json.loads(result.trace.read_text())["traceEvents"]
    assert {"vision tower", "backward", "aten::mm"} <= {event.get("name") for event in events}
    assert torch.autograd.backward is backward


def test_a_step_in_chunks_is_accounted_for_too(shapes_folder, tmp_path):
    data = copy.deepcopy(TINY_RECIPE)
    data["stages"][0]["micro_batches"] = 2
    result = profile_recipe(parse_recipe(data, "tiny"), str(shapes_folder), tmp_path, steps=1)
    assert {"text tower", "backward", "losses"} <= {row.name for row in result.parts}


def test_a_stage_that_is_not_there(tiny_recipe, shapes_folder, tmp_path):
    with pytest.raises(OpenVisionError, match="no stage 2: choose one from 0 to 1"):
        profile_recipe(tiny_recipe, str(shapes_folder), tmp_path, stage_number=2)


def test_nested_parts_are_taken_out_of_those_around_them(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 6.0])
    monkeypatch.setattr("openvision.training.profile.time.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    with phases.part("outer"), phases.part("inner"):
        pass
    assert phases.seconds == {"outer": 2.0, "inner": 4.0}


@pytest.mark.parametrize(
    ("work", "share"),
    [
        ([], 0.0),
        ([(3.0, 3.0)], 0.0),
        ([(0.0, 2.0), (4.0, 5.0)], 0.4),
        ([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.0)], 0.2),
    ],
    ids=["nothing", "a moment", "a pause", "streams beside each other"],
)
def test_idle_is_what_no_operation_covers(work, share):
    assert idle_share(iter(work)) == pytest.approx(share)


def test_idle_is_of_operations_of_the_device(monkeypatch):
    """Events of the host are left out, and so are annotations, which last as long as all that is in them."""

    def event(kind: DeviceType, start: float, end: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            device_type=kind, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation
        )

    cuda = DeviceType.CUDA
    events = [event(cuda, 0, 4), event(DeviceType.CPU, 0, 10), event(cuda, 0, 8, annotation=True), event(cuda, 6, 8)]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr("openvision.training.profile.torch_profile", lambda **_: nullcontext(profiler))
    taken: list[int] = []
    assert _idle_share_of(lambda: taken.append(1), 3) == 0.25
    assert len(taken) == 3


def test_the_command(tiny_recipe, shapes_folder, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(dump_recipe(tiny_recipe))
    command = ["profile", str(recipe), "-o", str(tmp_path / "out"), "--steps", "1"]
    result = CliRunner().invoke(app, [*command, "--data", str(shapes_folder)])
    assert result.exit_code == 0, result.output
    assert "vision tower" in result.output
    assert (tmp_path / "out/trace.json").is_file()
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, OpenVisionError)
    assert "--smoke" in str(again.exception)
