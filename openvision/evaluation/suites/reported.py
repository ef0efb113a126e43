"""Published numbers of the released models, and whether a reproduction agrees with them."""

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

# Papers print one digit after the point.
_HALF_DIGIT = 0.05


@dataclass(frozen=True)
class Reported:
    """A published number beside ours, both in percent."""

    value: float
    ours: float
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        """Whether the published number, in its rounding, lies in our 95 % interval."""
        return self.low - _HALF_DIGIT <= self.value <= self.high + _HALF_DIGIT


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("openvision.evaluation.suites").joinpath("reported.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def reported(model: str, measure: str) -> float | None:
    """The published number of a released model in percent, e.g. `imagenet_top1`; None where none was published."""
    value = _table().get(model, {}).get(measure)
    return float(value) if value is not None else None


def reported_mllm(framework: str, encoder: str) -> dict[str, float]:
    """Published results of a multimodal model with this encoder: `llava15` or `open_llava_next`; empty without any."""
    table = _table()["mllm"]
    row = table[framework].get(encoder, [])
    return {name: float(v) for name, v in zip(table["columns"], row, strict=False) if v != table["missing"]}


def beside(model: str | None, measured: dict[str, Any], metric: str) -> Reported | None:
    """Our number of one metric of an evaluator's entry beside the published one, where there is one.

    Both are only comparable when all pictures were measured at the model's own resolution: a limited run is not.
    """
    name = measured["reported"].get(metric)
    if model is None or name is None or measured["options"].get("limit") is not None:
        return None
    value = reported(model, name)
    if value is None:
        return None
    ours = 100 * measured["values"][metric]
    low, high = (100 * bound for bound in measured["intervals"].get(metric, (ours / 100, ours / 100)))
    return Reported(value, ours, low, high)
