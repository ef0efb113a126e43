"""A tiny recipe, its data, and runs that are started, broken and resumed."""

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from openvision.files import read_json_lines
from openvision.recipe.schema import dump_recipe, parse_recipe
from openvision.training.checkpoint.folders import checkpoints, step_of

FOLDER = Path(__file__).parent
KILLED = -9
REQUEUE = 75

RECIPE: dict[str, Any] = {
    "name": "faults",
    "model": {
        "embed_dim": 16,
        "vision": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "patch_size": 8, "image_size": 32},
        "text": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "vocab_size": 128, "context_length": 12},
        "decoder": {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "vocab_size": 128, "caption_length": 24},
    },
    "data": {"train": "train", "vocab_size": 128},
    "stages": [
        {"resolution": 16, "samples": 64, "batch_size": 8, "base_learning_rate": 0.03, "warmup_samples": 16},
        {"resolution": 32, "samples": 32, "batch_size": 8, "base_learning_rate": 0.01},
    ],
    "run": {"log_every": 1, "checkpoint_every": 2, "precision": "float32"},
}
STEPS = 12


@dataclass(frozen=True)
class Outcome:
    """How the processes of a run ended."""

    codes: list[int]
    log: str
    """Everything they printed, by rank."""


class Bench:
    """Starts runs and looks at what they leave."""

    def __init__(self, server: Any, data: Path, folder: Path) -> None:
        self.server = server
        self.data = data
        self.folder = folder
        self._references: dict[Any, Path] = {}
        self._attempts = 0

    def recipe(self, changes: dict[str, Any] | None = None) -> Path:
        """The tiny recipe with some keys ("run.checkpoint_every") changed, as a file."""
        content = copy.deepcopy(RECIPE)
        for place, value in (changes or {}).items():
            *parents, last = place.split(".")
            node = content
            for key in parents:
                node = node.setdefault(key, {}) if isinstance(node, dict) else node[int(key)]
            node[last] = value
        path = self.folder / f"recipe-{abs(hash(json.dumps(changes, sort_keys=True)))}.toml"
        path.write_text(dump_recipe(parse_recipe(content, "faults")))
        return path

    def new_run(self) -> Path:
        """A folder for a run."""
        return Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))

    def run(
        self,
        run: Path,
        changes: dict[str, Any] | None = None,
        processes: int = 1,
        faults: dict[str, Any] | Sequence[dict[str, Any]] | None = None,
        data: Path | None = None,
        force: bool = False,
    ) -> Outcome:
        """Run until every process has ended; `faults` are those of all processes, or of each."""
        self._attempts += 1
        logs = self.folder / f"logs-{self._attempts}"
        logs.mkdir()
        each = [faults or {}] * processes if faults is None or isinstance(faults, dict) else list(faults)
        common = {"recipe": str(self.recipe(changes)), "data": str(data or self.data), "run": str(run), "force": force}
        arguments = [{**common, "faults": those} for those in each]
        if processes == 1:
            numbers = [self.server.start("faults/scenarios:train", arguments[0], logs / "rank-0.log")]
        else:
            numbers = self.server.start_ranks("faults/scenarios:train", arguments, logs)
        codes = [self.server.wait(number) for number in numbers]
        return Outcome(codes, "".join(path.read_text() for path in sorted(logs.glob("rank-*.log"))))

    def reference(self, changes: dict[str, Any] | None = None, processes: int = 1) -> Path:
        """A run of the same recipe that nothing happened to."""
        key = (json.dumps(changes, sort_keys=True), processes)
        if key not in self._references:
            run = self.new_run()
            outcome = self.run(run, changes, processes)
            assert outcome.codes == [0] * processes, outcome.log
            self._references[key] = run
        return self._references[key]

    def copy_of(self, run: Path) -> Path:
        """A run folder to break."""
        copied = self.new_run()
        shutil.copytree(run, copied, dirs_exist_ok=True)
        return copied

    def steps(self, run: Path) -> list[int]:
        """Steps of the complete checkpoints."""
        return [step_of(path) for path in checkpoints(run / "checkpoints")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained model."""
    return load_file(run / "model" / "model.safetensors")


def assert_same(run: Path, reference: Path) -> None:
    """The same weights to the last bit, and the same losses at the same steps."""
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} tensors differ, {different[0]} the first"
    assert losses(run) == losses(reference)


def losses(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "train"}


def events(run: Path) -> list[dict[str, Any]]:
    """What was out of the ordinary."""
    return [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "event"]
