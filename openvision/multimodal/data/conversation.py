"""A LLaVA sample: read, checked, written by the language model's own chat template; the loss falls on answers only.

The text is tokenised once, whole, as a prompt is at inference. A token is learnt when it ends inside an answer; an
answer reaches from the end of its prompt to the template's end-of-turn token, so that stopping is learnt too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openvision.errors import OpenVisionError
from openvision.multimodal.model.llm import IMAGE_TOKEN, render

IGNORED = -100
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Role = Literal["system", "user", "assistant"]


class SampleError(OpenVisionError):
    """A sample that cannot be trained on: the message names it."""


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """A conversation about no, one or several pictures."""

    id: str
    turns: tuple[Turn, ...]
    images: int
    """How many pictures come with it; as many `<image>` stand in the questions."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids, with room for its pictures."""

    input_ids: list[int]
    labels: list[int]
    """The ids of answers, elsewhere -100."""


def parse_sample(row: dict[str, Any], name: str, images: int, image_first: bool = True) -> Sample:
    """Check a row of LLaVA's format, or one with `messages` of role and content, and its number of pictures.

    As in LLaVA, an answer before the first question is left out, and so is a last question without an answer.
    `image_first` moves `<image>` to the start of its question. Raises SampleError that names the sample.
    """
    turns = _read_turns(row, name)
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if not turns:
        raise SampleError(f"sample {name}: no question with an answer")
    _check_order(turns, name)
    _check_images(turns, images, name)
    _check_texts(turns, name)
    return Sample(name, tuple(_moved(turn) if image_first else turn for turn in turns), images)


def encode(
    sample: Sample, tokenizer: Any, image_token_id: int, image_tokens: Sequence[int], max_length: int
) -> Encoded:
    """Ids and labels of a conversation whose pictures become `image_tokens` tokens each, in order.

    What exceeds `max_length` is cut off at the end. Raises SampleError when that cuts a picture or every answer, or
    when the chat template does not write answers after their prompts.
    """
    text, answers = _text_and_answers(sample, tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = iter(image_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if token == image_token_id:
            count = next(counts)
            if len(ids) + count > max_length:
                raise SampleError(f"sample {sample.id}: no room for its picture in max_length {max_length}; raise it")
            ids += [token] * count
            labels += [IGNORED] * count
        else:
            ids.append(token)
            labels.append(token if any(start < end <= stop for start, stop in answers) else IGNORED)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise SampleError(f"sample {sample.id}: no answer within max_length {max_length} tokens; raise it")
    return Encoded(ids, labels)


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Turns as chat templates take them."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _text_and_answers(sample: Sample, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it answers start and stop."""
    messages = messages_of(sample.turns)
    text = render(tokenizer, messages, prompt=False)
    answers = []
    for index, turn in enumerate(sample.turns):
        if turn.role != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], prompt=True)
        whole = render(tokenizer, messages[: index + 1], prompt=False).rstrip()
        if not whole.startswith(prompt) or not text.startswith(whole):
            raise SampleError(
                f"sample {sample.id}: the chat template does not write answer {index + 1} after its prompt, so its "
                "tokens cannot be told apart; give another template when building the model"
            )
        answers.append((len(prompt), len(whole)))
    return text, answers


def _read_turns(row: dict[str, Any], name: str) -> list[Turn]:
    raw = row.get("conversations", row.get("messages"))
    if not isinstance(raw, list) or not raw:
        raise SampleError(f"sample {name}: no list named conversations or messages")
    turns = []
    for number, message in enumerate(raw, start=1):
        role = message.get("from", message.get("role")) if isinstance(message, dict) else None
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(text, str):
            raise SampleError(
                f"sample {name}: message {number} needs a speaker (from: human, gpt or system) and a text (value)"
            )
        turns.append(Turn(_ROLES[role], text))  # pyright: ignore[reportArgumentType]
    return turns


def _check_order(turns: Sequence[Turn], name: str) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise SampleError(f"sample {name}: a system message stands after the first message")
    for number, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[number % 2]:
            raise SampleError(f"sample {name}: questions and answers do not alternate at message {number + 1}")


def _check_images(turns: Sequence[Turn], images: int, name: str) -> None:
    for turn in turns:
        if turn.role != "user" and IMAGE_TOKEN in turn.text:
            raise SampleError(
                f"sample {name}: {IMAGE_TOKEN} in an answer or system message; it belongs into a question"
            )
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if found == images:
        return
    if not found:
        raise SampleError(f"sample {name}: it has {_pictures(images)} but no {IMAGE_TOKEN}; add one to its question")
    if found < images:
        raise SampleError(f"sample {name}: {_pictures(images)} but only {found} {IMAGE_TOKEN}; add the missing ones")
    raise SampleError(f"sample {name}: {found} {IMAGE_TOKEN} for {_pictures(images)}; write one for each picture")


def _pictures(count: int) -> str:
    return f"{count} picture" + ("" if count == 1 else "s")


def _check_texts(turns: Sequence[Turn], name: str) -> None:
    for number, turn in enumerate(turns, start=1):
        if turn.text.replace(IMAGE_TOKEN, "").strip():
            continue
        if turn.role == "assistant":
            raise SampleError(f"sample {name}: message {number} is an empty answer; fill it or leave the sample out")
        if IMAGE_TOKEN not in turn.text:
            raise SampleError(f"sample {name}: message {number} is an empty {turn.role} message; fill it")


def _moved(turn: Turn) -> Turn:
    count = turn.text.count(IMAGE_TOKEN)
    if not count:
        return turn
    return Turn(turn.role, f"{IMAGE_TOKEN}\n" * count + turn.text.replace(IMAGE_TOKEN, "").strip())
