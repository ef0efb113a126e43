"""The page shows what the loader gives, and the part of a text that is lost."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.distinct import Grid
from openvision.data.loader import InputSpec, Loader, LoaderOptions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.tools.preview import Preview, PreviewOptions, collect, render
from openvision.recipe.schema import Recipe, dump_recipe
from openvision.recipe.sections import Source
from openvision.text.tokenizer import Tokenizer
from tests.conftest import draw

INPUTS = InputSpec(resolution=16, context_length=12, caption_length=20)
OPTIONS = PreviewOptions(INPUTS, seed=3, position=5)


@pytest.fixture(scope="module")
def dataset(shapes_folder) -> ShardDataset:
    return ShardDataset(shapes_folder / "train")


@pytest.fixture(scope="module")
def tokenizer(dataset) -> Tokenizer:
    return Tokenizer.train([text for sample in dataset for text in (sample.alt, sample.synthetic)], 120)


def test_the_first_view_is_that_of_the_run(dataset, tokenizer):
    with Loader(dataset, tokenizer, INPUTS, batch_size=1, seed=3) as stream:
        batches = list(itertools.islice(stream, 5 + 4))[5:]
    shown = collect(dataset, tokenizer, replace(OPTIONS, count=4, views=1))
    assert [card.position for card in shown.cards] == [5, 6, 7, 8]
    for batch, card in zip(batches, shown.cards, strict=True):
        (view,) = card.views
        assert batch.keys == [card.sample.key]
        assert np.array_equal(view.pixels, batch.images[0].permute(1, 2, 0).numpy())
        assert view.sentence.read == tokenizer.decode(batch.sentence_ids[0].numpy())


def test_the_order_is_that_of_the_batches_of_the_run(dataset, tokenizer):
    def keys(distinct: bool) -> list[str]:
        order = LoaderOptions(distinct=distinct)
        with Loader(dataset, tokenizer, INPUTS, batch_size=7, seed=3, options=order) as stream:
            return [key for batch in itertools.islice(stream, 20) for key in batch.keys]

    # Where an epoch of 16 ends inside a batch of 7, samples that the batch holds change places with later ones.
    of_run, plain = keys(distinct=True), keys(distinct=False)
    first = next(place for place in range(len(plain)) if plain[place] != of_run[place])
    shown = collect(dataset, tokenizer, replace(OPTIONS, grid=Grid(7), position=first, count=4, views=1))
    assert [card.sample.key for card in shown.cards] == list(dict.fromkeys(of_run[first : first + 4]))


def test_further_views_are_of_the_same_sample_and_differ(dataset, tokenizer):
    shown = collect(dataset, tokenizer, replace(OPTIONS, count=6, views=5))
    pixels = {view.pixels.tobytes() for card in shown.cards for view in card.views}
    sentences = {view.sentence.read for card in shown.cards for view in card.views}
    assert [len(card.views) for card in shown.cards] == [5] * 6
    assert len(pixels) > 20
    assert len(sentences) > 6
    for card in shown.cards:
        name = card.sample.key.replace("-", " ")
        assert {view.alt.read for view in card.views} == {f"{name} clipart"}


def test_later_epochs_do_not_repeat_the_first_view(dataset, tokenizer):
    # All samples: the stream of the later views has the order of the run's own.
    for card in collect(dataset, tokenizer, replace(OPTIONS, position=0, count=16, views=2)).cards:
        assert not np.array_equal(card.views[0].pixels, card.views[1].pixels)


def test_more_than_there_are(dataset, tokenizer):
    assert len(collect(dataset, tokenizer, replace(OPTIONS, position=0, count=500, views=1)).cards) == len(dataset)


def one_sample(folder, text: str, caption: str | None) -> ShardDataset:
    with ShardWriter(folder) as writer:
        writer.write("one", draw("red", "bar"), "png", text, {} if caption is None else {"synthetic": caption})
    return ShardDataset(folder)


def test_the_truncated_end_is_shown(tmp_path, tokenizer):
    data = one_sample(tmp_path / "long", "red " * 8 + "bar bar bar", "A red bar. " * 7 + "the end")
    (card,) = collect(data, tokenizer, replace(OPTIONS, views=2)).cards
    assert card.views[0].alt.read == " ".join(["red"] * 8 + ["bar"])
    assert (card.views[0].alt.lost, card.views[0].alt.tokens) == ("bar bar", 11)
    target = card.views[1].target
    assert target is not None
    whole = tokenizer.decode(tokenizer.tokens(["A red bar. " * 7 + "the end"])[0])
    assert f"{target.read} {target.lost}".replace(" ", "") == whole.replace(" ", "")
    assert target.lost
    page = render(Preview([card], Counter()), OPTIONS, {})
    assert "alt-texts cut</span> 1 of 1" in page
    assert '<s title="never read">bar bar</s>' in page


def test_without_caption_and_without_decoder(tmp_path, tokenizer):
    options = PreviewOptions(replace(INPUTS, caption_length=None), views=2)
    (card,) = collect(one_sample(tmp_path / "alt", "red bar", None), tokenizer, options).cards
    assert [view.sentence.read for view in card.views] == ["red bar", "red bar"]
    assert card.views[0].target is None
    assert "caption target" not in render(Preview([card], Counter()), options, {})


def test_bad_samples_are_skipped_and_counted(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "some") as writer:
        for number in range(4):
            image = b"not an image" if number == 2 else draw("red", "bar")
            writer.write(f"key{number}", image, "png", f"red bar {number}", {})
    shown = collect(ShardDataset(tmp_path / "some"), tokenizer, replace(OPTIONS, position=0, views=2))
    assert {card.sample.key for card in shown.cards} == {"key0", "key1", "key3"}
    assert shown.rejected == {"undecodable": 1}


def test_the_page_needs_nothing_and_escapes_what_it_is_given(tmp_path, tokenizer):
    data = one_sample(tmp_path / "evil", "red <script>alert(1)</script>", "<img src=x>")
    page = render(collect(data, tokenizer, replace(OPTIONS, views=1)), OPTIONS, {"shards": "<b>"})
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("<script>") == 1
    assert "<img src=x" not in page
    assert "<li><span>shards</span> &lt;b&gt;</li>" in page


def test_the_command_shows_the_stage_of_a_recipe(tiny_recipe, shapes_folder, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(dump_recipe(tiny_recipe))
    page = tmp_path / "page.html"
    arguments = ["data", "preview", str(shapes_folder / "train"), "-o", str(page), "--count", "3"]
    result = CliRunner().invoke(app, [*arguments, "--recipe", str(recipe), "--stage", "1"])
    assert result.exit_code == 0, result.output
    content = page.read_text()
    assert "tiny, stage 1" in content
    assert "at 32 px" in content
    assert "position 64</span>" in content
    assert content.count("<article") == 3
    result = CliRunner().invoke(app, [*arguments, "--recipe", str(recipe), "--stage", "2"])
    assert "no stage 2" in str(result.exception)
    result = CliRunner().invoke(app, [*arguments, "--recipe", str(recipe), "--position", "64"])
    assert "has the positions 0 to 63, no position 64" in str(result.exception)
    CliRunner().invoke(app, [*arguments, "--recipe", str(recipe), "--position", "63"])
    assert page.read_text().count("<article") == 1


def test_a_page_says_how_its_order_relates_to_that_of_the_run(tiny_recipe, shapes_folder, tmp_path):
    page, path = tmp_path / "page.html", tmp_path / "tiny.toml"
    arguments = ["data", "preview", str(shapes_folder / "train"), "-o", str(page), "--count", "2", "--views", "1"]

    def order_with(recipe: Recipe) -> str:
        path.write_text(dump_recipe(recipe))
        result = CliRunner().invoke(app, [*arguments, "--recipe", str(path)])
        assert result.exit_code == 0, result.exception
        found = re.search(r"<span>order</span> (.*?)</li>", page.read_text())
        assert found is not None
        return found[1]

    assert order_with(tiny_recipe) == "that of the run"
    large = tuple(stage.model_copy(update={"batch_size": 32}) for stage in tiny_recipe.stages)
    assert "a run refuses fewer images than a batch of 32" in order_with(
        tiny_recipe.model_copy(update={"stages": large})
    )
    sources = (Source(folder="train"), Source(folder="validation"))
    mixed = tiny_recipe.data.model_copy(update={"train": sources})
    assert "the run mixes its sources" in order_with(tiny_recipe.model_copy(update={"data": mixed}))


def test_a_position_beyond_any_run_is_refused(shapes_folder, tmp_path):
    arguments = ["data", "preview", str(shapes_folder / "train"), "-o", str(tmp_path / "page.html"), "--count", "1"]
    assert CliRunner().invoke(app, [*arguments, "--position", str(10**15), "--views", "1"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--position", str(10**15 + 1)]).exit_code == 2


def test_the_command_without_a_recipe_learns_a_vocabulary_and_says_so(shapes_folder, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["data", "preview", str(shapes_folder / "train"), "-o", str(page), "--count", "2", "--views", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "learnt for this page" in page.read_text()
