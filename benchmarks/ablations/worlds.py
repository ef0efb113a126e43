"""The scenes of each variant, and its vocabulary."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ablations.variants import DEFAULT_WORLD, Profile, World
from openvision.data.shards.dataset import ShardDataset, ShardWriter, all_texts
from openvision.data.sources.scenes.make import Options, make_scenes
from openvision.data.sources.scenes.scene import TRAIN
from openvision.data.sources.scenes.texts import AltTexts
from openvision.files import atomic_write_text, make_folder
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


def make_vocabulary(root: Path, kind: str, profile: Profile, workers: int) -> Path:
    """The folder of a vocabulary, learnt from the default world's training texts where it is missing."""
    folder = root / ("vocabulary" if kind == "wordpiece" else f"vocabulary-{kind}")
    if not (folder / FILE_NAME).is_file():
        dataset = ShardDataset(make_world(root, DEFAULT_WORLD, profile, workers) / TRAIN)
        texts = islice(all_texts(dataset), _VOCABULARY_TEXTS)
        (_train_bytes if kind == "bytes" else _train_wordpiece)(texts, make_folder(folder))
    return folder


def _train_wordpiece(texts: Iterator[str], folder: Path) -> None:
    Tokenizer.train(texts, VOCABULARY).save(folder)


def _train_bytes(texts: Iterator[str], folder: Path) -> None:
    """Byte-level BPE with padding as id 0, as the text tower masks it; the begin and class tokens are appended."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=["<|padding|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore[reportCallIssue]
    backend.train_from_iterator(texts, trainer)
    atomic_write_text(folder / FILE_NAME, backend.to_str())
