"""Bounds of a model's shape: what recipes, `config.json` and other configurations may say, and what is stored of it.

The upper bounds are far above every published model; they keep a typing error or a damaged file from asking for more
memory than there is.
"""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from openvision.files import JsonObject
from openvision.untrusted import check_count

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_WIDTH = 2**15
MAX_DEPTH = 256
MAX_HIDDEN = 2**18
MAX_VOCABULARY = 2**24
MAX_LENGTH = 2**16
MAX_PATCH = 1024
MAX_REGISTERS = 1024
MAX_ASPECTS = 1000
MAX_ASPECT = 1000
MAX_PATCHES = 2**16
# [bos], a token, [eos]; the text tower reads the class token behind them.
MIN_CAPTION, MIN_CONTEXT = 3, 4


def check_transformer(width: object, depth: object, mlp_dim: object, heads: object) -> None:
    """Raise ValueError unless these are the width, depth, MLP width and heads of a transformer."""
    whole = check_count("width", width, 1, MAX_WIDTH)
    check_count("depth", depth, 1, MAX_DEPTH)
    check_count("mlp_dim", mlp_dim, 1, MAX_HIDDEN)
    if whole % check_count("heads", heads, 1, whole):
        raise ValueError(f"width {whole} is not divisible by heads {heads}; choose a divisor")


def check_patches(pixels: object, patch_size: object) -> None:
    """Raise ValueError unless an image of `pixels` x `pixels` has at least one patch and no more than MAX_PATCHES."""
    patch = check_count("patch_size", patch_size, 1, MAX_PATCH)
    side = check_count("image_size", pixels, 1, MAX_PATCH * MAX_PATCHES) // patch
    if side < 1:
        raise ValueError(f"image_size {pixels} is smaller than a patch of {patch} pixels")
    if side * side > MAX_PATCHES:
        raise ValueError(
            f"image_size {pixels} makes {side * side} patches of {patch} pixels, at most {MAX_PATCHES} fit"
        )


def check_aspects(aspects: tuple[object, ...]) -> None:
    """Raise ValueError unless these are few positive aspects, width over height."""
    if len(aspects) > MAX_ASPECTS or not all(
        isinstance(one, int | float) and not isinstance(one, bool) and 0 < one <= MAX_ASPECT for one in aspects
    ):
        raise ValueError(
            f"aspects must be at most {MAX_ASPECTS} numbers above 0 and up to {MAX_ASPECT}, width over height"
        )


def stored(config: "DataclassInstance", options: Iterable[str]) -> JsonObject:
    """A configuration as `config.json` has it: without `options` that are off, which older versions do not know."""
    off = {field.name: field.default for field in fields(config) if field.name in options}
    return {key: value for key, value in asdict(config).items() if key not in off or value != off[key]}
