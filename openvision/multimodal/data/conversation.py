"""A conversation in LLaVA's format: checked, rendered by the chat template, tokenized; labels are answers only.

The text is tokenized in one piece, as a prompt is at inference. A token is a label when it ends inside an answer; an
answer includes the template's end-of-turn token, so that the model learns to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.multimodal.model.huggingface import Tokenizer
from openvision.multimodal.model.llm import IMAGE_TOKEN, Message, render
from openvision.untrusted import is_utf8

IGNORED = -100
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
Role = Literal["system", "user", "assistant"]


class SampleError(OpenVisionError):
    """A sample cannot be used for training; the message names it."""


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: Role
    text: str


@dataclass(frozen=True)
class Conversation:
    """A checked conversation about any number of images."""

    id: str
    turns: tuple[Turn, ...]
    images: int
    """Number of images, and of `<image>` in the questions."""


@dataclass(frozen=True)
class TokenizedConversation:
    """Token ids of a conversation, with placeholders for its images."""

    input_ids: list[int]
    labels: list[int]
    """Ids of the answers; -100 elsewhere."""


def parse_conversation(row: JsonObject, name: str, images: int, image_first: bool = True) -> Conversation:
    """Check a row in LLaVA's format, or with `messages` of role and content, that comes with `images` images.

    As in LLaVA, an answer before the first question is dropped, and so is a last question without an answer.
    `image_first` moves `<image>` to the start of its question. Raises SampleError that names the sample.
    """
    turns = _read_turns(row, name)
    while turns and turns[0].role == "assistant":
        turns = turns[1:]
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if not turns:
        raise SampleError(f"sample {name}: no question with an answer; add one or remove the sample")
    _check_order(turns, name)
    _check_images(turns, images, name)
    _check_texts(turns, name)
    return Conversation(name, tuple(_with_image_first(turn) if image_first else turn for turn in turns), images)


def tokenize(
    conversation: Conversation,
    tokenizer: Tokenizer,
    image_token_id: int,
    images: Sequence[Sequence[int]],
    max_length: int,
) -> TokenizedConversation:
    """Ids and labels of a conversation; image i becomes the ids `images[i]`.

    Truncates to `max_length` tokens. Raises SampleError when that cuts an image or every answer, or when the chat
    template does not write answers after their prompts.
    """
    text, answers = _text_and_answers(conversation, tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    each = iter(images)
    ids: list[int] = []
    labels: list[int] = []
    for token, (_, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if token == image_token_id:
            image = next(each)
            if len(ids) + len(image) > max_length:
                raise SampleError(
                    f"sample {conversation.id}: its image does not fit into max_length {max_length}; increase it"
                )
            ids += image
            labels += [IGNORED] * len(image)
        else:
            ids.append(token)
            labels.append(token if any(start < end <= stop for start, stop in answers) else IGNORED)
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise SampleError(f"sample {conversation.id}: no answer within max_length {max_length} tokens; increase it")
    return TokenizedConversation(ids, labels)


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Turns as messages of a chat template."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def _text_and_answers(conversation: Conversation, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where answers start and end in it."""
    messages = messages_of(conversation.turns)
    text = render(tokenizer, messages, prompt=False)
    answers = []
    for index, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        prompt = render(tokenizer, messages[:index], prompt=True)
        whole = render(tokenizer, messages[: index + 1], prompt=False).rstrip()
        if not whole.startswith(prompt) or not text.startswith(whole):
            raise SampleError(
                f"sample {conversation.id}: the chat template does not write answer {index + 1} after its prompt, so "
                "its tokens cannot be found; build the model with another template (--chat-template)"
            )
        answers.append((len(prompt), len(whole)))
    return text, answers


def _read_turns(row: JsonObject, name: str) -> list[Turn]:
    raw = row.get("conversations", row.get("messages"))
    if not isinstance(raw, list) or not raw:
        raise SampleError(f"sample {name}: no list named conversations or messages; add one")
    turns = []
    for number, message in enumerate(raw, start=1):
        role = message.get("from", message.get("role")) if isinstance(message, dict) else None
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str) or not is_utf8(text):
            raise SampleError(
                f"sample {name}: message {number} needs a speaker (from: human, gpt or system) and a text (value)"
            )
        turns.append(Turn(_ROLES[role], text))  # pyright: ignore[reportArgumentType]
    return turns


def _check_order(turns: Sequence[Turn], name: str) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise SampleError(f"sample {name}: a system message after the first message; move it to the start")
    for number, turn in enumerate(spoken):
        if turn.role != ("user", "assistant")[number % 2]:
            raise SampleError(
                f"sample {name}: questions and answers do not alternate at message {number + 1}; fix their order"
            )


def _check_images(turns: Sequence[Turn], images: int, name: str) -> None:
    for turn in turns:
        if turn.role != "user" and IMAGE_TOKEN in turn.text:
            raise SampleError(f"sample {name}: {IMAGE_TOKEN} in an answer or system message; move it into a question")
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if found == images:
        return
    if not found:
        raise SampleError(f"sample {name}: {_count(images)} but no {IMAGE_TOKEN}; add one to its question")
    if found < images:
        raise SampleError(f"sample {name}: {_count(images)} but only {found} {IMAGE_TOKEN}; add the missing ones")
    raise SampleError(f"sample {name}: {found} {IMAGE_TOKEN} for {_count(images)}; write one for each image")


def _count(images: int) -> str:
    return f"{images} image" + ("" if images == 1 else "s")


def _check_texts(turns: Sequence[Turn], name: str) -> None:
    for number, turn in enumerate(turns, start=1):
        if turn.text.replace(IMAGE_TOKEN, "").strip():
            continue
        if turn.role == "assistant":
            raise SampleError(f"sample {name}: message {number} is an empty answer; fill it or remove the sample")
        if IMAGE_TOKEN not in turn.text:
            raise SampleError(f"sample {name}: message {number} is an empty {turn.role} message; fill it")


def _with_image_first(turn: Turn) -> Turn:
    count = turn.text.count(IMAGE_TOKEN)
    if not count:
        return turn
    return Turn(turn.role, f"{IMAGE_TOKEN}\n" * count + turn.text.replace(IMAGE_TOKEN, "").strip())
