"""The loop closed on scenes: an encoder learns from captions that a captioner of ours wrote.

    .venv/bin/python benchmarks/recaption_loop.py -o benchmarks/results/recaption_loop.json --seeds 0 1 2 --seconds 180

OpenVision 2 is trained on one half of the scenes with their true captions; its decoder recaptions the other half, on
which three encoders are trained: from the alt-texts alone, with the decoder's captions, and with the true ones. Every
training has the same processor time. One process of one thread; what else the machine does changes nothing. The
validation scenes score; nothing was chosen on them here.
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from ablations.budget import ENDLESS, Meeting, Speed, measure_speeds, plan_samples
from ablations.runs import validation_numbers

from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.sources.scenes.make import Options as Scenes
from openvision.data.sources.scenes.make import make_scenes
from openvision.evaluation.suites.run import Settings, evaluated
from openvision.files import JsonObject, atomic_write_text
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
_TOWER = {"width": 128, "depth": 4, "mlp_dim": 512, "heads": 2, "patch_size": 8, "image_size": 48}
_TEXT = {"width": 128, "depth": 2, "mlp_dim": 512, "heads": 2, "vocab_size": 1024, "context_length": 24}
_DECODER = {"width": 96, "depth": 1, "mlp_dim": 384, "heads": 2, "vocab_size": 1024, "caption_length": 72}
_BATCH, _WARMUP = 64, 0.05
_WORD = re.compile(r"\w+")


def recipe_of(side: str, caption: str | None, samples: int, seed: int, vocabulary: Path) -> Recipe:
    """The recipe of the captioner, or of an encoder that learns from `caption`, None for alt-texts alone."""
    captions = side == CAPTIONER or caption is not None
    model: JsonObject = {"vision": _TOWER, "decoder": _DECODER}
    if side == CAPTIONER:
        model |= {"kind": "openvision2", "keep_ratio": 0.35}
        model["decoder"] = _DECODER | {"depth": 2, "text_positions": "learned"}
    else:
        model |= {"text": _TEXT, "embed_dim": 128}
        if not captions:
            del model["decoder"]
    texts = [] if side == CAPTIONER else ["alt", "sentence"] if captions else ["alt"]
    folder = RECAPTIONED if caption == "recaption" else CAPTIONER if side == CAPTIONER else ENCODERS
    stage = {"resolution": 48, "samples": samples, "batch_size": _BATCH, "base_learning_rate": 4e-3}
    stage["warmup_samples"] = 0 if samples == ENDLESS else int(_WARMUP * samples)
    return parse_recipe(
        {
            "name": "recaption-loop",
            "seed": seed,
            "model": model,
            "data": {"train": folder, "tokenizer": str(vocabulary), "synthetic_key": caption or "synthetic"},
            "loss": {"contrastive": 0 if side == CAPTIONER else 1.0, "caption": 2.0 if captions else 0, "texts": texts},
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


def recaption(model: Path, root: Path, output: Path) -> tuple[JsonObject, float]:
    """Recaption the encoders' half; counts of the job, and the F1 of the words of new and true captions."""
    captioner = load_decoder(str(model), torch.device("cpu"), Sampling(max_tokens=72), 64)
    begin = time.process_time()
    counts = recaption_shards(
        str(root / ENCODERS), captioner, load_prompt("v1"), output, Options(), lambda line: print(line, flush=True)
    )
    took = round(time.process_time() - begin, 1)
    return {**counts, "seconds": took}, word_f1(ShardDataset(output, "recaption"))


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


def run_seed(seed: int, root: Path, work: Path, seconds: float) -> JsonObject:
    """One captioner and three encoders."""
    rate = measured_rate(CAPTIONER, None, root, work / "rate-captioner", seconds)
    model, took = train(CAPTIONER, None, root, work / "captioner", seed, seconds, rate)
    # The loader reads a folder below the data folder.
    output = root / RECAPTIONED
    output.unlink(missing_ok=True)
    (work / RECAPTIONED).mkdir()
    output.symlink_to(work / RECAPTIONED)
    counts, f1 = recaption(model, root, work / RECAPTIONED)
    examples = [
        {"recaption": sample.synthetic, "true": sample.meta["synthetic"]}
        for sample, _ in zip(ShardDataset(output, "recaption"), range(6), strict=False)
    ]
    row: JsonObject = {"seed": seed, "captioner": took, "recaption": counts, "word_f1": f1, "examples": examples}
    row["encoders"] = {}
    # Whose captions they are changes nothing about the speed.
    alone = measured_rate(ENCODERS, None, root, work / "rate-alone", seconds)
    full = measured_rate(ENCODERS, "synthetic", root, work / "rate-full", seconds)
    for side, caption in RIVALS.items():
        folder = work / re.sub(r"\W+", "-", side)
        trained, took = train(side, caption, root, folder, seed, seconds, full if caption else alone)
        found = evaluated(load_checkpoint(trained), Settings(device="cpu", threads=1, bfloat16=False, batch_size=256))
        row["encoders"][side] = took | {"validation": validation_numbers(found, root)}
        print(side, json.dumps(row["encoders"][side]), flush=True)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a row a seed, and the facts of the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=180, help="processor time of each training")
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=500)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openvision-loop-") as name:
        root = Path(name) / "scenes"
        split_scenes(root, chosen.scenes, chosen.held_out)
        texts = [text for sample in ShardDataset(root / CAPTIONER) for text in (str(sample.alt), str(sample.synthetic))]
        (root / "vocabulary").mkdir()
        Tokenizer.train(texts, _TEXT["vocab_size"]).save(root / "vocabulary")
        rows = []
        for seed in chosen.seeds:
            rows.append(run_seed(seed, root, Path(name) / f"seed{seed}", chosen.seconds))
            facts = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": processor_name(),
                "threads": 1,
                "seconds": chosen.seconds,
                "scenes": chosen.scenes,
                "git": git_state(),
                "libraries": library_versions(),
            }
            atomic_write_text(chosen.output, json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
