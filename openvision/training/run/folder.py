"""A run folder belongs to one recipe and one set of data: what a run was begun with is what it goes on with.

RUN/recipe.toml   the resolved recipe
RUN/data.json     samples and manifest hash of every source, and of its shards
RUN/tokenizer/    the tokenizer, learnt or copied on the first start

How the run is carried out may change whenever it goes on: number of processes, sharding, loader, how often it logs and
saves. Anything else is refused with the difference shown, or accepted with `force` and recorded.
"""

import difflib
import json
from pathlib import Path
from typing import Any

from openvision.data.mixture import Mixture
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, make_folder
from openvision.recipe.schema import Recipe, Run, dump_recipe, load_recipe
from openvision.text.tokenizer import Tokenizer

RECIPE = "recipe.toml"
DATA = "data.json"
# Shards named in a difference; more would hide the rest of the message.
_NAMED = 5
# Parts of `run` that change numbers.
_NUMBERS = ("precision", "compile")


def claim_recipe(recipe: Recipe, run_folder: Path, force: bool = False) -> list[str]:
    """Write the resolved recipe into the run folder, or compare it with the one there.

    Returns differences accepted by `force`; without it raises OpenVisionError that shows them.
    """
    path = run_folder / RECIPE
    differences: list[str] = []
    if path.exists():
        differences = _differences(_published(load_recipe(path)), _published(recipe))
        _refuse(
            differences,
            force,
            f"{run_folder} holds a run of another recipe:\n{_listed(differences)}\nchoose another run folder, undo the "
            "change, or go on with --force, which is recorded",
        )
    atomic_write_text(path, dump_recipe(recipe))
    return differences


def claim_data(data: Mixture, run_folder: Path, force: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Write what the data are into the run folder, or compare it with what is there.

    Returns the description of the data, and differences accepted by `force`; without it raises OpenVisionError.
    """
    path = run_folder / DATA
    found = describe_data(data)
    differences: list[str] = []
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["manifest_sha256"] != found["manifest_sha256"]:
                differences = _data_differences(before, found)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OpenVisionError(
                f"{path} cannot be read ({error}); remove it to accept the data as they are"
            ) from error
        _refuse(
            differences,
            force,
            f"the data are not those that {run_folder} was begun with:\n{_listed(differences)}\nrestore them, choose "
            "another run folder, or go on with --force, which is recorded",
        )
    atomic_write_text(path, json.dumps(found, indent=1) + "\n")
    return _without_shards(found), differences


def describe_data(data: Mixture) -> dict[str, Any]:
    """Identity of the data: their manifest hash, and for each source its name, samples, hash and shards."""
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


def claim_tokenizer(recipe: Recipe, data: Mixture, run_folder: Path) -> Tokenizer:
    """The run's own tokenizer, learnt or copied on the first start."""
    folder = run_folder / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    if recipe.data.tokenizer is not None:
        path = Path(recipe.data.tokenizer)
        tokenizer = Tokenizer.from_vocabulary(path) if path.suffix == ".txt" else Tokenizer.load(path)
    else:
        assert recipe.data.vocab_size is not None
        tokenizer = Tokenizer.train(data.texts(), recipe.data.vocab_size)
    if tokenizer.vocab_size > recipe.vocab_size:
        raise OpenVisionError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {recipe.vocab_size}: raise vocab_size"
        )
    make_folder(folder)
    tokenizer.save(folder)
    return tokenizer


def _published(recipe: Recipe) -> list[str]:
    """Lines of the recipe without what may change between two starts."""
    free = {name: field.default for name, field in Run.model_fields.items() if name not in _NUMBERS}
    fixed = recipe.model_copy(
        update={"run": recipe.run.model_copy(update=free), "parallel": type(recipe.parallel)(), "description": ""}
    )
    return dump_recipe(fixed).splitlines()


def _differences(before: list[str], after: list[str]) -> list[str]:
    lines = difflib.unified_diff(before, after, "in the run folder", "now", lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _data_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
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
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        if changed:
            found.append(f"source {name}: shards changed, added or gone: {', '.join(changed[:_NAMED])}{more}")
    return found or [f"manifest {before['manifest_sha256'][:12]} -> {after['manifest_sha256'][:12]}"]


def _without_shards(data: dict[str, Any]) -> dict[str, Any]:
    sources = [{key: value for key, value in source.items() if key != "shards"} for source in data["sources"]]
    return {**data, "sources": sources}


def _listed(differences: list[str]) -> str:
    return "\n".join(f"  {line}" for line in differences)


def _refuse(differences: list[str], force: bool, message: str) -> None:
    if differences and not force:
        raise OpenVisionError(message)
