"""What a captioner is to the job: questions in, answers out, in any order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

TOO_LONG = "too_long"
"""The fault of a prompt that exceeds the context of the model."""
EXTREME_ASPECT = "extreme_aspect"
"""The fault of an image that is longer than the captioner can read."""
RETRY_TEMPERATURE = 0.7
"""At least this warm is the second try of a bad caption: a greedy captioner would repeat itself."""


@dataclass(frozen=True)
class Question:
    """One caption to write."""

    shard: str
    key: str
    number: int
    """Which of the captions of this image, from 0."""
    image: bytes
    """Encoded, readable."""
    extension: str
    prompt: str
    seed: int
    alt: str = ""
    retry: int = 0
    """How often an answer was bad before."""


@dataclass(frozen=True)
class Answer:
    """A caption, empty where there is a `fault`."""

    text: str
    cut: bool = False
    """Whether it ended at the longest length."""
    fault: str | None = None
    """Why the captioner gave none."""
    tokens_read: int = 0
    tokens_written: int = 0


@dataclass(frozen=True)
class Sampling:
    """How a captioner chooses the next token."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens, weighted by their probabilities; 0: among all."""
    max_tokens: int = 128
    """Longest caption; a decoder of ours stops at its own length before."""

    def temperature_of(self, question: Question) -> float:
        """That of the first try, or a warmer one."""
        return max(self.temperature, RETRY_TEMPERATURE) if question.retry else self.temperature

    def __str__(self) -> str:
        kept = f", top {self.top_k}" if self.top_k else ""
        return f"temperature {self.temperature:g}{kept}, {self.max_tokens} tokens"


class AnyCaptioner(Protocol):
    """Answers questions; raises OpenVisionError when it cannot go on."""

    @property
    def name(self) -> str:
        """What the manifest says about the origin of the captions."""
        ...

    @property
    def varies(self) -> bool:
        """Whether several captions of an image differ."""
        ...

    @property
    def can_retry(self) -> bool:
        """Whether a second try can give another caption."""
        ...

    @property
    def shards_at_once(self) -> int:
        """Shards that one worker may hold: 2 where some answers are late, so that the next shard begins meanwhile."""
        ...

    def answers(self, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
        """Each question with its answer, in any order, read as there is room for them.

        None among the questions says that there is none before one of the open ones is answered.
        """
        ...


class LocalCaptioner(AnyCaptioner, Protocol):
    """A model in this process, which decodes a batch at a time."""

    sampling: Sampling
    batch_size: int

    def caption(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        """The answer of each question, at most `batch_size`; raises OpenVisionError when memory runs out."""
        ...


def in_batches(captioner: LocalCaptioner, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
    """The answers of a model in this process."""
    batch: list[Question] = []
    for question in questions:
        if question is not None:
            batch.append(question)
        if batch and (question is None or len(batch) == captioner.batch_size):
            yield from zip(batch, captioner.caption(batch, captioner.sampling), strict=True)
            batch = []
    if batch:
        yield from zip(batch, captioner.caption(batch, captioner.sampling), strict=True)
