"""Run folder: it belongs to one recipe and one data set, which must not change on resume, and to one trainer at a time.

RUN/recipe.toml   the resolved recipe
RUN/data.json     samples and manifest hash of every source, and hashes of its shards
RUN/tokenizer/    the tokenizer, trained or copied when the run starts
RUN/LOCK          locked by the main process, and who that is

How a run is executed may change on resume: device, number of processes, sharding, micro-batches, data loader, logging
and checkpoint periods.
Any other difference is shown and refused, or accepted with `force` and recorded.
"""

import contextlib
import difflib
import errno
import fcntl
import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from openvision.data.mixture import Mixture
from openvision.errors import OpenVisionError
from openvision.files import JsonObject, atomic_write_text, make_folder, read_json
from openvision.recipe.schema import STORED, Recipe, dump_recipe, load_recipe
from openvision.recipe.sections import Run
from openvision.runtime import Processes
from openvision.text.tokenizer import Tokenizer
from openvision.training.run.watchdog import AlreadyReportedError, clear_failure
from openvision.training.setup.evaluators import complete_evaluators
from openvision.training.setup.start import tokenizer_of_start
from openvision.weights.sentence_encoder import tokenizer_of_encoder

DATA = "data.json"
LOCK = "LOCK"
# Changed shards listed in an error message.
_LISTED_SHARDS = 5
# Keys of `run` that change the numbers of a run.
_NUMERIC_KEYS = ("precision", "compile", "float32_matmul", "deterministic")


class RunLock:
    """One trainer for a run folder: a lock that the operating system drops when its process ends, however it ends.

    POSIX record locks, because they hold between machines over NFS and are not inherited by children.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / LOCK
        self._file: int | None = None

    def take(self) -> str | None:
        """Lock the folder; returns why that is refused. A file system without locks locks nothing."""
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return f"cannot write {self.path} ({error.strerror}); choose another run folder or change its permissions"
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
            owner = os.read(self._file, 1000).decode("utf-8", "replace").strip()
            self.release()
            return (
                f"{self.path.parent} is being trained by another process ({ascii(owner)[1:-1] or 'unknown'}); wait for "
                "its end, stop it, or choose another run folder"
            )
        self._name_owner(self._file)
        return None

    def release(self) -> None:
        """Unlock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @staticmethod
    def _name_owner(file: int) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()} since {now}\n".encode())


def lock_run(run_folder: Path, processes: Processes) -> RunLock:
    """Lock the folder for all processes of a run, and remove what the session before said of its end.

    Raises OpenVisionError in the main process when another run holds it, AlreadyReportedError in the others.
    """
    lock = RunLock(run_folder)
    refusal = processes.broadcast(lock.take() if processes.is_main else None)
    if refusal is not None:
        raise OpenVisionError(refusal) if processes.is_main else AlreadyReportedError(refusal)
    if processes.is_main:
        clear_failure(run_folder)
    processes.barrier()
    return lock


def is_claimed(run_folder: Path) -> bool:
    """Whether a run was started in the folder; what a failed start left behind may be overwritten."""
    return (run_folder / STORED).exists()


def release(run_folder: Path) -> None:
    """Give the folder back, for a start that failed before its first step: any recipe may be started in it."""
    for name in (STORED, DATA):
        (run_folder / name).unlink(missing_ok=True)


def claim_recipe(recipe: Recipe, run_folder: Path, force: bool = False) -> list[str]:
    """`compare_recipe`, and write the recipe to the run folder."""
    differences = compare_recipe(recipe, run_folder, force)
    atomic_write_text(run_folder / STORED, dump_recipe(recipe))
    return differences


def compare_recipe(recipe: Recipe, run_folder: Path, force: bool = False) -> list[str]:
    """Compare the recipe with the one that the run was started with; nothing is written.

    Returns the differences that `force` accepted; without `force` raises OpenVisionError that shows them.
    """
    path = run_folder / STORED
    differences: list[str] = []
    if path.exists():
        differences = _diff(
            _fixed_lines(load_recipe(path, stored=True), str(path)), _fixed_lines(recipe, "this recipe")
        )
        _refuse(
            differences,
            force,
            f"{run_folder} holds a run of another recipe:\n{_indented(differences)}\nchoose another run folder, undo "
            "the change, or resume with --force, which is recorded",
        )
    return differences


def claim_data(
    data: Mixture, run_folder: Path, force: bool = False, facts: JsonObject | None = None
) -> tuple[JsonObject, list[str]]:
    """`compare_data`, and write the identity of the data to the run folder.

    `facts` are kept with it, such as the `folder` of the data. Returns the identity, without single shards, and the
    differences.
    """
    described = describe_data(data)
    differences = _compare(described, run_folder, force)
    found = {**described, **(facts or {})}
    atomic_write_text(run_folder / DATA, json.dumps(found, indent=1) + "\n")
    return _without_shards(found), differences


def compare_data(data: Mixture, run_folder: Path, force: bool = False) -> list[str]:
    """Compare the data with those that the run was started with; nothing is written.

    Returns the differences that `force` accepted; without `force` raises OpenVisionError that shows them.
    """
    return _compare(describe_data(data), run_folder, force)


def _compare(found: JsonObject, run_folder: Path, force: bool) -> list[str]:
    path = run_folder / DATA
    differences: list[str] = []
    if path.exists():
        try:
            before = read_json(path)
            if before["manifest_sha256"] != found["manifest_sha256"]:
                differences = _data_diff(before, found)
        except (OpenVisionError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OpenVisionError(f"{path} cannot be read ({error}); remove it to accept the current data") from error
        _refuse(
            differences,
            force,
            f"the data differ from those that {run_folder} was started with:\n{_indented(differences)}\nrestore them, "
            "choose another run folder, or resume with --force, which is recorded",
        )
    return differences


def describe_data(data: Mixture) -> JsonObject:
    """Identity of the data: manifest hash; name, weight, samples, manifest hash and shard hashes of each source."""
    sources = [
        {
            "name": name,
            "weight": weight,
            "samples": len(source),
            "manifest_sha256": source.manifest_hash(),
            "shards": source.shard_hashes(),
        }
        for name, weight, source in zip(data.names, data.weights, data.sources, strict=True)
    ]
    return {"manifest_sha256": data.manifest_hash(), "sources": sources}


def claim_tokenizer(
    recipe: Recipe, data: Mixture, run_folder: Path, say: Callable[[str], None], reuse: bool = True
) -> Tokenizer:
    """Tokenizer of the run folder; taken from the recipe's `start`, copied or trained there when the run starts.

    Without `reuse` one that is there is overwritten: a start that failed left it behind. Raises OpenVisionError when it
    has more entries than the model can embed, or is not the one of `start`.
    """
    folder, settings = run_folder / "tokenizer", recipe.data
    if reuse and (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    tokenizer = Tokenizer.load(Path(settings.tokenizer)) if settings.tokenizer is not None else None
    if recipe.warm_start is not None and recipe.warm_start.text is not None:
        tokenizer = tokenizer_of_encoder(Path(recipe.warm_start.text).expanduser(), tokenizer)
    if recipe.start is not None:
        theirs = tokenizer_of_start(recipe.start, recipe.model, tokenizer, recipe.warm_start)
        if theirs is not None and tokenizer is None:
            unread = f"; data.vocab_size {settings.vocab_size} is not used" if settings.vocab_size else ""
            say(f"start {recipe.start}: its tokenizer of {theirs.vocab_size} entries comes along{unread}")
        tokenizer = theirs or tokenizer
    if tokenizer is None:
        if settings.vocab_size is None:
            raise OpenVisionError(
                f"start = {recipe.start!r} brings no tokenizer to this model; give data.vocab_size, to train a "
                "vocabulary, or data.tokenizer"
            )
        tokenizer = Tokenizer.train(data.texts(), settings.vocab_size)
    if tokenizer.vocab_size > recipe.vocab_size:
        raise OpenVisionError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {recipe.vocab_size}; raise vocab_size"
        )
    text = recipe.model.text
    if text is not None and text.pad_id not in (None, tokenizer.pad_id):
        raise OpenVisionError(
            f"model.text.pad_id {text.pad_id} is not the tokenizer's id of padding, {tokenizer.pad_id}; give that one"
        )
    make_folder(folder)
    tokenizer.save(folder)
    return tokenizer


def _fixed_lines(recipe: Recipe, source: str) -> list[str]:
    """TOML lines of a recipe, with defaults for everything that may change on resume."""
    free = {name: field.default for name, field in Run.model_fields.items() if name not in _NUMERIC_KEYS}
    fixed = complete_evaluators(recipe, source).model_copy(
        update={
            "run": recipe.run.model_copy(update=free),
            "parallel": type(recipe.parallel)(),
            "stages": tuple(stage.model_copy(update={"micro_batches": 1}) for stage in recipe.stages),
            "description": "",
        }
    )
    return dump_recipe(fixed).splitlines()


def _diff(before: list[str], after: list[str]) -> list[str]:
    lines = difflib.unified_diff(before, after, lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _data_diff(before: JsonObject, after: JsonObject) -> list[str]:
    old, new = ({source["name"]: source for source in each["sources"]} for each in (before, after))
    found = [f"- source {name}" for name in old if name not in new]
    found += [f"+ source {name}" for name in new if name not in old]
    for name in old.keys() & new.keys():
        for key in ("weight", "samples"):
            if old[name][key] != new[name][key]:
                found.append(f"source {name}: {key} {old[name][key]} -> {new[name][key]}")
        changed = [
            shard
            for shard in sorted({**old[name]["shards"], **new[name]["shards"]})
            if old[name]["shards"].get(shard) != new[name]["shards"].get(shard)
        ]
        more = f" and {len(changed) - _LISTED_SHARDS} more" if len(changed) > _LISTED_SHARDS else ""
        if changed:
            found.append(f"source {name}: shards changed, added or gone: {', '.join(changed[:_LISTED_SHARDS])}{more}")
    return found or [f"manifest {before['manifest_sha256'][:12]} -> {after['manifest_sha256'][:12]}"]


def _without_shards(data: JsonObject) -> JsonObject:
    sources = [{key: value for key, value in source.items() if key != "shards"} for source in data["sources"]]
    return {**data, "sources": sources}


def _indented(differences: list[str]) -> str:
    return "\n".join(f"  {line}" for line in differences)


def _refuse(differences: list[str], force: bool, message: str) -> None:
    if differences and not force:
        raise OpenVisionError(message)
