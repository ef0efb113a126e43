"""The scenes of each variant, and the vocabulary that all of them share."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from ablations.variants import DEFAULT_WORLD, Profile, World
from openvision.data.shards.dataset import ShardDataset, ShardWriter, all_texts
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.data.sources.scenes.scene import TRAIN
from openvision.data.sources.scenes.texts import AltTexts
from openvision.files import make_folder
from openvision.text.captions import sentences
from openvision.text.tokenizer import FILE_NAME, Tokenizer

VOCABULARY = 1024
# Two texts a sample: the words of scenes are few, and ten thousand of them show each one often.
_VOCABULARY_TEXTS = 20_000


def alt_texts(informative: float) -> AltTexts:
    """The default mix of alt-texts with another share of those that say anything."""
    mix = AltTexts()
    factor = informative / (1 - mix.nothing)
    return AltTexts(1 - informative, factor * mix.word, factor * mix.one, factor * mix.everything, mix.junk)


def make_world(root: Path, world: World, profile: Profile, workers: int) -> Path:
    """The data folder of a world below `root`, made where it is missing.

    Images and held-out scenes are those of the default world, but for their size, shape and printed words.
    """
    plain = root / replace(world, one_sentence=False).name
    options = Options(
        profile.scenes,
        profile.held_out,
        profile.size * world.scale,
        profile.objects,
        word_share=world.words,
        word_size=world.word_size,
        caption_errors=world.caption_errors,
        alt=alt_texts(world.informative),
        aspects=world.aspects,
    )
    make_scenes(plain, options, workers)
    if world.one_sentence:
        _join_sentences(plain, root / world.name)
    return root / world.name


def _join_sentences(source: Path, folder: Path) -> None:
    """The training scenes of `source` with the sentences of each caption joined to one."""
    if (folder / TRAIN / "shards.json").is_file():
        return
    make_folder(folder)
    with ShardWriter(folder / TRAIN) as writer:
        for sample in ShardDataset(source / TRAIN):
            caption = " ; ".join(piece.strip() for piece in sentences(sample.synthetic or ""))
            writer.write(sample.key, sample.image, sample.extension, str(sample.alt), {"synthetic": f"{caption}."})
    for split in source.iterdir():
        if split.is_dir() and split.name != TRAIN:
            (folder / split.name).symlink_to(split.resolve())


def make_vocabulary(root: Path, profile: Profile, workers: int) -> Path:
    """The folder of the vocabulary, learnt from the default world's training texts where it is missing."""
    folder = root / "vocabulary"
    if not (folder / FILE_NAME).is_file():
        dataset = ShardDataset(make_world(root, DEFAULT_WORLD, profile, workers) / TRAIN)
        Tokenizer.train(islice(all_texts(dataset), _VOCABULARY_TEXTS), VOCABULARY).save(make_folder(folder))
    return folder
