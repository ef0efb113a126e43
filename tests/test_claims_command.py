"""`benchmarks/claims.py`: rows and tables, equal time, groups of processes; one slow test runs the whole command."""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from openvision.data.sources.scenes.texts import AltTexts
from openvision.errors import OpenVisionError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ("variants", "worlds", "budget", "rows", "runs", "schedule", "figure")
SUITE = """
description = "what an encoder of smoke size can be asked"
[[evaluate]]
kind = "zero_shot"
name = "single objects"
data = "single_objects"
"""


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """The modules of the command, found as the script finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return SimpleNamespace(
            claims=importlib.import_module("claims"),
            **{name: importlib.import_module(f"ablations.{name}") for name in PARTS},
        )


def row_of(variant: str = "full", seed: int = 0, top1: float = 0.5, **changes: object) -> dict[str, object]:
    measured = {
        "single objects": {"kind": "zero_shot", "values": {"top1": top1, "ece": 0.1}},
        "short": {"kind": "retrieval", "values": {"t2i_r1": 0.25, "t2i_r5": 0.5, "i2t_r1": 0.1}},
        "words": {"kind": "attribute_probe", "values": {"pooled_top1": 0.3, "patches_top1": 0.9, "chance_top1": 0.1}},
        "captions": {"kind": "caption_loss", "values": {"caption_loss": 2.5}},
        "baselines, single objects": {"kind": "baselines", "values": {"chance_top1": 0.1, "pixels1_top1": 0.4}},
        "validation, words": {"kind": "attribute_probe", "values": {"pooled_top1": 0.7}},
    }
    return {
        "table": "a",
        "variant": variant,
        "title": variant,
        "seed": seed,
        "world": "scenes1-300",
        "suite": "scenes",
        "profile": "cpu",
        "rate": 0.004,
        "planned_seconds": 10.0,
        "planned_samples": None,
        "samples": 1000 + seed,
        "seconds": 10.0,
        "measured": measured,
        "score": 0.5,
        "complete": True,
        **changes,
    }


def test_rows_are_found_again_and_replaced(parts, tmp_path):
    rows = parts.rows.Rows(tmp_path / "rows.jsonl")
    rows.put(row_of(seed=0))
    rows.put(row_of(seed=1, complete=False))
    again = parts.rows.Rows(tmp_path / "rows.jsonl")
    key = parts.rows.key_of
    assert key(row_of(seed=0)) in again
    # One whose evaluation was cut short is made again, and so is one of another budget, learning rate, start or world.
    assert key(row_of(seed=1)) not in again
    assert key(row_of(seed=0, planned_seconds=20.0)) not in again
    assert key(row_of(seed=0, rate=0.002)) not in again
    assert key(row_of(seed=0, start="runs/other/model")) not in again
    assert key(row_of(seed=0, world="scenes2-300")) not in again
    again.put(row_of(seed=1, top1=0.75))
    assert key(row_of(seed=1)) in again
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1]
    assert lines[1]["measured"]["single objects"]["values"]["top1"] == 0.75


def test_two_commands_that_write_the_same_rows_lose_none(parts, tmp_path):
    one, other = (parts.rows.Rows(tmp_path / "rows.jsonl") for _ in range(2))
    one.put(row_of(seed=0))
    other.put(row_of(seed=1))
    one.put(row_of(seed=2))
    assert [each["seed"] for each in parts.rows.Rows(tmp_path / "rows.jsonl").rows] == [0, 1, 2]
    assert [each["seed"] for each in one.rows] == [0, 1, 2]


def test_a_run_serves_every_table_and_what_only_tunes_serves_none(parts, tmp_path):
    rows = parts.rows.Rows(tmp_path / "rows.jsonl")
    for table, variant in (("f", "clip"), ("a", "no_decoder"), ("tuning", "full"), ("speeds", "full"), ("f", "full")):
        rows.put(row_of(variant, table=table))
    assert [row["variant"] for row in rows.of(("full", "no_decoder", "clip"))] == ["full", "no_decoder", "clip"]
    key = parts.rows.key_of
    assert key(row_of("clip", table="a")) in rows
    assert key(row_of("no_decoder", table="tuning")) not in rows
    assert len(rows.serving("tuning")) == len(rows.serving("speeds")) == 1


def test_variants_that_cost_the_same_share_their_speeds(parts):
    variants, alike = parts.variants.VARIANTS, parts.variants.costs_as
    assert alike(variants["full"], variants["full_alt25"])
    assert alike(variants["full"], variants["caption_weight_half"])
    assert alike(variants["full"], variants["early"])
    assert alike(variants["no_decoder"], variants["no_decoder_alt0"])
    assert alike(variants["genlip"], variants["genlip_unscaled"])
    for other in ("no_decoder", "clip", "whole_caption", "full_published", "wide", "patch16_tokens"):
        assert not alike(variants["full"], variants[other])


def test_curves_have_a_point_for_each_share_of_alt_texts(parts, monkeypatch):
    drawn = {}
    monkeypatch.setattr(parts.figure, "to_png", lambda made: drawn.update(made=made) or b"png")
    names = ("full", "full_alt25", "no_decoder", "clip", "clip_alt25", "full_errors30")
    assert parts.figure.crossing([row_of(name, top1=0.5 + 0.1 * ("25" in name)) for name in names]) == b"png"
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn["made"].axes[0].lines}
    # Captions with errors are no share of alt-texts.
    both = [[25, pytest.approx(60)], [80, pytest.approx(50)]]
    assert lines == {"full recipe": both, "without decoder": [[80, 50]], "plain CLIP": both}


def test_a_line_that_a_crash_cut_off_is_left_out(parts, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row_of()) + "\n" + json.dumps(row_of(seed=1))[:40])
    assert [row["seed"] for row in parts.rows.Rows(file).rows] == [0]


def test_table_has_means_and_spreads(parts):
    values = (0.5, 0.6, 0.8)
    rows = [row_of(seed=seed, top1=value) for seed, value in enumerate(values)] + [row_of("clip", top1=0.125)]
    mean, deviation = 100 * statistics.mean(values), statistics.stdev(100 * value for value in values)
    # One seed has no spread. Validation, by which learning rates are chosen, is no result.
    assert parts.rows.markdown(rows).splitlines() == [
        "|  | full | clip | untrained, at best |",
        "| --- | ---: | ---: | ---: |",
        "| seeds | 3 | 1 |  |",
        "| learning rate | 0.004 | 0.004 |  |",
        "| seconds | 10 ± 0 | 10 |  |",
        "| samples | 1,001 ± 1 | 1,000 |  |",
        f"| single objects, top1 | {mean:.1f} ± {deviation:.1f} | 12.5 | 40.0 |",
        "| short, t2i_r1 | 25.0 ± 0.0 | 25.0 | – |",
        "| short, t2i_r5 | 50.0 ± 0.0 | 50.0 | – |",
        "| words, pooled_top1 | 30.0 ± 0.0 | 30.0 | 10.0 |",
        "| words, patches_top1 | 90.0 ± 0.0 | 90.0 | 10.0 |",
        "| captions, caption_loss | 2.5 ± 0.0 | 2.5 | – |",
    ]


def test_a_model_that_was_not_asked_has_a_dash(parts):
    captioner = row_of("openvision2")
    captioner["measured"] = {"captions": {"kind": "caption_loss", "values": {"caption_loss": 2.0}}}
    lines = parts.rows.markdown([row_of(), captioner]).splitlines()
    assert "| single objects, top1 | 50.0 | – | 40.0 |" in lines
    assert lines[-1] == "| captions, caption_loss | 2.5 | 2.0 | – |"


def test_rows_of_other_budgets_stand_apart(parts):
    rows = [row_of(), row_of(planned_seconds=None, planned_samples=5000), row_of(rate=0.002)]
    assert "| seeds | 1 | 1 | 1 |  |" in parts.rows.markdown(rows)
    assert "starts from" not in parts.rows.markdown(rows)
    assert "| starts from | fresh weights | runs/m |" in parts.rows.markdown([row_of(), row_of(start="runs/m")])
    behind = [row_of(seed=seed, start=f"runs/m-seed{seed}/model", start_seconds=360.0) for seed in (0, 1)]
    found = parts.rows.markdown(behind)
    assert "| seeds | 2 |" in found
    assert "behind 360 |" in found
    assert "| starts from | runs/m-seed*/model |" in found


def test_every_variant_is_a_recipe_in_every_size(parts):
    variants = parts.variants
    for profile in variants.PROFILES.values():
        for name, chosen in variants.VARIANTS.items():
            count = len(variants.parts_of(chosen, profile))
            # What says how weights are taken is run with `--start`.
            warm = any(change.startswith("warm_start.") for change in chosen.overrides)
            run = ("start=model",) if warm else ()
            recipe = variants.recipe_of(chosen, profile, [6400] * count, 0.004, 3, Path("vocabulary"), run)
            assert recipe.seed == 3
            assert recipe.stages[0].base_learning_rate == pytest.approx(0.004)
            # What a variant removes does not come back with the sizes of a profile.
            assert (recipe.model.decoder is None) == ("model.decoder=none" in chosen.overrides), name


def test_a_variant_differs_from_the_full_recipe_by_its_overrides_alone(parts):
    variants, profile = parts.variants, parts.variants.PROFILES["cpu"]

    def recipe(name: str) -> dict[str, object]:
        made = variants.recipe_of(variants.variant(name), profile, [640] * 3, 0.004, 0, Path("v"), ())
        return made.model_dump(mode="json")

    full, clip = recipe("full"), recipe("clip")
    assert {key for key in full if full[key] != clip[key]} == {"model", "loss"}
    assert recipe("full_alt0") == full


def test_tables_name_variants_whose_learning_rate_is_tuned_somewhere(parts):
    variants = parts.variants
    for names in variants.TABLES.values():
        for name in names:
            source = variants.variant(name).tuned_as
            assert source == "" or source in variants.VARIANTS
    with pytest.raises(OpenVisionError, match="variant 'fill' is unknown; choose of full, clip"):
        variants.variant("fill")


def test_worlds_keep_the_proportions_of_alt_texts(parts):
    assert parts.worlds.alt_texts(0.8).shares == pytest.approx(AltTexts().shares)
    poor, mix = parts.worlds.alt_texts(0.25), AltTexts()
    assert poor.nothing == 0.75
    assert poor.one / poor.everything == pytest.approx(mix.one / mix.everything)
    assert parts.worlds.alt_texts(0.0).shares == (1, 0, 0, 0)


def test_whole_captions_are_one_sentence(parts, tmp_path):
    variants, worlds = parts.variants, parts.worlds
    profile = variants.Profile("test", scenes=60, held_out=2, objects=5)
    folder = worlds.make_world(tmp_path, variants.World(one_sentence=True), profile, 1)
    plain, whole = (worlds.ShardDataset(path / "train")[0] for path in (tmp_path / variants.World().name, folder))
    assert plain.image == whole.image
    assert len(worlds.sentences(plain.synthetic)) > 2
    assert len(worlds.sentences(whole.synthetic)) == 1
    assert plain.synthetic.split()[:3] == whole.synthetic.split()[:3]
    assert len(worlds.ShardDataset(folder / "validation")) == 2


def test_stages_take_their_shares_of_the_time(parts):
    speeds = [parts.budget.Speed(2.0, 100.0, 0.0), parts.budget.Speed(5.0, 50.0, 0.0)]
    assert parts.budget.plan_samples(speeds, (0.5, 0.5), 20.0, 8) == [800, 248]
    # A stage whose loader takes all its time to start is still there.
    assert parts.budget.plan_samples(speeds, (0.5, 0.5), 6.0, 8) == [96, 8]


def test_speeds_that_were_measured_before_plan_the_samples(parts, claims, monkeypatch):
    monkeypatch.setattr(type(claims), "data_of", lambda self, name: (Path("d"), Path("h"), Path("v")))
    ours = {"table": "speeds", "profile": "smoke", "measured": {}, "planned_seconds": None}
    for seed, rates in enumerate(([90.0, 50.0, 20.0], [80.0, 60.0, 30.0])):
        speeds = [{"startup": 1.0 - 0.5 * seed, "rate": rate, "data_wait": 0.0} for rate in rates]
        claims.rows.put(row_of("full", seed, **ours, speeds=speeds))
    speed = parts.budget.Speed
    # Of each stage the fastest: other work on the machine only slows.
    fastest = (speed(0.5, 90.0, 0.0), speed(0.5, 60.0, 0.0), speed(0.5, 30.0, 0.0))
    full, clip = claims.tasks("a", ("full", "clip"), (0,), lambda name: (0.004,), 10.0, None, "scenes")
    assert (full.speeds, clip.speeds) == (fastest, ())
    full.write(claims.out / "task.json")
    assert parts.runs.Task.read(claims.out / "task.json") == full
    assert parts.budget.spent(fastest, [900, 600, 300]) == [10.5, 21.0, 31.5]


def test_nobody_trains_before_all_are_ready(parts, tmp_path):
    members = ("a", "b", "c")
    meetings = {name: parts.budget.Meeting(tmp_path, name, members, timeout=20) for name in members}
    came = threading.Event()

    def first() -> None:
        meetings["a"].wait("train")
        came.set()

    thread = threading.Thread(target=first)
    thread.start()
    meetings["c"].leave()
    time.sleep(0.2)
    assert not came.is_set()
    meetings["b"].wait("train")
    thread.join(20)
    assert came.is_set()


def test_who_does_not_come_is_named(parts, tmp_path):
    with pytest.raises(TimeoutError, match="b did not come to train within 0 seconds"):
        parts.budget.Meeting(tmp_path, "a", ("a", "b"), timeout=0.1).wait("train")


CHILD = """
import json, sys, time
from pathlib import Path
task = json.loads(Path(sys.argv[2]).read_text())
if task["variant"] == "clip":
    sys.exit("the cause")
row = {"variant": task["variant"], "complete": task["variant"] == "full"}
Path(task["folder"]).mkdir(parents=True)
(Path(task["folder"]) / "row.json").write_text(json.dumps(row))
if task["variant"] == "no_decoder":
    time.sleep(60)
"""


def task_of(parts: SimpleNamespace, variant: str, work: Path):
    common = dict.fromkeys(("world", "data", "held_out", "vocabulary", "group"), "")
    return parts.runs.Task(
        "a", variant, 0, "smoke", 0.004, 5.0, None, **common, suite=None, device="cpu", workers=0,
        evaluation_threads=1, folder=str(work / variant), members=(),
    )  # fmt: skip


def test_rows_come_as_runs_end_and_failures_are_told(parts, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(parts.schedule, "SCRIPT", script)
    machine = parts.schedule.Machine("cpu", 3, 0, 1, tmp_path)
    tasks = [task_of(parts, name, tmp_path / "runs") for name in ("full", "clip", "no_decoder")]
    (group,) = parts.schedule.grouped(tasks, machine)
    assert group[0].members == tuple(task.name for task in group)
    rows, said = [], []
    deadline = time.monotonic() + 8
    assert not parts.schedule.run_group(group, deadline, rows.append, said.append)
    assert [row["variant"] for row in rows] == ["full", "no_decoder"]
    # At the deadline a row counts as far as it goes.
    assert [row["complete"] for row in rows] == [True, False]
    assert "the cause" in said[0]
    assert "the time is up: a-no_decoder" in said[1]
    # The others do not wait for the one that failed.
    assert (Path(group[1].group) / f"gone.{group[1].name}").exists()


@pytest.fixture
def claims(parts, tmp_path):
    arguments = argparse.Namespace(
        command="table", smoke=True, scenes=None, out=tmp_path / "out", work=tmp_path / "work", device="cpu",
        workers=None, at_once=2, suite="scenes", start=None, start_seconds=None,
    )  # fmt: skip
    return parts.claims.Claims(arguments)


@pytest.mark.parametrize(("start", "seconds"), [(None, 360.0), ("m", 0.0), ("m", float("nan"))])
def test_the_time_of_a_start_needs_a_start_and_is_a_time(parts, tmp_path, start, seconds):
    arguments = argparse.Namespace(
        command="table", smoke=True, scenes=None, out=tmp_path / "out", work=tmp_path / "work", device="cpu",
        workers=None, at_once=2, suite="scenes", start=start, start_seconds=seconds,
    )  # fmt: skip
    with pytest.raises(OpenVisionError, match="--start-seconds is the time of the run behind --start"):
        parts.claims.Claims(arguments)


def test_runs_whose_rows_are_there_are_not_made_again(claims, monkeypatch):
    monkeypatch.setattr(type(claims), "data_of", lambda self, name: (Path("d"), Path("h"), Path("v")))

    def left() -> list[tuple[str, int]]:
        tasks = claims.tasks("a", ("full", "clip"), (0, 1), lambda name: (0.004,), 10.0, None, "scenes")
        return [(task.variant, task.seed) for task in tasks]

    # Seed by seed: the sides of a comparison train at the same time.
    assert left() == [("full", 0), ("clip", 0), ("full", 1), ("clip", 1)]
    ours = {"profile": "smoke", "world": claims.world}
    claims._keep(row_of("full", 0, **ours))
    claims._keep(row_of("clip", 1, **ours, complete=False))
    assert left() == [("clip", 0), ("full", 1), ("clip", 1)]
    assert "| seeds | 1 | 1 |  |" in (claims.out / "table-a.md").read_text()


def test_what_starts_from_a_model_leaves_that_model_alone(claims, monkeypatch):
    monkeypatch.setattr(type(claims), "data_of", lambda self, name: (Path("d"), Path("h"), Path("v")))
    given = ("a", ("full",), (0,), lambda name: (0.004,), 10.0, None, "scenes")
    (fresh,) = claims.tasks(*given)
    claims.start = f"{fresh.folder}/model"
    (started,) = claims.tasks(*given)
    assert started.start == claims.start
    assert started.folder != fresh.folder
    with pytest.raises(OpenVisionError, match="open_clip cannot start from"):
        claims.tasks("f", ("full", "open_clip"), *given[2:])


def test_learning_rates_are_chosen_by_the_validation(claims, monkeypatch):
    def make(self: object, tasks: list[object], deadline: float | None) -> bool:
        for rate, score in ((0.002, 0.3), (0.004, 0.2)):
            claims.rows.put(row_of("full", table="tuning", rate=rate, score=score, measured={}))
        return True

    monkeypatch.setattr(type(claims), "data_of", lambda self, name: (Path("d"), Path("h"), Path("v")))
    monkeypatch.setattr(type(claims), "make", make)
    claims.tune(["full"], [0.002, 0.004], 10.0, None)
    assert claims.rate_of("full") == claims.rate_of("no_decoder") == 0.002
    assert json.loads((claims.out / "tuned.json").read_text())["full"]["scores"] == {"0.002": 0.3, "0.004": 0.2}
    with pytest.raises(OpenVisionError, match=r"no learning rate for clip: run `claims.py tune clip`"):
        claims.rate_of("clip_alt50")


def test_scores_of_a_validation(parts):
    numbers = {"names/top5": 0.2, "alt-texts/t2i_r5": 0.4, "first sentences/t2i_r5": 0.6, "names/top1": 0.9}
    assert parts.runs.score(numbers) == pytest.approx(0.4)
    assert parts.runs.score({"caption_loss/caption_loss": 2.0}) == -2.0


@pytest.mark.slow
def test_the_whole_command_in_its_smoke_form(tmp_path):
    (tmp_path / "suite.toml").write_text(SUITE)
    common = ["--smoke", "--suite", str(tmp_path / "suite.toml"), "--out", str(tmp_path / "out")]
    common += ["--work", str(tmp_path / "work"), "--device", "cpu", "--workers", "0", "--seeds", "0", "--at-once", "2"]
    command = [sys.executable, str(BENCHMARKS / "claims.py"), "gpu", "--minutes", "10", "--seconds", "4"]
    done = subprocess.run([*command, "--tune-seconds", "1", *common], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows if row["table"] == "gpu"] in (["full", "clip"], ["clip", "full"])
    assert all(row["complete"] for row in rows)
    assert "full recipe | plain CLIP | untrained" in (tmp_path / "out/table-gpu.md").read_text()


def curve_of(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"seconds": seconds, "top1": value, "sentence_t2i_r1": value / 2} for seconds, value in points]


def test_lines_are_drawn_against_planned_seconds_and_bars_are_means(parts, monkeypatch):
    drawn = {}
    monkeypatch.setattr(parts.figure, "to_png", lambda made: drawn.update(made=made) or b"png")
    # Half the speed that was planned with, beside other work.
    slow = {"curve": curve_of((400, 0.1), (1000, 0.2)), "seconds": 1000.0, "planned_seconds": 500.0}
    assert parts.figure.picture([row_of("clip", seed=seed, top1=0.4 + 0.1 * seed, **slow) for seed in (0, 1)]) == b"png"
    sentences, names, bars = drawn["made"].axes
    assert names.lines[0].get_xydata().tolist() == [[0, 0], [200, pytest.approx(10)], [500, pytest.approx(20)]]
    assert sentences.lines[0].get_xydata().tolist()[-1] == [500, pytest.approx(10)]
    assert [bar.get_height() for bar in bars.patches] == [pytest.approx(45)]
    # What it starts from was not measured here: the line begins behind it.
    parts.figure.picture([row_of("clip", **slow, start="m", start_seconds=360.0)])
    line = drawn["made"].axes[1].lines[0].get_xydata().tolist()
    assert line == [[560, pytest.approx(10)], [860, pytest.approx(20)]]


def show(parts, folder: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["claims.py", "show", str(folder), "--picture", *arguments])
    parts.claims.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["z", "x.png"], "there is no table 'z'; choose of a, b"),
        (["k", "x.png", "--variants", "genlip"], "rows.jsonl has no rows for the picture of table k"),
    ],
)
def test_a_picture_of_nothing_is_one_sentence(parts, tmp_path, monkeypatch, arguments, message):
    parts.rows.Rows(tmp_path / "rows.jsonl").put(row_of("clip"))
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        show(parts, tmp_path, monkeypatch, *arguments)


def test_a_picture_leaves_out_equal_samples_and_models_that_only_caption(parts, tmp_path, monkeypatch):
    rows, drawn = parts.rows.Rows(tmp_path / "rows.jsonl"), []
    rows.put(row_of("clip", curve=curve_of((10, 0.1))))
    rows.put(row_of("full", curve=curve_of((10, 0.1)), planned_seconds=None, planned_samples=9))
    rows.put(row_of("openvision2", curve=[{"seconds": 10.0, "samples": 9, "caption_loss": 0.5}]))
    monkeypatch.setattr(parts.figure, "picture", lambda found: drawn.extend(found) or b"png")
    show(parts, tmp_path, monkeypatch, "k", str(tmp_path / "k.png"))
    assert [row["variant"] for row in drawn] == ["clip"]
    assert (tmp_path / "k.png").read_bytes() == b"png"
