"""The loop closed on scenes: an encoder learns from captions that a captioner of ours wrote.

    .venv/bin/python benchmarks/recaption_loop.py -o benchmarks/results/recaption_loop.json --seeds 0 1 2 --seconds 180
        --work runs/recaption_loop

OpenVision 2 is trained on one half of the scenes with their true captions; its decoder recaptions the other half, on
which three encoders are trained: from the alt-texts alone, with the decoder's captions, and with the true ones. Every
training has the same processor time. One process of one thread; what else the machine does changes nothing. The
validation scenes score; nothing was chosen on them here. The same command with the same --work resumes after a stop.
"""

import argparse
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from ablations.budget import ENDLESS, Meeting, Speed, measure_speeds, plan_samples
from ablations.runs import validation_numbers

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.sources.scenes.make import Options as Scenes
from openvision.data.sources.scenes.make import make_scenes
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.files import JsonObject, atomic_write_text, read_json
from openvision.provenance import git_state, library_versions, processor_name
from openvision.recaption.captioners.captioner import Sampling
from openvision.recaption.captioners.decoders import load_decoder
from openvision.recaption.job import recaption_shards
from openvision.recaption.prompts import load_prompt
from openvision.recaption.shard import Options
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.text.tokenizer import Tokenizer
from openvision.training.trainer import launch
from openvision.weights.load import load_checkpoint

CAPTIONER, ENCODERS, RECAPTIONED = "captioner", "encoders", "recaptioned"
RIVALS = {"alt-texts alone": None, "our decoder's captions": "recaption", "true captions": "synthetic"}
"""Side -> name of the caption that it learns from."""
_VOCABULARY = 1024
_TOWER = {"width": 128, "depth": 4, "mlp_dim": 512, "heads": 2, "patch_size": 8, "image_size": 48, "init": "by_width"}
_TEXT = {"width": 128, "depth": 2, "mlp_dim": 512, "heads": 2, "vocab_size": _VOCABULARY, "context_length": 24}
_MASKED = {"pad_id": 0, "pool": "mean"}
_DECODER = {"width": 96, "depth": 1, "mlp_dim": 384, "heads": 2, "vocab_size": _VOCABULARY, "caption_length": 72}
_BATCH, _WARMUP, _EXAMPLES = 64, 0.05, 12
_WORD = re.compile(r"\w+")


def recipe_of(side: str, caption: str | None, samples: int, seed: int, vocabulary: Path) -> Recipe:
    """The recipe of the captioner, or of an encoder that learns from `caption`, None for alt-texts alone."""
    captions = side == CAPTIONER or caption is not None
    model: JsonObject = {"vision": _TOWER, "decoder": _DECODER}
    if side == CAPTIONER:
        model |= {"kind": "openvision2", "keep_ratio": 0.35}
        model["decoder"] = _DECODER | {"depth": 2, "text_positions": "learned"}
    else:
        model |= {"text": _TEXT | _MASKED, "embed_dim": 128}
        if not captions:
            del model["decoder"]
    texts = [] if side == CAPTIONER else ["alt", "sentence"] if captions else ["alt"]
    folder = RECAPTIONED if caption == "recaption" else CAPTIONER if side == CAPTIONER else ENCODERS
    stage = {"resolution": 48, "samples": samples, "batch_size": _BATCH, "base_learning_rate": 8e-3}
    stage["warmup_samples"] = 0 if samples == ENDLESS else int(_WARMUP * samples)
    return parse_recipe(
        {
            "name": "recaption-loop",
            "seed": seed,
            "model": model,
            "data": {"train": folder, "tokenizer": str(vocabulary), "synthetic_key": caption or "synthetic"},
            "loss": {"contrastive": 0 if side == CAPTIONER else 1.0, "caption": 2.0 if captions else 0, "texts": texts},
            # As recipes/openvision-plus: otherwise no side leaves the first plateau in minutes.
            "optimizer": {"kind": "muon"},
            "augment": {"crop_area": [0.8, 1.0], "jitter": 0.1, "grayscale_probability": 0},
            "stages": [stage],
            "run": {
                **{"log_every": 50, "device": "cpu", "loader_workers": 0, "checkpoints_kept": 1},
                **{"evaluate_every": 10**9, "checkpoint_every": 10**9},
            },
        },
        side,
    )


def split_scenes(root: Path, train: int, held_out: int) -> None:
    """Scenes below `root`, the training scenes in halves."""
    make_scenes(root, Scenes(train=train, held_out=held_out, objects=24), workers=1)
    scenes = ShardDataset(root / "train")
    for half, folder in enumerate((CAPTIONER, ENCODERS)):
        if (root / folder / "shards.json").is_file():
            continue
        with ShardWriter(root / folder, samples_per_shard=500) as writer:
            for index in range(half, len(scenes), 2):
                sample = scenes[index]
                meta = {"name": sample.meta["name"], "synthetic": sample.synthetic}
                writer.write(sample.key, sample.image, sample.extension, str(sample.alt), meta)


def measured_rate(side: str, caption: str | None, root: Path, folder: Path, seconds: float) -> float:
    """Samples that one second of processor time trains."""
    endless = recipe_of(side, caption, ENDLESS, 0, root / "vocabulary")
    meeting = Meeting(folder / "meeting", side, (side,))
    (speed,) = measure_speeds(endless, root, folder / "speed", max(1.0, seconds / 60), 2, meeting)
    return speed.rate


def train(
    side: str, caption: str | None, root: Path, folder: Path, seed: int, seconds: float, rate: float
) -> tuple[Path, JsonObject]:
    """Train for `seconds` of processor time at `rate`; the model's folder and what it took."""
    torch.manual_seed(seed)
    # Nothing is loaded by other processes: the first batch costs what every batch costs.
    (samples,) = plan_samples([Speed(0.0, rate, 0.0)], [1.0], seconds, _BATCH)
    begin = time.process_time()
    model = launch(recipe_of(side, caption, samples, seed, root / "vocabulary"), root, folder)
    assert model is not None
    return model, {"samples": samples, "seconds": round(time.process_time() - begin, 1), "rate": round(rate, 1)}


def recaption(model: Path, root: Path, output: Path) -> JsonObject:
    """Recaption the encoders' half; counts of the job, the F1 of the words of new and true captions, and examples."""
    captioner = load_decoder(str(model), torch.device("cpu"), Sampling(max_tokens=72), 64)
    begin = time.process_time()
    counts = recaption_shards(
        str(root / ENCODERS), captioner, load_prompt("v1"), output, Options(), lambda line: print(line, flush=True)
    )
    took = round(time.process_time() - begin, 1)
    dataset = ShardDataset(output, "recaption")
    examples = [
        {"recaption": sample.synthetic, "true": sample.meta["synthetic"]}
        for sample in (dataset[index] for index in range(min(_EXAMPLES, len(dataset))))
    ]
    return {"recaption": {**counts, "seconds": took}, "word_f1": word_f1(dataset), "examples": examples}


def word_f1(dataset: ShardDataset) -> float:
    """Mean F1 of the words, as multisets, of new and true captions; a missing caption counts 0."""
    scores = []
    for sample in dataset:
        new, true = (
            Counter(_WORD.findall(str(text or "").lower())) for text in (sample.synthetic, sample.meta["synthetic"])
        )
        both = (new & true).total()
        scores.append(2 * both / (new.total() + true.total()))
    return round(sum(scores) / len(scores), 4)


def once(path: Path, act: Callable[[], JsonObject]) -> JsonObject:
    """What `act` returns, from `path` where an earlier start finished it; what a stop left of its folder is removed."""
    if path.is_file():
        return read_json(path)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    found = act()
    atomic_write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def run_seed(seed: int, root: Path, work: Path, seconds: float, rates: JsonObject) -> JsonObject:
    """One captioner and three encoders."""
    work.mkdir(exist_ok=True)

    def learn(side: str, caption: str | None, folder: Path, rate: float) -> JsonObject:
        model, took = train(side, caption, root, folder, seed, seconds, rate)
        return {"model": str(model), **took}

    made = once(work / "captioner.json", lambda: learn(CAPTIONER, None, work / "captioner", rates["captioner"]))
    # The loader reads a folder below the data folder.
    output = root / RECAPTIONED
    output.unlink(missing_ok=True)
    (work / RECAPTIONED).mkdir(exist_ok=True)
    output.symlink_to((work / RECAPTIONED).resolve())
    row: JsonObject = {"seed": seed, "captioner": {name: value for name, value in made.items() if name != "model"}}
    row |= once(work / "captions.json", lambda: recaption(Path(made["model"]), root, work / RECAPTIONED))
    row["encoders"] = {}

    def measure(side: str, caption: str | None, folder: Path) -> JsonObject:
        trained = learn(ENCODERS, caption, folder, rates["full" if caption else "alone"])
        model = load_checkpoint(trained.pop("model"))
        found = evaluated(model, Settings(device="cpu", threads=1, bfloat16=False, batch_size=256))
        return trained | {"validation": validation_numbers(found, root)}

    for side, caption in RIVALS.items():
        folder = work / re.sub(r"\W+", "-", side)
        row["encoders"][side] = once(folder.with_suffix(".json"), partial(measure, side, caption, folder))
        print(side, json.dumps(row["encoders"][side]), flush=True)
    return row


def spread(rows: Sequence[JsonObject]) -> JsonObject:
    """Mean and standard deviation over the seeds of every number of every side, and of the word F1."""

    def of(values: Sequence[float]) -> JsonObject:
        return {"mean": round(mean(values), 4), "deviation": round(stdev(values), 4) if len(values) > 1 else None}

    sides = {side: [row["encoders"][side]["validation"] for row in rows] for side in RIVALS}
    found = {side: {name: of([one[name] for one in every]) for name in every[0]} for side, every in sides.items()}
    return {"word_f1": of([row["word_f1"] for row in rows]), "encoders": found}


def measured_rates(root: Path, folder: Path, seconds: float) -> JsonObject:
    """Samples a second of the captioner and of encoders; whose captions they learn from changes nothing."""
    return {
        "captioner": measured_rate(CAPTIONER, None, root, folder / "captioner", seconds),
        "alone": measured_rate(ENCODERS, None, root, folder / "alone", seconds),
        "full": measured_rate(ENCODERS, "synthetic", root, folder / "full", seconds),
    }


def prepare(root: Path, scenes: int, held_out: int) -> JsonObject:
    """Scenes and the vocabulary of one half."""
    split_scenes(root, scenes, held_out)
    texts = [text for sample in ShardDataset(root / CAPTIONER) for text in (str(sample.alt), str(sample.synthetic))]
    (root / "vocabulary").mkdir(exist_ok=True)
    Tokenizer.train(texts, _VOCABULARY).save(root / "vocabulary")
    return {"scenes": scenes, "held_out": held_out}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a row a seed, and the facts of the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder that a later start resumes from; default: a temporary one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=180, help="processor time of each training")
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=500)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openvision-loop-") as name:
        work = chosen.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        job = {"seconds": chosen.seconds, "scenes": chosen.scenes, "held_out": chosen.held_out}
        if once(work / "job.json", lambda: job) != job:
            raise SystemExit(f"{work} belongs to other --seconds or --scenes; choose another --work")
        root = work / "scenes"
        once(work / "scenes.json", lambda: prepare(root, chosen.scenes, chosen.held_out))
        rates = once(work / "rates.json", lambda: measured_rates(root, work / "rates", chosen.seconds))
        rows = []
        for seed in chosen.seeds:
            rows.append(run_seed(seed, root, work / f"seed{seed}", chosen.seconds, rates))
            facts = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": processor_name(),
                "threads": 1,
                **job,
                "git": git_state(),
                "libraries": library_versions(),
            }
            content = {**facts, "summary": spread(rows), "rows": rows}
            atomic_write_text(chosen.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
