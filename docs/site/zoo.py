"""The tables of docs/models.md, from the registry and the published numbers: `python docs/site/zoo.py` writes them."""

import math
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from openvision.files import atomic_write_text
from openvision.weights.registry import available_models, released

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"
ZERO_SHOT = ROOT / "openvision/evaluation/suites/reported.toml"
MULTIMODAL = ROOT / "openvision/multimodal/benchmarks/reported.toml"
BENCHMARKS = {
    "textvqa": "TextVQA",
    "chartqa": "ChartQA",
    "ocrbench": "OCRBench",
    "mme.perception": "MME perception",
    "mme.cognition": "cognition",
    "seed": "SEED",
    "mmvet": "MM-Vet",
    "scienceqa": "ScienceQA",
    "gqa": "GQA",
    "pope": "POPE",
}


def tables() -> dict[str, str]:
    """Name of each generated table of the page -> its Markdown."""
    return {
        "released": released_models(),
        "llava-1.5": multimodal("llava-1.5", "Llama-3-8B"),
        "llava-next": multimodal("llava-next", "Llama-3-8B"),
    }


def released_models() -> str:
    """Every released checkpoint with its shape and what its paper reports."""
    tables = tomllib.loads(ZERO_SHOT.read_text(encoding="utf-8"))["table"]
    reported = next(table for table in tables if table["columns"][0] == "imagenet_top1")
    rows = []
    for name in available_models():
        model = released(name)
        _, text_to_image, image_to_text = reported["rows"].get(name, (math.nan,) * 3)
        numbers = (model.imagenet_top1, text_to_image, image_to_text)
        size = f"{model.parameters / 1e6:,.1f}"
        percent = ["" if number is None or math.isnan(number) else f"{number:.1f}" for number in numbers]
        rows.append([f"`{name}`", size, str(model.tokens), str(model.embed_dim or ""), *percent])
    head = (
        "name",
        "parameters, M",
        "tokens",
        "embedding",
        "ImageNet top-1",
        "COCO text to image R@1",
        "image to text R@1",
    )
    return _table(head, rows)


def multimodal(framework: str, llm: str) -> str:
    """What both papers report for one framework and language model."""
    rows = []
    for table in tomllib.loads(MULTIMODAL.read_text(encoding="utf-8"))["table"]:
        if (table["framework"], table["llm"]) == (framework, llm):
            for name, values in table["rows"].items():
                numbers = dict(zip(table["columns"], values, strict=True))
                shown = f"**{name}**" if name.startswith("OpenVision") else name
                rows.append([shown, *(_cell(numbers.get(key, math.nan)) for key in BENCHMARKS)])
    return _table(("encoder", *BENCHMARKS.values()), rows)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:g}"


def _table(head: Iterable[str], rows: list[list[str]]) -> str:
    head = list(head)
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in tables().items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(lambda _, block=f"{start}\n{table}\n{end}": block, text)
    return text


if __name__ == "__main__":
    atomic_write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
