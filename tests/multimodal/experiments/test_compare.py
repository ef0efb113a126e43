"""The comparison and the demonstration, whole, with a tiny language model and tiny encoders."""

import json
import runpy

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from openvision.errors import OpenVisionError
from openvision.multimodal.experiments.compare import (
    RESULT,
    TABLE,
    Contestant,
    blind_data,
    blind_recipe,
    compare,
    parse_benchmarks,
    parse_contestants,
    random_encoder,
)
from openvision.multimodal.experiments.demo import Demo, DemoOptions, default_contestants, demonstrate
from openvision.multimodal.recipe import VlmRecipe, parse_vlm_recipe
from openvision.weights.folder import save_folder
from openvision.weights.load import Request, load_checkpoint
from tests.multimodal import tiny
from tests.multimodal.experiments.test_demo import shards  # noqa: F401  (a fixture)


def recipe(**changes) -> VlmRecipe:
    stage = {"conversations": "train.json", "images": "images", "batch_size": 4, "samples": 8, "max_length": 256}
    content = {
        "name": "tiny",
        "framework": "llava-1.5",
        "stages": [
            {**stage, "name": "align", "learning_rate": {"projector": 1e-3}},
            {**stage, "name": "instruct", "learning_rate": {"projector": 1e-3, "llm": 1e-3}},
        ],
        "run": {"precision": "float32"},
    }
    return parse_vlm_recipe(content | changes, "tiny")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny OpenVision checkpoint."""
    folder = tmp_path_factory.mktemp("encoder") / "mine" / "model"
    save_folder(folder, tiny.encoder().vision, None, "", {})
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny stock CLIP tower as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip") / "clip-vit"
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    preparation = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**preparation, "resample": 3}))
    return folder


@pytest.fixture(scope="module")
def demonstrated(shards, llm_folder, encoder_folder, clip_folder, tmp_path_factory):  # noqa: F811
    """A finished demonstration with four contestants."""
    out = tmp_path_factory.mktemp("demo") / "out"
    others = (Contestant("clip", str(clip_folder)),)
    align, instruct = (stage.model_dump(exclude_none=True) for stage in recipe().stages)
    words = align | {"objective": "words", "conversations": "captions.json"}
    demo = Demo(
        shards=shards,
        contestants=default_contestants(str(encoder_folder), others),
        recipe=recipe(stages=[words, instruct]),
        llm=str(llm_folder),
        template=None,
        splits=("validation",),
        data=DemoOptions(yes_no=8, open_=8),
        limit=4,
    )
    said: list[str] = []
    return demo, out, demonstrate(demo, out, said.append), said


def test_table_has_a_row_an_encoder_with_intervals(demonstrated):
    _, out, result, _ = demonstrated
    assert [row["name"] for row in result["rows"]] == ["trained", "clip", "untrained", "blind"]
    assert json.loads((out / RESULT).read_text()) == result
    lines = (out / TABLE).read_text().splitlines()
    assert lines[0] == "| encoder | validation open | validation yes/no | minutes |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| trained", "| clip", "| untrained", "| blind"]
    assert "| yes_no | " in "\n".join(lines[6:])
    for row in result["rows"]:
        for number in row["scores"]["validation"]["metrics"].values():
            assert number["low"] <= number["value"] <= number["high"]


def test_blind_is_right_on_half_of_balanced_questions(demonstrated):
    # Whatever the text it gives one answer; it may also say neither.
    metrics = demonstrated[2]["rows"][-1]["scores"]["validation"]["metrics"]
    assert metrics["yes_no"]["value"] <= 50


def test_limit_holds_for_every_stage(demonstrated):
    _, out, result, _ = demonstrated
    assert result["samples"] == [4, 4]
    assert "samples = 4" in (out / "trained" / "run" / "recipe.toml").read_text()


def test_all_answer_the_same_questions_with_the_same_language_model(demonstrated):
    _, out, result, _ = demonstrated
    asked = {
        json.loads((out / row["name"] / "scores" / "validation" / "run.json").read_text())["questions_sha256"]
        for row in result["rows"]
    }
    assert len(asked) == 1


def test_finished_comparison_is_read_not_repeated(demonstrated):
    demo, out, result, _ = demonstrated
    said: list[str] = []
    model = out / "trained" / "run" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    again = demonstrate(demo, out, said.append)
    for before_row, row in zip(result["rows"], again["rows"], strict=True):
        assert row["scores"] == before_row["scores"]
    assert model.stat().st_mtime_ns == before
    assert not any("step" in line for line in said)


def test_another_recipe_in_the_same_folder_is_refused(demonstrated):
    from dataclasses import replace

    demo, out, _, _ = demonstrated
    with pytest.raises(OpenVisionError, match="another limit"):
        demonstrate(replace(demo, limit=8), out)


def test_random_encoder_has_the_shape_and_other_weights(encoder_folder, tmp_path):
    made = load_checkpoint(random_encoder(str(encoder_folder), tmp_path / "r", 0), Request(vision_only=True)).vision
    real = load_checkpoint(encoder_folder, Request(vision_only=True)).vision
    assert made.config == real.config
    assert not torch.equal(made.blocks[0].attn.qkv.weight, real.blocks[0].attn.qkv.weight)  # pyright: ignore
    again = load_checkpoint(random_encoder(str(encoder_folder), tmp_path / "s", 0), Request(vision_only=True)).vision
    assert torch.equal(made.cls_token, again.cls_token)


def test_blind_keeps_words_and_drops_images(data_folder, tmp_path):
    folder = blind_data(recipe().stages, data_folder, tmp_path)
    before = json.loads((data_folder / "train.json").read_text())
    after = json.loads((folder / "train.json").read_text())
    assert len(after) == len(before)
    assert "<image>" not in json.dumps(after)
    assert not any("image" in row for row in after)
    assert after[0]["conversations"][0]["value"] == before[0]["conversations"][0]["value"].removeprefix("<image>\n")


def test_blind_trains_the_language_model_only():
    stages = blind_recipe(recipe()).stages
    assert [stage.name for stage in stages] == ["instruct"]
    assert stages[0].learning_rate.projector is None
    projector_only = recipe(stages=[recipe().stages[0].model_dump(exclude_none=True)])
    with pytest.raises(OpenVisionError, match="would learn nothing"):
        blind_recipe(projector_only)


def test_names_of_contestants():
    parsed = parse_contestants(["runs/quickstart/model", "clip=some/folder", "random:runs/quickstart/model", "blind"])
    assert [contestant.name for contestant in parsed] == ["quickstart", "clip", "random-quickstart", "blind"]
    with pytest.raises(OpenVisionError, match="two encoders have the name 'quickstart'"):
        parse_contestants(["runs/quickstart/model", "other/quickstart"])
    with pytest.raises(OpenVisionError, match="cannot be the name of a folder"):
        parse_contestants(["../x=runs/quickstart/model"])


def test_benchmarks_with_columns():
    found = parse_benchmarks(["textvqa=a", "val:pictures=b/c"])
    assert [(column, benchmark.name, str(folder)) for column, benchmark, folder in found] == [
        ("textvqa", "textvqa", "a"),
        ("val", "pictures", "b/c"),
    ]
    with pytest.raises(OpenVisionError, match="has no folder"):
        parse_benchmarks(["textvqa"])
    with pytest.raises(OpenVisionError, match="given twice"):
        parse_benchmarks(["pictures=a", "pictures=b"])


def test_wrong_benchmark_folder_is_told_before_training(demonstrated, tmp_path):
    from openvision.multimodal.experiments.compare import EncoderComparison

    demo, _, _, _ = demonstrated
    plan = EncoderComparison(
        demo.contestants, str(demo.llm), demo.recipe, tmp_path, parse_benchmarks([f"gqa={tmp_path}"])
    )
    with pytest.raises(OpenVisionError, match="must hold"):
        compare(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_script_trains_a_language_model_from_scratch(shards, encoder_folder, tmp_path, monkeypatch):  # noqa: F811
    runs, output = tmp_path / "runs", tmp_path / "table.json"
    command = (
        f"vlm_demo.py --from-scratch --no-baselines --encoder {encoder_folder} --other fresh=random:{encoder_folder}"
    )
    command += f" --data {shards} --images 8 --questions 8 --split validation --set stages.0.samples=128"
    monkeypatch.setattr("sys.argv", [*command.split(), "--runs", str(runs), "-o", str(output)])
    runpy.run_path("benchmarks/vlm_demo.py", run_name="__main__")
    result = json.loads(output.read_text())
    assert [row["name"] for row in result["rows"]] == ["trained", "fresh"]
    first, other = (row["scores"]["validation"]["metrics"] for row in result["rows"])
    assert list(result["ahead"]) == ["trained"]
    for metric, (lead, low, high) in result["ahead"]["trained"]["fresh"].items():
        assert lead == pytest.approx(first[metric]["value"] - other[metric]["value"])
        assert low <= lead <= high
    # The whole language model has learnt, not matrices beside it.
    before = load_file(runs / "llm" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    after = load_file(runs / "trained" / "run" / "model" / "model.safetensors")
    (learnt,) = (
        weight
        for name, weight in after.items()
        if name.endswith("layers.0.mlp.up_proj.weight") and "vision" not in name
    )
    assert learnt.shape == before.shape
    assert not torch.equal(learnt, before)
    assert result["llm"] == "llm"
    assert (
        output.with_suffix(".md").read_text().startswith("# Encoders inside a small Llama that is trained from scratch")
    )
    assert len(list((runs / "data" / "images" / "train").iterdir())) == 8
