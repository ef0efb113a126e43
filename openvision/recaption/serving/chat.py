"""OpenAI's chat protocol, as far as it is one user message with one image and one caption in return.

What would change an answer and is not done here is refused, not ignored. Images are read from the request alone: a
server that downloads what a stranger names reaches hosts that the stranger does not.
"""

import base64
import binascii
import math
import secrets
import time
from dataclasses import dataclass

from openvision.files import JsonObject
from openvision.images.decode import BadSampleError, to_rgb_image
from openvision.recaption.captioners.captioner import EXTREME_ASPECT, TOO_LONG, Answer, Question, Sampling
from openvision.untrusted import check_count, is_utf8, load_json, one_line

_SHOWN = 80
# Fields that change the answer -> values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "stream": (False,),
    "top_p": (1, 1.0),
    "min_p": (0, 0.0),
    "stop": ([],),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


class RequestError(Exception):
    """A request that cannot be answered, with its HTTP status and the protocol's code."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def content(self) -> JsonObject:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """One caption that a client asks for."""

    question: Question
    sampling: Sampling


def read_request(body: bytes, served: str, most_tokens: int) -> ChatRequest:
    """The request in `body` for the model `served`; captions end after `most_tokens`. Raises RequestError.

    Without a temperature the caption is greedy; without a seed a warm one differs every time.
    """
    try:
        content = load_json(body)
    except ValueError as error:
        raise RequestError("the body is no JSON") from error
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object")
    check_model(content.get("model"), served)
    for name, neutral in _NEUTRAL.items():
        value = content.get(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise RequestError(f"{name} is not supported by this server; leave it out")
    image, prompt = _read_messages(content.get("messages"))
    sampling = Sampling(
        _temperature(content.get("temperature")),
        # vLLM's word for all tokens is -1.
        _count(content, "top_k", 0, 0, 2**31) if content.get("top_k") != -1 else 0,
        min(_longest(content), most_tokens),
    )
    seed = _count(content, "seed", secrets.randbits(31), -(2**63), 2**63 - 1)
    # Which file the image is in is not known here. OpenVision 1's decoder reads the text as the alt-text.
    return ChatRequest(Question("", "", 0, image, "", prompt, seed, prompt), sampling)


def check_model(name: object, served: str) -> None:
    """Raise RequestError for another model than the one that is served; None is that one."""
    if name is not None and name != served:
        message = f"the model {name!r:.80} does not exist here, only {served!r}"
        raise RequestError(one_line(message), 404, "model_not_found")


def chat_response(answer: Answer, served: str) -> JsonObject:
    """The response with a caption; raises RequestError where there is none."""
    if answer.fault == TOO_LONG:
        raise RequestError("the prompt exceeds the context of the model", code="context_length_exceeded")
    if answer.fault == EXTREME_ASPECT:
        raise RequestError("the image is longer than this model reads; crop it", code=EXTREME_ASPECT)
    usage = {"prompt_tokens": answer.tokens_read, "completion_tokens": answer.tokens_written}
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": served,
        "choices": [{"index": 0, "message": message, "finish_reason": "length" if answer.cut else "stop"}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def models_response(served: str) -> JsonObject:
    """The list of the one model."""
    return {"object": "list", "data": [{"id": served, "object": "model", "created": 0, "owned_by": "openvision"}]}


def _read_messages(messages: object) -> tuple[bytes, str]:
    """Image and text of the only message."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        raise RequestError("messages must hold one message, with an image; conversations are not supported")
    if messages[0].get("role") != "user":
        raise RequestError("the message must have the role user")
    parts = messages[0].get("content")
    texts, urls = list[str](), list[str]()
    for part in parts if isinstance(parts, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        held = part.get(kind) if isinstance(part, dict) and isinstance(kind, str) else None
        if kind == "image_url" and isinstance(held, dict):
            held = held.get("url")
        if kind not in ("text", "image_url") or not isinstance(held, str):
            raise RequestError("a part of the message is neither a text nor an image_url")
        (texts if kind == "text" else urls).append(held)
    if len(urls) != 1:
        raise RequestError(f"the message holds {len(urls)} images; send one, as a part image_url")
    prompt = "\n".join(texts)
    if not is_utf8(prompt):
        raise RequestError("the text is not Unicode: it holds a lone surrogate")
    return _read_image(urls[0]), prompt


def _read_image(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise RequestError(f"{one_line(url[:_SHOWN])!r} is no data: URL in base64; nothing is downloaded here")
    try:
        image = base64.b64decode(data, validate=True)
        to_rgb_image(image)
    except (binascii.Error, BadSampleError) as error:
        raise RequestError(f"what the data: URL holds cannot be decoded: {one_line(str(error))[:_SHOWN]}") from error
    return image


def _temperature(value: object) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and 0 <= value <= 2):
        raise RequestError(f"temperature must be a number from 0 to 2, not {one_line(repr(value))[:_SHOWN]}")
    return float(value)


def _longest(content: JsonObject) -> int:
    name = "max_completion_tokens" if content.get("max_completion_tokens") is not None else "max_tokens"
    return _count(content, name, Sampling().max_tokens, 1, 2**31)


def _count(content: JsonObject, name: str, default: int, least: int, most: int) -> int:
    if (value := content.get(name)) is None:
        return default
    try:
        return check_count(name, value, least, most)
    except ValueError as error:
        raise RequestError(one_line(str(error))) from error
