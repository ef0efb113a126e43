"""Runs of tiny models: what trains, at which rate, resume after kill -9, LoRA, features cached or not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.errors import OpenVisionError
from openvision.multimodal.model.generate import load_assistant
from openvision.multimodal.recipe import (
    LearningRates,
    VlmRecipe,
    dump_vlm_recipe,
    is_vlm_recipe,
    load_vlm_recipe,
    parse_vlm_recipe,
)
from openvision.multimodal.training.modules import choose_trained, module_of, parameter_groups
from openvision.multimodal.training.run import _VlmRun, train
from openvision.runtime import SINGLE_PROCESS
from openvision.training.run.signals import EXIT_REQUEUE, Interrupted

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "vlm").glob("*.toml"))


def recipe(*stages: dict, framework: str = "llava-1.5", **run):
    """A recipe of short stages; a stage says what differs."""
    aspect = "anyres" if framework == "llava-next" else "pad"
    common = {"conversations": "train.json", "images": "images", "samples": 16, "batch_size": 4, "max_length": 400}
    return parse_vlm_recipe(
        {
            "name": "test",
            "framework": framework,
            "stages": [
                common | {"aspect": aspect, "name": f"s{number}"} | stage for number, stage in enumerate(stages)
            ],
            "run": {"precision": "float32", "micro_batch": 2, "log_every": 1, "checkpoint_every": 2} | run,
        },
        "test",
    )


PROJECTOR = {"learning_rate": {"projector": 1e-2}}
WHOLE = {"learning_rate": {"projector": 1e-2, "llm": 1e-2}}
EVERYTHING = {"learning_rate": {"projector": 1e-2, "llm": 1e-2, "encoder": 1e-2}}
LORA = WHOLE | {"lora": {"rank": 4, "alpha": 8}}
WORDS = PROJECTOR | {"objective": "words"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    """Modules in which a weight differs."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {module_of(name) for name in old if not torch.equal(old[name], new[name])}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(model_folder, next_folder, data_folder, tmp_path_factory) -> Callable[[VlmRecipe], Path]:
    """The run folder of a recipe, trained once for all tests of this file; never written to."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def run_of(made: VlmRecipe) -> Path:
        key = dump_vlm_recipe(made)
        if key not in known:
            known[key] = folder / str(len(known))
            train(made, next_folder if made.framework == "llava-next" else model_folder, data_folder, known[key])
        return known[key]

    return run_of


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        (PROJECTOR, {"projector"}),
        (WORDS, {"projector"}),
        (WHOLE, {"projector", "llm"}),
        (LORA, {"projector", "llm"}),
        (EVERYTHING, {"projector", "llm", "encoder"}),
        ({"learning_rate": {"encoder": 1e-2}}, {"encoder"}),
    ],
)
def test_a_stage_trains_what_has_a_learning_rate(model_folder, runs, stage, trained) -> None:
    run = runs(recipe(stage, cache_features="never"))
    assert changed(model_folder, run / "model") == trained
    assert len(losses(run)) == 4
    assert load_assistant(run / "model", "cpu").model.config.model_type == "llava"


def test_anyres_trains_the_newline_too(next_folder, data_folder, tmp_path) -> None:
    folder = train(recipe(EVERYTHING, framework="llava-next"), next_folder, data_folder, tmp_path / "run")
    assert changed(next_folder, folder) == {"projector", "llm", "encoder"}
    old, new = weights(next_folder), weights(folder)
    newline = next(name for name in old if "image_newline" in name)
    assert not torch.equal(old[newline], new[newline])


def test_the_loss_goes_down(model_folder, data_folder, tmp_path) -> None:
    train(recipe(WHOLE | {"samples": 120}), model_folder, data_folder, tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert len(seen) == 30
    assert sum(seen[-5:]) < 0.6 * sum(seen[:5])


def test_stages_follow_each_other(model_folder, data_folder, tmp_path) -> None:
    told: list[str] = []
    folder = train(recipe(PROJECTOR, WHOLE), model_folder, data_folder, tmp_path / "run", told.append)
    first = tmp_path / "run" / "stages" / "0-s0" / "model"
    assert changed(model_folder, first) == {"projector"}
    assert changed(first, folder) == {"projector", "llm"}
    assert any("s1  step 4/4" in line and "samples/s" in line and "left" in line for line in told)
    made = json.loads((folder / "openvision_vlm.json").read_text())
    assert made["built"]["built"]["tokens_of_a_square"] == 25
    # The same command has nothing left to do.
    again: list[str] = []
    assert train(recipe(PROJECTOR, WHOLE), model_folder, data_folder, tmp_path / "run", again.append) == folder
    assert again == []


@pytest.mark.parametrize("batching", ["random", "length", "packed"])
def test_batching(runs, batching) -> None:
    assert len(losses(runs(recipe(WHOLE, batching=batching)))) == 4


def test_packed_and_padded_batches_train_alike(runs, model_folder, data_folder, tmp_path, monkeypatch) -> None:
    """With the written-out attention that short samples take on a CPU, and with the fused kernel."""
    padded, packed = (recipe(WHOLE, batching=name) for name in ("random", "packed"))
    expected = losses(runs(padded))
    assert losses(runs(packed)) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("openvision.multimodal.training.run.SHORT_SAMPLE", 0)
    train(packed, model_folder, data_folder, tmp_path / "fused")
    assert losses(tmp_path / "fused") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", [PROJECTOR, WHOLE, LORA])
def test_cached_features_train_to_the_same_losses(runs, stage) -> None:
    never, always = (runs(recipe(stage, cache_features=name)) for name in ("never", "always"))
    assert (always / "features").is_dir()
    assert not (never / "features").exists()
    assert losses(always) == pytest.approx(losses(never), rel=1e-5)


def test_anyres_features_too(runs) -> None:
    never, always = (runs(recipe(WHOLE, framework="llava-next", cache_features=name)) for name in ("never", "always"))
    assert losses(always) == pytest.approx(losses(never), rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulation_changes_no_loss(runs, accumulate) -> None:
    run = runs(recipe(WHOLE, micro_batch=4 // accumulate, batching="random"))
    assert losses(run) == pytest.approx(losses(runs(recipe(WHOLE, batching="random"))), rel=1e-4)


KILLED = """
import os, signal, sys
from pathlib import Path
from openvision.multimodal.recipe import load_vlm_recipe
from openvision.multimodal.training.run import train

def say(line):
    if "step 5/10" in line:
        os.kill(os.getpid(), signal.SIGKILL)

recipe, model, data, run = map(Path, sys.argv[1:])
train(load_vlm_recipe(recipe), model, data, run, say)
"""


@pytest.mark.parametrize("stage", [LORA, *(pytest.param(each, marks=pytest.mark.slow) for each in (WORDS, WHOLE))])
def test_resume_after_kill_9(runs, model_folder, data_folder, tmp_path, stage) -> None:
    made = recipe(stage | {"samples": 40})
    file, run = tmp_path / "recipe.toml", tmp_path / "killed"
    file.write_text(dump_vlm_recipe(made))
    command = [sys.executable, "-c", KILLED, *map(str, (file, model_folder, data_folder, run))]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert len(losses(run)) == 5
    # What it was writing when it died.
    (run / "stages" / "0-s0" / "checkpoints" / "checkpoint-999").mkdir()
    told: list[str] = []
    folder = train(made, model_folder, data_folder, run, told.append)
    assert any("resuming from checkpoint-4" in line for line in told)
    whole = runs(made)
    assert len(losses(run)) == 10
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    for name, tensor in weights(whole / "model").items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [WHOLE, WORDS])
def test_stopping_saves_and_the_same_command_resumes(runs, model_folder, data_folder, tmp_path, stage) -> None:
    made = recipe(stage | {"samples": 24}, checkpoint_every=100)

    def stop(line: str) -> None:
        if "step 3/6" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step") as stopped:
        train(made, model_folder, data_folder, tmp_path / "run", stop)
    assert stopped.value.exit_code == EXIT_REQUEUE
    assert "by the scheduler after step" in (tmp_path / "run/REQUEUE").read_text()
    train(made, model_folder, data_folder, tmp_path / "run")
    assert not (tmp_path / "run/REQUEUE").exists()
    assert losses(tmp_path / "run") == pytest.approx(losses(runs(made)), rel=1e-6)


def test_a_signal_in_the_last_step_of_a_stage_is_not_forgotten(model_folder, data_folder, tmp_path) -> None:
    made = recipe(PROJECTOR | {"samples": 8}, PROJECTOR | {"samples": 8})

    def stop(line: str) -> None:
        if line.startswith("s0  step 2/2"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 2"):
        train(made, model_folder, data_folder, tmp_path / "run", stop)
    assert (tmp_path / "run/REQUEUE").exists()
    assert (tmp_path / "run/stages/0-s0/model/config.json").exists()
    assert len(losses(tmp_path / "run")) == 2
    train(made, model_folder, data_folder, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 4


def test_a_second_trainer_is_refused(model_folder, data_folder, tmp_path) -> None:
    made, run = recipe(PROJECTOR), tmp_path / "run"
    run.mkdir()
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run / "LOCK")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(OpenVisionError, match="is being trained by another process"):
            train(made, model_folder, data_folder, run)
        other.kill()
    assert [path.name for path in run.iterdir()] == ["LOCK"]


# Modules.


def test_learning_rates_by_module_and_no_decay_of_vectors(model_folder) -> None:
    model = load_assistant(model_folder, "cpu").model
    rates = LearningRates(projector=1e-3, llm=2e-5, encoder=2e-6)
    choose_trained(model, rates, None)
    groups = parameter_groups(model, rates, 0.1)
    assert {group["module"]: group["lr"] for group in groups} == {"projector": 1e-3, "llm": 2e-5, "encoder": 2e-6}
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained


@pytest.mark.parametrize("framework", ["model_folder", "next_folder"])
def test_everything_that_is_trained_gets_a_gradient(request, data_folder, framework) -> None:
    """Distributed training waits for every parameter: what lies behind the feature layer must be frozen."""
    from openvision.multimodal.data.batching import Collator
    from openvision.multimodal.data.dataset import ConversationDataset, read_llava_json

    assistant = load_assistant(request.getfixturevalue(framework), "cpu")
    aspect = "anyres" if assistant.geometry.pinpoints else "pad"
    records = read_llava_json([data_folder / "train.json"], data_folder / "images").samples
    data = ConversationDataset(records, assistant.processor, assistant.geometry, aspect, 600)
    collator = Collator(
        assistant.processor.tokenizer.pad_token_id, assistant.processor.image_token_id, assistant.geometry
    )
    model = assistant.model
    choose_trained(model, LearningRates(projector=1.0, llm=1.0, encoder=1.0), None)
    model(**collator([data[0], data[1]])).loss.backward()
    without = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    assert without == set()
    # And nothing more is frozen: the last block, the norm behind it, the pooler.
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(".layers.2." in name or ".layernorm." in name or ".pooler." in name for name in frozen), frozen
    assert frozen


# Devices.


@pytest.fixture
def cards(monkeypatch) -> Iterator[list[torch.device | int]]:
    """A pretended machine with four CUDA devices; the devices that were made the current one."""
    from accelerate.state import AcceleratorState

    current: list[torch.device | int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield current
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_stays_on_the_device_that_was_chosen(cards, tmp_path) -> None:
    """transformers takes the first of several devices, and spreads every batch over all."""
    made = recipe(WHOLE)
    run = _VlmRun(made, tmp_path, tmp_path, print, SINGLE_PROCESS, torch.device("cuda", 1), torch.float32)
    arguments = run._arguments(0, made.stages[0])
    assert (arguments.device, arguments.n_gpu, arguments.train_batch_size) == (torch.device("cuda", 1), 1, 2)
    assert cards[-1] == torch.device("cuda", 1)


def test_a_device_other_than_that_of_the_rank_is_refused(cards, tmp_path, monkeypatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(OpenVisionError, match="device cuda:1 under torchrun, where a process takes the device of its"):
        train(recipe(WHOLE), tmp_path, tmp_path, tmp_path / "run", device="cuda:1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("capability", "wanted", "used"),
    [((8, 0), "high", "high"), ((8, 0), "highest", "highest"), ((7, 5), "high", "highest")],
)
def test_products_are_rounded_where_the_recipe_says_and_the_device_can(
    cards, tmp_path, monkeypatch, capability, wanted, used
) -> None:
    class StartedError(Exception):
        pass

    def start(run: _VlmRun, model: Path) -> None:
        assert run._arguments(0, run.recipe.stages[0]).tf32 is None
        raise StartedError

    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr("openvision.multimodal.training.run.use_float32_matmul", told.append)
    monkeypatch.setattr(_VlmRun, "train", start)
    with pytest.raises(StartedError):
        train(recipe(WHOLE, float32_matmul=wanted), tmp_path, tmp_path, tmp_path / "run", device="cuda:0")
    assert told == [used]


def test_a_run_by_a_version_without_a_key_is_resumed(runs) -> None:
    folder = runs(recipe(PROJECTOR, cache_features="never"))
    text = (folder / "recipe.toml").read_text()
    older = text.replace('float32_matmul = "high"\n', "")
    assert older != text
    assert is_vlm_recipe(older, load_vlm_recipe(folder / "recipe.toml"))
    assert not is_vlm_recipe(older, load_vlm_recipe(folder / "recipe.toml", ["run.float32_matmul=highest"]))
    assert not is_vlm_recipe("[", load_vlm_recipe(folder / "recipe.toml"))


# Recipes.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_parse_and_write_themselves_back(path, tmp_path) -> None:
    read = load_vlm_recipe(path)
    (tmp_path / "again.toml").write_text(dump_vlm_recipe(read))
    assert load_vlm_recipe(tmp_path / "again.toml") == read


def published(name: str):
    return load_vlm_recipe(next(path for path in RECIPES if path.stem == name))


def test_recipes_say_what_the_papers_say() -> None:
    """papers.md section 4."""
    llava, open_next, smol = published("llava-1.5"), published("open-llava-next"), published("smollm-150m")
    assert [stage.batch_size for stage in llava.stages] == [256, 128]
    assert [stage.learning_rate.model_dump(exclude_none=True) for stage in llava.stages] == [
        {"projector": 1e-3},
        {"projector": 2e-5, "llm": 2e-5},
    ]
    assert [stage.aspect for stage in llava.stages] == ["crop", "pad"]
    assert [stage.max_length for stage in llava.stages] == [2048, 2048]
    assert open_next.stages[1].learning_rate.model_dump() == {"projector": 2e-5, "llm": 2e-5, "encoder": 2e-6}
    assert {stage.aspect for stage in open_next.stages} == {"anyres"}
    assert [stage.learning_rate.llm for stage in smol.stages] == [None, 5e-5, 5e-4]
    assert all(stage.learning_rate.encoder is None for stage in smol.stages)
    for made in (llava, open_next, smol):
        assert {(stage.schedule, stage.warmup_ratio, stage.weight_decay) for stage in made.stages} == {
            ("cosine", 0.03, 0)
        }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.bach_size=3", "unknown key stages.0.bach_size (did you mean batch_size?)"),
        ("stages.0.learning_rate={}", "learning_rate is empty"),
        ("stages.0.aspect=anyres", "does not fit llava-1.5"),
        ("stages.0.conversations=none", "set either conversations (files) or hub"),
        ("stages.0.lora={rank=2}", "lora needs learning_rate.llm"),
        ("stages.1.objective=words", "objective 'words' trains the projector only"),
        ("framework=blip", "framework"),
    ],
)
def test_bad_recipes(override, message) -> None:
    path = next(path for path in RECIPES if path.stem == "llava-1.5")
    with pytest.raises(OpenVisionError) as error:
        load_vlm_recipe(path, [override])
    assert message in str(error.value)


def test_stages_that_are_wrong_are_not_also_missing() -> None:
    path = next(path for path in RECIPES if path.stem == "llava-1.5")
    with pytest.raises(OpenVisionError) as error:
        load_vlm_recipe(path, ["stages.0.bach_size=3", "stages.1.bach_size=3"])
    assert str(error.value).count("unknown key") == 2
    assert "at least 1" not in str(error.value)
    with pytest.raises(OpenVisionError, match="at least 1 entry"):
        load_vlm_recipe(path, ["stages=[]"])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"micro_batch": 3}, "batch_size 4 is not a multiple of"),
        ({}, "run of another recipe"),
    ],
)
def test_runs_that_are_refused(model_folder, data_folder, tmp_path, run, message) -> None:
    (tmp_path / "run").mkdir()
    if not run:
        (tmp_path / "run" / "recipe.toml").write_text(dump_vlm_recipe(recipe(WHOLE)))
    with pytest.raises(OpenVisionError, match=message):
        train(recipe(PROJECTOR, **run), model_folder, data_folder, tmp_path / "run")


def test_a_model_of_another_framework(next_folder, data_folder, tmp_path) -> None:
    with pytest.raises(OpenVisionError, match=r"--framework llava-1\.5"):
        train(recipe(PROJECTOR), next_folder, data_folder, tmp_path / "run")


def test_lora_targets_that_do_not_exist(model_folder, data_folder, tmp_path) -> None:
    stage = WHOLE | {"lora": {"targets": ["qkv"]}}
    with pytest.raises(OpenVisionError, match="name no linear layer"):
        train(recipe(stage), model_folder, data_folder, tmp_path / "run")


def test_train_from_the_command_line(model_folder, data_folder, tmp_path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump_vlm_recipe(recipe(PROJECTOR)))
    arguments = ["vlm", "train", file, "--model", model_folder, "--data", data_folder, "--run", tmp_path / "run"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--set", "stages.0.samples=8"])
    assert result.exit_code == 0, result.output
    assert "trained model:" in result.output
    assert len(losses(tmp_path / "run")) == 2


# Several processes.

PROCESSES = """
import sys
from pathlib import Path

if sys.argv[5] == "fsdp":
    # accelerate shards on accelerators only; told that the CPU is one, it does the same here.
    import accelerate.state as state

    known = state.DistributedType

    class Told:
        def __getattr__(self, name):
            return known.MULTI_CPU if name == "MULTI_NEURON" else getattr(known, name)

    state.DistributedType = Told()

from openvision.multimodal.recipe import load_vlm_recipe
from openvision.multimodal.training.run import train

recipe, model, data, run = map(Path, sys.argv[1:5])
train(load_vlm_recipe(recipe, sys.argv[6:]), model, data, run, lambda line: print(line, flush=True))
"""


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from openvision.cli.main import _run_command
from openvision.multimodal.training import trainer

agreed, votes = trainer.agreed_stop, [0]

def vote_and_be_told(*arguments):
    found = agreed(*arguments)
    votes[0] += 1
    if votes[0] == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return found

trainer.agreed_stop = vote_and_be_told
_run_command()
"""


@pytest.mark.slow
def test_processes_that_are_told_at_different_times_stop_together(model_folder, data_folder, tmp_path) -> None:
    """One is told between its step and the next: all stop after the next one, and the job is queued again."""
    file, script, run = tmp_path / "recipe.toml", tmp_path / "told.py", tmp_path / "run"
    file.write_text(dump_vlm_recipe(recipe(PROJECTOR | {"samples": 32}, checkpoint_every=100)))
    script.write_text(SIGNALLED)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--",
        str(script),
    ]
    command += ["vlm", "train", str(file), "--model", str(model_folder), "--data", str(data_folder), "--run", str(run)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert b"stopped after step 4; the same command resumes" in done.stderr
    assert "by the scheduler after step 4" in (run / "REQUEUE").read_text()
    assert train(load_vlm_recipe(file), model_folder, data_folder, run).is_dir()
    assert len(losses(run)) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "override"),
    [("ddp", "run.cache_features=never"), ("ddp", "run.cache_features=always"), ("fsdp", "run.fsdp=true")],
)
def test_two_processes_train_as_one(model_folder, data_folder, tmp_path, how, override) -> None:
    """Sample 12 has no image: one process of a step may see none."""
    made = recipe(WORDS, PROJECTOR, EVERYTHING, batching="random", cache_features="never", fsdp=False)
    file, script = tmp_path / "recipe.toml", tmp_path / "two.py"
    file.write_text(dump_vlm_recipe(made))
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command += [*map(str, (file, model_folder, data_folder, tmp_path / "two")), how, override]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("sharded" in done.stdout) == (how == "fsdp")
    folder = train(made, model_folder, data_folder, tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(weights(tmp_path / "two" / "model")[name], tensor, rtol=1e-3, atol=1e-4)
