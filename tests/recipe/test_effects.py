"""What would have no effect is refused, in one sentence with key, reason and remedy; stored recipes stay readable."""

import pytest

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.recipe.schema import Recipe, dump_recipe, load_recipe, parse_recipe
from openvision.recipe.smoke import smoke_recipe
from openvision.recipe.text import apply_override
from tests.training.small_step import recipe_of

FROZEN = 'warm_start.frozen=["vision"]'
TEACHER = 'teacher=[{source="x"}]'
# In place of the text tower's loss.
ALONE = "loss.contrastive=0"


def table_of(kind: str, *changes: str) -> JsonObject:
    table = recipe_of(kind).model_dump(mode="json", exclude_none=True)
    for change in changes:
        apply_override(table, change)
    return table


def changed(kind: str, *changes: str) -> Recipe:
    return parse_recipe(table_of(kind, *changes), "changed")


REFUSED = [
    (
        "openvision2",
        ["loss.equal_texts=positives"],
        r'loss\.equal_texts = "positives" .* openvision2 contrasts nothing',
    ),
    (
        "openvision",
        [ALONE, "loss.equal_texts=positives"],
        r"equal_texts .* loss\.contrastive is 0; leave it out, or raise",
    ),
    (
        "clip",
        ["loss.equal_texts=positives"],
        r"in the softmax equal texts are one vector, .*; leave it out, or set loss\.kind = \"sigmoid\"",
    ),
    ("openvision", [ALONE, "loss.kind=sigmoid"], r"loss\.kind .* loss\.contrastive is 0"),
    ("openvision", [ALONE, "loss.captions=joint"], r"loss\.captions .* loss\.contrastive is 0"),
    ("openvision", [ALONE, "loss.logit_scales=per_text"], r"loss\.logit_scales .* loss\.contrastive is 0"),
    ("clip", [TEACHER, ALONE, "loss.equal_texts=positives"], r"loss\.contrastive is 0"),
    ("clip", [ALONE], r"every weight in \[loss\] is 0, so that nothing is trained; raise loss\.contrastive"),
    (
        "openvision3",
        [ALONE, "loss.caption=0", "loss.reconstruction.weight=0"],
        r"every weight in \[loss\] is 0, so that nothing is trained",
    ),
    (
        "clip",
        ['teacher=[{source="x", similarity=1.0}, {source="y", temperature=0.2}]'],
        r"teacher\.1\.temperature = 0\.2 has no effect: similarity is 0; leave it out, or raise similarity",
    ),
    ("clip", ["start=x", FROZEN, TEACHER], r"teacher\.0 trains the vision tower, which warm_start\.frozen names"),
    (
        "clip",
        ["start=x", FROZEN, 'teacher=[{source="x", similarity=1.0, patches=1.0}]'],
        r"teacher\.0\.patches = 1\.0 has no effect: the vision tower is frozen",
    ),
    (
        "clip",
        ["start=x", FROZEN, 'teacher=[{source="x", similarity=1.0, pooled=0.5}]'],
        r"teacher\.0\.pooled = 0\.5 has no effect: the vision tower is frozen, .* is dropped after the run; set it",
    ),
    (
        "clip",
        [TEACHER, "optimizer.multipliers.vision=0"],
        r"\[\[teacher\]\] trains the vision tower, which optimizer\.multipliers\.vision = 0 leaves as it is",
    ),
    (
        "clip",
        ["dense.weight=1.0", "optimizer.multipliers.vision=0"],
        r"\[dense\] trains the vision tower, which optimizer\.multipliers\.vision = 0 leaves as it is",
    ),
    (
        "clip",
        ["start=x", 'warm_start={towers=["vision"], vocabulary="by_entry"}'],
        r"warm_start\.vocabulary .* takes no tower with a vocabulary; leave it out, or add one of text, decoder",
    ),
    (
        "clip",
        ["start=x", 'warm_start={towers=["vision"], context="keep"}'],
        r"warm_start\.context .* takes no tower with a context; leave it out, or add one of text, decoder",
    ),
    (
        "clip",
        ["start=x", 'warm_start={towers=["text"], patches="resample"}'],
        r"warm_start\.patches .* takes no tower with patches; leave it out, or add one of vision",
    ),
    (
        "genlip",
        ["run.trim_texts=true", "stages.0.drop_path=0.1"],
        r"run\.trim_texts = true has no effect: GenLIP trims nothing under stochastic depth",
    ),
    (
        "openvision3",
        [
            "loss.reconstruction.folder=vgg",
            "stages.0.perceptual=0.5",
            "loss.reconstruction.perceptual=efficientnet-lite0",
        ],
        r"loss\.reconstruction\.folder .* reads no weights of LPIPS; leave it out",
    ),
    ("openvision3", ["loss.reconstruction.folder=vgg"], r"no stage has a perceptual distance; leave it out, or set"),
    (
        "clip",
        ["data.block=32"],
        r'data\.block = 32 has no effect: order = "global" has no blocks; leave it out, or set',
    ),
    ("clip", ["data.window=32"], r"data\.window = 32 has no effect"),
    ("clip", ["parallel.replicate=2"], r'parallel\.replicate = 2 has no effect: mode = "ddp" replicates everywhere'),
    ("clip", ["guards.spike_window=50"], r'guards\.spike_window = 50 has no effect: spikes = "off" looks for none'),
    ("clip", ["guards.spike_deviations=5.0"], r"guards\.spike_deviations = 5\.0 has no effect"),
    ("clip", ["augment.jitter=0", "augment.jitter_probability=0.5"], r"jitter is 0; leave it out, or raise jitter"),
    (
        "clip",
        [FROZEN],
        r"names 'vision', which nothing fills: it would stay at its random .* give start, or leave it out",
    ),
    ("clip", ['warm_start.frozen=["text"]'], r"names 'text', which nothing fills: .* give start or warm_start\.text"),
    ("openvision2", ["run.checkpoint_best=top1"], r"is validated by its captions; write \"caption_loss\", or \"NAME/"),
    ("clip", ["run.checkpoint_best=caption_loss"], r"with a text tower is validated by its texts; write \"top1\""),
    ("openvision3", ["run.checkpoint_best=caption_loss"], r"with a text tower is validated by its texts"),
    (
        "clip",
        ["run.checkpoint_best=top1", "data.validation=none"],
        r'run\.checkpoint_best = "top1" is not measured without data\.validation; give it, or',
    ),
    (
        "clip",
        ['teacher=[{source="x", library="efficientnet_lite", resolution=256}]'],
        r"teacher\.0: resolution 256 is none of efficientnet_lite, whose .* 224 px; leave resolution out",
    ),
]


def with_validation(changes: list[str]) -> list[str]:
    return ["data.validation=validation", *changes]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_what_has_no_effect_is_refused(kind, changes, message):
    with pytest.raises(OpenVisionError, match=message):
        changed(kind, *with_validation(changes))


ACCEPTED = [
    ("openvision", [ALONE]),
    # Joint training is compared with its parts: what is not trained is measured.
    ("openvision3", [ALONE, "loss.kind=sigmoid"]),
    ("openvision3", [ALONE, "loss.caption=0"]),
    ("clip", [TEACHER, ALONE]),
    ("clip", ["dense.weight=1.0", ALONE]),
    ("clip", ['teacher=[{source="x", similarity=1.0, temperature=0.2}]']),
    # Similarities of a frozen tower go through its projection, which is trained.
    ("clip", ["start=x", FROZEN, 'teacher=[{source="x", similarity=1.0}]']),
    ("clip", ["start=x", FROZEN, 'teacher=[{source="x", similarity=1.0, pooled=0}]']),
    ("clip", [TEACHER, "optimizer.multipliers.vision=0.1"]),
    ("openvision", ["start=x", 'warm_start={towers=["decoder"], vocabulary="by_entry"}']),
    ("genlip", ["run.trim_texts=true"]),
    # On an accelerator captions are trimmed, whatever of the texts the decoder reads.
    ("openvision", ["run.trim_texts=true", "model.text.pad_id=0", 'loss.texts=["alt"]']),
    ("openvision3", ["loss.reconstruction.folder=vgg", "stages.0.perceptual=0.5"]),
    ("clip", ["data.order=blocks", "data.block=32", "data.window=32"]),
    ("clip", ["parallel.mode=fsdp", "parallel.replicate=2"]),
    ("clip", ["guards.spikes=log", "guards.spike_window=50"]),
    # As the recipes of GenLIP write it.
    ("clip", ["augment.jitter=0", "augment.jitter_probability=0"]),
    ("clip", ["start=x", FROZEN]),
    ("openvision2", ["run.checkpoint_best=caption_loss"]),
    ("clip", ["run.checkpoint_best=top1"]),
    ("clip", ["data.validation=none", "run.checkpoint_best=k/top1", 'evaluate=[{kind="knn", name="k"}]']),
    ("clip", ['teacher=[{source="x", library="efficientnet_lite", resolution=224}]']),
]


@pytest.mark.parametrize(("kind", "changes"), ACCEPTED)
def test_what_has_an_effect_is_not(kind, changes):
    recipe = changed(kind, *with_validation(changes))
    # A run's stored recipe has every key; nor is the smoke form refused.
    assert changed_again(recipe) == recipe
    smoke_recipe(recipe)


def changed_again(recipe: Recipe) -> Recipe:
    return parse_recipe(recipe.model_dump(), "again")


@pytest.mark.parametrize("kind", ["openvision", "clip", "openvision2", "openvision3", "genlip"])
def test_defaults_may_be_written_out_anywhere(kind):
    assert changed_again(changed(kind)) == changed(kind)


def test_a_run_of_an_earlier_version_is_read(tmp_path):
    """Its settings without effect were accepted: it can be resumed, exported and reported all the same."""
    stored = parse_recipe(table_of("clip", "guards.spike_window=50", FROZEN), "old", stored=True)
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(stored))
    with pytest.raises(OpenVisionError, match="which nothing fills"):
        load_recipe(path)
    (tmp_path / "sessions.json").touch()
    assert load_recipe(path) == stored


def test_the_smoke_form_keeps_towers_frozen_without_weights():
    recipe = changed("clip", "start=x", FROZEN)
    assert smoke_recipe(recipe).frozen_towers == ("vision",)
