"""The tokenizer and the layout of token ids for text tower and decoder (spec sections 2 and 4).

- A text for the text tower: [bos], tokens, [eos], padding, and the class token in the last column.
- A caption target: tokens, [eos], padding, shifted so that query i predicts token i + 1; no class token.
- Strings such as "[CLS]" inside a text are ordinary characters.
- Tokenizers that are made here are WordPiece; text is normalised as by the original's tokenizer, as far as the library
  allows; tests/text lists the rest.
- Any other tokenizer.json is read as it is, with its own special tokens (special.py).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from openvision.errors import OpenVisionError, require
from openvision.files import JsonObject, atomic_write_text, read_json, read_text
from openvision.text.entries import Meaning, meanings
from openvision.text.special import (
    BOS,
    EOS,
    NO_UNKNOWN,
    SPECIAL,
    UNK,
    SpecialTokens,
    check_foreign,
    find_special,
    is_own,
)
from openvision.text.vocabulary import learn_pieces

FILE_NAME = "tokenizer.json"
# bert-base-uncased with its first two unused entries renamed: the vocabulary of every released model.
RELEASED_SHA256 = "969280a221e45244f31fc2dded43375de2035823e347407ba96c633a4ae76102"
RELEASED_REPOSITORY = "google-bert/bert-base-uncased"
_RENAMED = {"[unused0]": BOS, "[unused1]": EOS}


def _normalizer() -> normalizers.Normalizer:
    """Normalise text as TF-text's BertTokenizer: NFKC case folding, NFD, accents stripped.

    NFKC case folding maps full-width letters to ASCII, splits ligatures, drops invisible characters and maps sharp s to
    ss; control characters split words instead of vanishing.
    """
    steps = [
        normalizers.Replace(Regex(r"\p{Default_Ignorable_Code_Point}"), ""),
        # Braces make code points: without them the library reads \x7f-\x9f as bytes, which match \x7f alone.
        normalizers.Replace(Regex(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x{7f}-\x{9f}]"), " "),
        normalizers.NFKC(),
        normalizers.BertNormalizer(clean_text=False, handle_chinese_chars=True, strip_accents=True, lowercase=True),
        # The two common letters whose case folding differs from lower case.
        normalizers.Replace("ß", "ss"),
        normalizers.Replace("ς", "σ"),
    ]
    return normalizers.Sequence(steps)  # pyright: ignore[reportArgumentType]


class Tokenizer:
    """Texts to ids, in the layouts of the text tower and the decoder's target, and back."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens | None = None) -> None:
        """Wrap a tokenizer of the `tokenizers` library that has the special tokens, by default our own five."""
        self._backend, self._is_own = backend, special is None
        self.special = special or SpecialTokens()
        names = (self.special.pad, self.special.bos, self.special.eos, self.special.unk, self.special.cls)
        vocabulary = backend.get_vocab()
        missing = [name for name in names if name is not None and name not in vocabulary]
        if missing:
            raise OpenVisionError(f"the tokenizer has no {', '.join(missing)}; use a tokenizer made for OpenVision")
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.cls_id = (
            NO_UNKNOWN if name is None else vocabulary[name] for name in names
        )
        # Foreign vocabularies have holes: what counts is the room that a model must have.
        self._size = 1 + max(vocabulary.values())

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy, as a loader's worker gets one: the library forgets the setting."""
        self.__dict__.update(state)
        if not self._is_own:
            self._backend.encode_special_tokens = True

    @classmethod
    def _from_entries(cls, vocabulary: dict[str, int]) -> "Tokenizer":
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
        backend.normalizer = _normalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
        return cls(backend)

    @classmethod
    def from_vocabulary(cls, path: Path) -> "Tokenizer":
        """Read a vocab.txt (one entry a line), or the vocabulary in a tokenizer.json of the `tokenizers` library.

        That of bert-base-uncased becomes the released models' vocabulary. Everything else in such a json is ignored:
        normalisation and layout are those the models were trained with. A json that is not WordPiece is read whole.
        Raises OpenVisionError for an unreadable file.
        """
        try:
            content = read_json(path) if path.suffix == ".json" else None
            if content is not None and (content["model"]["type"] != "WordPiece" or _is_foreign_layout(content)):
                return cls.load(path)
            entries = read_text(path).split("\n") if content is None else _entries_of_json(content)
        except (OpenVisionError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OpenVisionError(f"vocabulary {path} cannot be read: {error}; name a vocab.txt") from error
        if entries and not entries[-1]:
            entries.pop()
        renamed = [_RENAMED.get(entry, entry) for entry in entries] if BOS not in entries else entries
        return cls._from_entries({entry: index for index, entry in enumerate(renamed)})

    @classmethod
    def released(cls, path: Path | None = None) -> "Tokenizer":
        """The tokenizer of the released models, from bert-base-uncased's vocab.txt at `path` or from the Hub.

        Raises OpenVisionError when the vocabulary's hash is not the released one.
        """
        tokenizer = cls.from_vocabulary(path or _download_vocabulary())
        if tokenizer.vocabulary_sha256() != RELEASED_SHA256:
            source = path or RELEASED_REPOSITORY
            raise OpenVisionError(
                f"{source} is not the vocabulary of bert-base-uncased: its hash differs; download it again"
            )
        return tokenizer

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, the one in a folder, or a vocab.txt."""
        if path.suffix == ".txt":
            return cls.from_vocabulary(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not (file.is_symlink() or file.exists()):
            raise OpenVisionError(f"{file} does not exist; every model folder has a tokenizer, so check the path")
        content = read_json(file)
        try:
            own = is_own(content)
            (_check_backend if own else check_foreign)(content)
            backend = tokenizers.Tokenizer.from_file(str(file))
        except OpenVisionError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # The library raises bare Exception, and a panic is none.
            raise OpenVisionError(f"{file} is not a tokenizer file: {error}; save the tokenizer again") from error
        # An export's file holds a layout for stock libraries; here the layout is `encode`'s.
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        if own:
            return cls(backend)
        try:
            special = find_special(backend, content)
        except OpenVisionError as error:
            raise OpenVisionError(f"{file}: {error}") from error
        # Names of special tokens inside a text are ordinary characters here.
        backend.encode_special_tokens = True
        return cls(backend, special)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a WordPiece vocabulary of at most `vocab_size` entries; deterministic."""
        normalizer, splitter = _normalizer(), pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for text in texts:
            normalized = normalizer.normalize_str(text)
            words.update(word for word, _ in splitter.pre_tokenize_str(normalized))
        pieces = [piece for piece in learn_pieces(words, vocab_size - len(SPECIAL)) if piece not in SPECIAL]
        return cls._from_entries({entry: index for index, entry in enumerate((*SPECIAL, *pieces))})

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`."""
        atomic_write_text(folder / FILE_NAME, self._backend.to_str(pretty=True) + "\n")

    def save_for_stock(self, folder: Path, length: int) -> None:
        """Write tokenizer.json into `folder`, with a layout that stock libraries can write.

        That is [bos], tokens, [eos], [CLS], padding to `length`: they add special tokens before they pad.
        """
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        bos, eos, class_token = self.special.bos, self.special.eos, self.special.cls
        ids = {bos: self.bos_id, eos: self.eos_id, class_token: self.cls_id}
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos} {class_token}", special_tokens=list(ids.items())
        )
        backend.enable_truncation(length)
        backend.enable_padding(length=length, pad_id=self.pad_id, pad_token=self.special.pad)
        atomic_write_text(folder / FILE_NAME, backend.to_str(pretty=True) + "\n")

    @property
    def vocab_size(self) -> int:
        """Number of ids that a model must have room for: that of the entries, unless the vocabulary has holes."""
        return self._size

    @property
    def is_own(self) -> bool:
        """Whether it was made here: in any library its file then reads names of special tokens as characters."""
        return self._is_own

    def vocabulary(self) -> dict[str, int]:
        """Entry -> id."""
        return self._backend.get_vocab()

    def meanings(self) -> dict[Meaning, int]:
        """What each entry stands for -> id."""
        return meanings(self.vocabulary(), json.loads(self._backend.to_str()), self.special)

    def vocabulary_sha256(self) -> str:
        """SHA-256 of the vocabulary as text, one entry a line; of one that was not made here, of all that it does."""
        if not self._is_own:
            return hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        vocabulary = self._backend.get_vocab()
        lines = sorted(vocabulary, key=vocabulary.__getitem__)
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        found = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._is_own:
            return found
        # Unigram vocabularies hold the names of their special tokens as pieces: an end inside a text would cut it.
        layout = {self.pad_id, self.bos_id, self.eos_id, self.cls_id}
        return [[index for index in ids if index not in layout] for ids in found]

    def encode(self, texts: Sequence[str], length: int = 80) -> np.ndarray:
        """Ids for the text tower, int64 (n, length): [bos], tokens, [eos], padding, class token last."""
        return self.encode_counting(texts, length)[0]

    def encode_counting(self, texts: Sequence[str], length: int = 80) -> tuple[np.ndarray, int]:
        """Ids as from `encode`, and the number of truncated texts."""
        ids, cut = self._pad(texts, length - 1)
        return np.concatenate([ids, np.full((len(ids), 1), self.cls_id, dtype=np.int64)], axis=1), cut

    def only_unknown(self, ids: np.ndarray) -> np.ndarray:
        """Which rows of `encode`'s ids, (n, length), hold words but none that the vocabulary knows: bool (n,)."""
        other = np.isin(ids, (self.pad_id, self.bos_id, self.eos_id, self.cls_id))
        unknown = ids == self.unk_id
        return unknown.any(axis=1) & (unknown | other).all(axis=1)

    def encode_target(self, texts: Sequence[str], length: int = 128) -> tuple[np.ndarray, np.ndarray]:
        """Targets of the caption decoder: labels int64 (n, length), and a bool mask of the labels that count.

        Position i holds token i + 1 of the caption; a caption of n tokens has n + 1 targets, [eos] last.
        """
        ids, _ = self._pad(texts, length)
        labels = np.concatenate([ids[:, 1:], np.zeros((len(ids), 1), dtype=np.int64)], axis=1)
        mask = np.concatenate([ids[:, 1:] != self.pad_id, np.zeros((len(ids), 1), dtype=bool)], axis=1)
        return labels, mask

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids up to the first [eos], without special tokens."""
        kept: list[int] = []
        for index in map(int, ids):
            if index == self.eos_id:
                break
            if index not in (self.pad_id, self.bos_id, self.cls_id):
                kept.append(index)
        return self._backend.decode(kept, skip_special_tokens=False)

    def _pad(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, int]:
        """[bos], tokens, [eos], padding, (n, length), and the number of truncated texts, which end with [eos] too."""
        if length < 3:
            raise ValueError(f"length {length} leaves no room for text between [bos] and [eos]")
        rows = np.full((len(texts), length), self.pad_id, dtype=np.int64)
        cut = 0
        for row, ids in zip(rows, self.tokens(texts), strict=True):
            kept = ids[: length - 2]
            row[0] = self.bos_id
            row[1 : 1 + len(kept)] = kept
            row[1 + len(kept)] = self.eos_id
            cut += len(kept) < len(ids)
        return rows, cut


def _is_foreign_layout(content: JsonObject) -> bool:
    """Whether a file is WordPiece of another library to which `find_special` has appended tokens."""
    added = {token.get("content") for token in content.get("added_tokens") or []}
    return BOS in added and BOS not in content["model"]["vocab"]


def _check_backend(content: JsonObject) -> None:
    """Raise ValueError unless this is a WordPiece tokenizer of this project: the library hangs on some replacements."""
    _entries_of_json(content)
    normalizer: JsonObject = content.get("normalizer") or {"type": None}
    steps: list[JsonObject] = normalizer.get("normalizers", [normalizer])
    known = {_step_of(step) for step in _own_steps()}
    if unknown := [step for step in steps if step["type"] == "Replace" and _step_of(step) not in known]:
        raise ValueError(f"it replaces {unknown[0]['pattern']!r:.80}, which OpenVision's tokenizer does not")


def _step_of(step: JsonObject) -> str:
    return json.dumps([step["pattern"], step["content"]], sort_keys=True)


def _own_steps() -> list[JsonObject]:
    """The replacements of this version's normaliser and of earlier ones."""
    backend = tokenizers.Tokenizer(models.WordPiece({UNK: 0}, unk_token=UNK))
    backend.normalizer = _normalizer()
    steps: list[JsonObject] = json.loads(backend.to_str())["normalizer"]["normalizers"]
    earlier = {"pattern": {"Regex": r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"}, "content": " "}
    return [*(step for step in steps if step["type"] == "Replace"), earlier]


def _entries_of_json(content: JsonObject) -> list[str]:
    vocabulary: dict[str, int] = content["model"]["vocab"]
    if not all(type(index) is int for index in vocabulary.values()):
        raise ValueError("an id of its vocabulary is no integer")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the ids of its {len(vocabulary)} entries are not 0 to {len(vocabulary) - 1}")
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _download_vocabulary() -> Path:
    hub = require("huggingface_hub", extra="hub")
    try:
        return Path(hub.hf_hub_download(RELEASED_REPOSITORY, "vocab.txt"))
    except Exception as error:
        raise OpenVisionError(
            f"the vocabulary cannot be downloaded from the Hub ({RELEASED_REPOSITORY}): {error}; "
            "give the path of bert-base-uncased's vocab.txt instead"
        ) from error
