"""Reference pages written from the code: the command line, the keys of recipes, the Python API."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import typer.core
import typer.main
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import openvision
from openvision.cli.app import app
from openvision.multimodal.recipe import VlmRecipe
from openvision.recipe.schema import Recipe, load_recipe
from openvision.recipe.text import remarks
from openvision.recipe.view import values_of

ROOT = Path(__file__).parents[2]
PUBLISHED = {"OpenVisionConfig": "recipes/openvision/l14.toml", "OpenVision2Config": "recipes/openvision2/l14.toml"}
# Sections that no paper has: how a run is executed and watched.
EXECUTION = ("run", "parallel", "guards", "evaluate")

# Keys that mean the same wherever they occur, and have no text of their own.
COMMON = {
    "name": "Name in logs and results.",
    "description": "One line for people.",
    "seed": "Seed of parameters, order and augmentation.",
    "width": "Channels of a token.",
    "depth": "Transformer blocks.",
    "mlp_dim": "Hidden channels of the MLP of a block.",
    "heads": "Attention heads of a block; they divide the width.",
    "patch_size": "Side of a patch.",
    "image_size": "Resolution of the last stage, at which the trained model is used.",
    "vocab_size": "Entries of the table of token embeddings.",
    "context_length": "Ids of a text, `[bos]`, `[eos]` and the class token included.",
    "caption_length": "Tokens of a caption that are predicted or read.",
    "embed_dim": "Width of the embeddings of images and texts.",
}
UNITS = {
    **dict.fromkeys(("resolution", "patch_size", "image_size"), "pixels"),
    **dict.fromkeys(("samples", "batch_size", "warmup_samples", "block", "window", "micro_batch"), "samples"),
    **dict.fromkeys(("width", "mlp_dim", "embed_dim"), "channels"),
    **dict.fromkeys(("context_length", "caption_length", "max_length"), "tokens"),
    **dict.fromkeys(("log_every", "evaluate_every", "checkpoint_every", "every", "spike_window"), "steps"),
    **dict.fromkeys(("hang_seconds", "start_timeout_seconds", "step_timeout_seconds"), "seconds"),
    "checkpoint_minutes": "minutes",
    "vocab_size": "entries",
    "depth": "blocks",
    "base_learning_rate": "per 256 samples of batch",
    "crop_area": "share of the image",
    "crop_aspect": "width / height",
    "peak_tflops": "TFLOP/s",
    "spike_deviations": "standard deviations",
}
# Beside `openvision.__all__`: what its functions return, and where other packages hook in.
FURTHER = (
    "openvision.inference.encoder.SearchResult",
    "openvision.inference.captioner.Captioner",
    "openvision.inference.embed.read_features",
    "openvision.inference.index.VectorIndex",
    "openvision.models.vision.VisionFeatures",
    "openvision.models.vision.LayerTokens",
    "openvision.weights.load.load_checkpoint",
    "openvision.weights.registry.released",
    "openvision.evaluation.evaluators.base.Evaluator",
    "openvision.multimodal.model.generate.load_assistant",
    "openvision.errors.OpenVisionError",
)


def pages() -> dict[str, str]:
    """Name of each reference page -> its Markdown."""
    return {"cli.md": command_line(), "recipes.md": recipe_keys(), "python.md": python_api()}


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside of a cell is escaped."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


# The command line


class _Command(typing.Protocol):
    """What of a click command is read here."""

    name: str
    help: str | None
    params: list[typer.core.TyperOption | typer.core.TyperArgument]


def command_line() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Command line",
        "Written from the code when the site is built; `openvision COMMAND --help` prints the same. Exit codes: 0; 1 "
        "with one sentence on standard error for a mistake that you can fix; 130 after Ctrl-C; 75 when the scheduler "
        "stopped a run that is to be started again.",
    ]
    for words, command in _commands(typer.main.get_command(app), ["openvision"]):
        parts += [f"## `{' '.join(words)}`", _prose(command.help or "")]
        rows = [_parameter(each) for each in command.params if not each.hidden]
        if rows:
            parts.append(table(("argument", "type", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(command: object, words: list[str]) -> Iterator[tuple[list[str], _Command]]:
    below: Mapping[str, object] | None = getattr(command, "commands", None)
    if below is None:
        yield words, typing.cast(_Command, command)
        return
    for name, each in below.items():
        yield from _commands(each, [*words, name])


def _parameter(parameter: typer.core.TyperOption | typer.core.TyperArgument) -> tuple[str, ...]:
    argument = isinstance(parameter, typer.core.TyperArgument)
    names = [(parameter.name or "").upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    default = parameter.default() if callable(parameter.default) else parameter.default
    if parameter.required:
        shown = "required"
    elif default is None or default == [] or default == ():
        shown = ""
    else:
        shown = f"`{default.value if isinstance(default, Enum) else default}`"
    kind = type_text(parameter.type_descriptor.annotation)
    if kind == type_text(bool):
        kind, shown = "flag", "on" if default is True else ""
    elif parameter.multiple:
        kind = kind.removeprefix("list of ") + ", repeatable"
    return ", ".join(f"`{name}`" for name in names), kind, shown, parameter.help or ""


# Recipes


@dataclass(frozen=True)
class Key:
    """A key of a recipe, as the schema has it."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Published:
    """Values of a recipe that states what a paper did, with the remarks on those that are ours."""

    values: Mapping[str, object]
    remarks: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Published":
        """Read a recipe file with its remarks."""
        found = remarks(path.read_text(encoding="utf-8"))
        return cls(values_of(load_recipe(path)), {remark.place: remark.text for remark in found})

    def of(self, place: str) -> str:
        """Cell for a key; empty where the recipe leaves it out."""
        place = place.replace("stages.", "stages.0.")
        if place not in self.values:
            return ""
        remark = f" ({self.remarks[place]})" if place in self.remarks else ""
        return toml_text(self.values[place]) + remark


def recipe_keys() -> str:
    """Every key of a recipe with type, default, unit, published value and meaning."""
    first, second = PUBLISHED["OpenVisionConfig"], PUBLISHED["OpenVision2Config"]
    parts = [
        "# Keys of a recipe",
        "Written from the schema when the site is built. An unknown key is an error that names the nearest known one; "
        f"`--set stages.0.batch_size=64` changes any of them. *Published* is the value of `{first}` (for OpenVision 2 "
        f"`{second}`), from the papers and the released scripts; a remark says where a value is ours. Tables without "
        "that column say how a run is executed, which is never part of a published recipe.",
        "## Recipes of encoders",
        *Sections().of(Recipe, "", Published.read(ROOT / first)),
        "## Recipes of multimodal models",
        "For `openvision vlm train`. Learning rates are peak values here, as these frameworks publish them.",
        *Sections("vlm: ").of(VlmRecipe, "", None),
    ]
    return "\n\n".join(parts) + "\n"


@dataclass
class Sections:
    """Tables of a schema, each with its heading; a class is shown once for each place that it has."""

    prefix: str = ""
    seen: set[tuple[str, type]] = dataclasses.field(default_factory=set)

    def of(self, model: type, place: str, published: Published | None, kind: str = "") -> Iterator[str]:
        """The table of a model of the schema, and those of the models that its fields hold."""
        columns = ("key", "type", "default", "unit", *(("published",) if published else ()), "meaning")
        rows: list[tuple[str, ...]] = []
        below: list[tuple[str, type, bool]] = []
        for key, annotation in keys_of(model):
            full = f"{place}.{key.name}" if place else key.name
            inner = classes_in(annotation)
            below += [(full, each, "tuple" in str(annotation)) for each in inner]
            if not inner or key.type.startswith("text"):
                shown = (published.of(full),) if published else ()
                rows.append((f"`{key.name}`", key.type, key.default, UNITS.get(key.name, ""), *shown, key.meaning))
        if rows:
            yield table(columns, rows)
        for full, each, many in below:
            if (full, each) in self.seen:
                continue
            self.seen.add((full, each))
            source = None if full in EXECUTION else published
            if published and full == "model":
                source = Published.read(ROOT / PUBLISHED[each.__name__]) if each.__name__ in PUBLISHED else None
            inside = str(getattr(each, "kind", "")) or kind
            heading = f"[[{full}]]" if many else f"[{full}]"
            yield f"### `{self.prefix}{heading}`" + (f' of kind = "{inside}"' if inside and not many else "")
            yield _prose((inspect.getdoc(each) or "").split("\n\n")[0])
            yield from self.of(each, full, source, inside)


def keys_of(model: type) -> list[tuple[Key, object]]:
    """Keys of a pydantic model or a dataclass of the schema, each with its annotation."""
    bases = [base for base in reversed(model.__mro__) if base.__module__.startswith("openvision.")]
    meanings = {name: text for base in bases for name, text in attribute_docstrings(base).items()}
    hints = typing.get_type_hints(model, include_extras=True)
    found = []
    for name, default, metadata in _fields(model):
        if typing.get_origin(hints[name]) is typing.ClassVar:
            continue
        meaning = meanings.get(name) or COMMON.get(name, "")
        found.append((Key(name, type_text(hints[name], metadata), default, " ".join(meaning.split())), hints[name]))
    return found


def _fields(model: type) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Name, default as TOML writes it, and constraints."""
    if issubclass(model, BaseModel):
        for name, field in model.model_fields.items():
            yield name, _default(field), tuple(field.metadata)
        return
    for field in dataclasses.fields(typing.cast(typing.Any, model)):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        yield field.name, "required" if made is dataclasses.MISSING else toml_text(made), ()


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return "required" if default is PydanticUndefined else toml_text(default)


def toml_text(value: object) -> str:
    """A default as a recipe writes it; nothing for one that is left out, and for whole tables."""
    if value is None or isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (tuple, list)):
        return "`[" + ", ".join(toml_text(each).strip("`") for each in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def classes_in(annotation: object) -> list[type]:
    """Models and dataclasses that an annotation names."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [each for argument in typing.get_args(annotation) for each in classes_in(argument)]


BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def type_text(annotation: object, metadata: tuple[object, ...] = ()) -> str:
    """A type as a user reads it: `int at least 1`, `"a"` or `"b"`, list of text."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        return type_text(inner, (*metadata, *(each for each in _flat(more) if each not in metadata)))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f'`"{each}"`' for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(each, metadata) for each in arguments if each is not type(None)))
    if origin in (tuple, list):
        inner = [type_text(each) for each in arguments if each is not Ellipsis]
        many = f"{len(inner)}, each " if len(inner) > 1 and Ellipsis not in arguments else ""
        return f"list of {many}{' or '.join(dict.fromkeys(inner))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{each.value}`" for each in annotation)
    names = {str: "text", Path: "path", float: "number", int: "whole number", bool: "true or false"}
    name = names.get(typing.cast(type, annotation), getattr(annotation, "__name__", str(annotation)))
    # Bounds that no use comes near only keep out what overflows.
    bounds = [
        f"{word} {getattr(each, attribute):g}"
        for each in _flat(metadata)
        for kind, (attribute, word) in BOUNDS.items()
        if isinstance(each, kind) and getattr(each, attribute) < 10**6
    ]
    return " ".join([name, " and ".join(bounds)]).strip()


def _flat(metadata: typing.Iterable[object]) -> list[object]:
    """Constraints, also those inside of a pydantic Field."""
    found: list[object] = []
    for each in metadata:
        found += each.metadata if isinstance(each, FieldInfo) else [each]
    return [each for each in found if not isinstance(each, MinLen)]


def attribute_docstrings(model: type) -> dict[str, str]:
    """Field -> the text that stands below it in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    lines = body.body if isinstance(body, ast.ClassDef) else []
    found = {}
    for first, second in itertools.pairwise(lines):
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and isinstance(second, ast.Expr):
            value = second.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[first.target.id] = value.value
    return found


# Python


def python_api() -> str:
    """Public functions and classes, with signatures and docstrings."""
    parts = [
        "# Python",
        "Written from the code when the site is built. `import openvision` is quick: torch is imported when one of "
        "these names is first used.",
    ]
    further = [name for name in FURTHER if name.rpartition(".")[2] not in openvision.__all__]
    for name in (*(f"openvision.{each}" for each in sorted(openvision.__all__)), *further):
        module, _, attribute = name.rpartition(".")
        parts += list(_documented(name, getattr(importlib.import_module(module), attribute)))
    return "\n\n".join(parts) + "\n"


def _documented(name: str, thing: object) -> Iterator[str]:
    yield f"## `{name}`"
    if not isinstance(thing, type):
        yield _signature(name, thing)
        yield _prose(inspect.getdoc(thing) or "")
        return
    if "__init__" in vars(thing) and not dataclasses.is_dataclass(thing):
        yield _signature(name, thing)
    yield _prose(inspect.getdoc(thing) or "")
    if fields := attribute_docstrings(thing):
        yield "\n".join(f"- `{field}`: {' '.join(meaning.split())}" for field, meaning in fields.items())
    for base in thing.__mro__[1:]:
        if base.__module__.startswith("openvision."):
            yield f"It has all methods and properties of `{base.__name__}`, and:"
            break
    for member, value in vars(thing).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not (inspect.isfunction(function) or isinstance(value, property)):
            continue
        yield f"### `{thing.__name__}.{member}`"
        if not isinstance(value, property):
            yield _signature(member, function)
        yield _prose(inspect.getdoc(value) or "")


def _signature(name: str, thing: object) -> str:
    """The call as its source writes it, with the names of types that the code uses."""
    function = inspect.unwrap(typing.cast(types.FunctionType, thing.__init__ if isinstance(thing, type) else thing))
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"{name} is no function")
    node.args.args = [each for each in node.args.args if each.arg not in ("self", "cls")]
    returns = "" if isinstance(thing, type) or node.returns is None else f" -> {ast.unparse(node.returns)}"
    call = name.rpartition(".")[2]
    arguments = re.sub(r"(?<=\w|\])=(?=\S)", " = ", ast.unparse(node.args))
    text = f"{call}({arguments}){returns}"
    if len(text) > 100:
        arguments = re.sub(r", (?=\*|\w+: )", ",\n    ", arguments)
        text = f"{call}(\n    {arguments},\n){returns}"
    return f"```python\n{text}\n```"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its indented blocks are lists of arguments, examples, or plain text."""
    text = re.sub(r"\[/?(?:bold|dim|italic)\]", "", docstring)
    text = re.sub(r"^ {4}(\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    text = re.sub(r"^ {4,}(?=\S)", "    ", text, flags=re.MULTILINE)
    return re.sub(r"^(Args|Raises|Returns):$", r"\1:\n", text, flags=re.MULTILINE)
