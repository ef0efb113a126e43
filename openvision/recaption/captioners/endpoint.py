"""An OpenAI-compatible endpoint as captioner.

`http.client` follows no redirect, so that the key reaches the named host alone. The key is read from OPENAI_API_KEY
and appears in no message.
"""

import base64
import http.client
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.images.decode import to_rgb_image
from openvision.recaption.captioners.captioner import EXTREME_ASPECT, TOO_LONG, Answer, Question, Sampling
from openvision.recaption.captioners.request_queue import Patience, RequestQueue, TryAgainError
from openvision.untrusted import json_text, load_json, one_line

_MIME = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
# Bytes; a caption takes a few thousand.
_LONGEST_ANSWER = 2**20
_SHOWN = 200
# What a server without a list of models answers.
_NO_LIST = (404, 405, 501)

_T = TypeVar("_T")


class _NoCaptionError(Exception):
    """One image cannot be captioned, alone or with its prompt; the others may be."""

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.fault = fault


class _NoListError(Exception):
    """The endpoint does not list its models."""


@dataclass
class Endpoint:
    """A model behind `url`, e.g. http://localhost:8000/v1; raises OpenVisionError when it cannot be asked."""

    url: str
    model: str | None = None
    """None: the only one that the endpoint lists."""
    sampling: Sampling = field(default_factory=Sampling)
    timeout: float = 120.0
    """Seconds without an answer."""
    parallel: int = 32
    """Requests at once."""
    patience: Patience = field(default_factory=Patience)
    can_retry = True
    # While the last answers of a shard are late, the next one begins.
    shards_at_once = 2

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise OpenVisionError(
                f"the endpoint is no URL ({error}); write it like http://localhost:8000/v1"
            ) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise OpenVisionError("the endpoint must be a URL like http://localhost:8000/v1, without a user name")
        if parts.query or parts.fragment:
            # What stands there may be a key: it is not repeated.
            raise OpenVisionError(
                "the endpoint has a '?' or '#', which would be lost; write it like http://localhost:8000/v1 and put a "
                "key into OPENAI_API_KEY"
            )
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._path = parts.path.rstrip("/")
        self.model = self._find_model()

    @property
    def name(self) -> str:
        """Model, URL and how it samples."""
        return f"{self.model} at {self.url}, {self.sampling}"

    @property
    def varies(self) -> bool:
        """Whether it samples."""
        return self.sampling.temperature > 0

    def answers(self, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
        """Captions as they come, `parallel` of them asked for at the same time."""
        try:
            yield from RequestQueue(self._ask, self.parallel, self.patience).answers(questions)
        except TryAgainError as error:
            raise self._gave_up(error) from error

    def _find_model(self) -> str:
        try:
            listed = self._persist(lambda: _models(self._send("GET", "/models", None)))
        except _NoListError as error:
            if self.model is None:
                raise OpenVisionError(f"{self.url} lists no models; name one with --model") from error
            return self.model
        if self.model is None and len(listed) == 1:
            return listed[0]
        names = ", ".join(map(_shown, listed[:8])) or "none"
        if self.model is None:
            raise OpenVisionError(f"{self.url} has {len(listed)} models ({names}); name one with --model")
        if self.model not in listed:
            raise OpenVisionError(f"{self.url} has no model {self.model!r}, only: {names}; correct --model")
        return self.model

    def _persist(self, act: Callable[[], _T]) -> _T:
        for failures in range(1, self.patience.tries + 1):
            try:
                return _trying(act)
            except TryAgainError as error:
                if failures == self.patience.tries:
                    raise self._gave_up(error) from error
                time.sleep(self.patience.pause(failures, error.pause))
        raise AssertionError("tries is below 1")

    def _gave_up(self, error: TryAgainError) -> OpenVisionError:
        return OpenVisionError(
            f"{self.url} does not answer after {self.patience.tries} tries: {_shown(str(error))}; start or correct the "
            "endpoint, then run the same command"
        )

    def _ask(self, question: Question) -> Answer:
        data, mime = question.image, _MIME.get(question.extension)
        if mime is None:
            buffer = io.BytesIO()
            to_rgb_image(data).save(buffer, "PNG")
            data, mime = buffer.getvalue(), "image/png"
        image = {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": question.prompt}]
        body: JsonObject = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature_of(question),
            "seed": question.seed,
        }
        if self.sampling.top_k:
            # No part of OpenAI's protocol; vLLM, SGLang and llama.cpp read it.
            body["top_k"] = self.sampling.top_k
        try:
            return _trying(lambda: _answer(self._send("POST", "/chat/completions", json_text(body).encode())))
        except _NoCaptionError as error:
            return Answer("", fault=error.fault)

    def _send(self, method: str, path: str, body: bytes | None) -> JsonObject:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            data = response.read(_LONGEST_ANSWER + 1)
        finally:
            connection.close()
        if response.status != 200:
            if method == "GET" and response.status in _NO_LIST:
                raise _NoListError
            self._refuse(response.status, response.getheader("Retry-After"), data)
        if len(data) > _LONGEST_ANSWER:
            raise TryAgainError("the answer is longer than 1 MiB")
        content = load_json(data)
        if not isinstance(content, dict):
            raise TryAgainError("the answer is no JSON object")
        return content

    def _refuse(self, status: int, retry_after: str | None, data: bytes) -> None:
        said = _shown(data.decode("utf-8", "replace"))
        if status in (408, 409, 425, 429) or status >= 500:
            seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
            raise TryAgainError(f"status {status}", seconds, is_busy=status in (429, 503))
        if status in (401, 403):
            raise OpenVisionError(f"{self.url} refuses the key (status {status}); set OPENAI_API_KEY")
        if status in (400, 413, 422) and "context" in said.lower():
            raise _NoCaptionError(TOO_LONG)
        # The code that `openvision serve` gives.
        if status == 400 and EXTREME_ASPECT in said:
            raise _NoCaptionError(EXTREME_ASPECT)
        if status in (400, 422) and "image" in said.lower():
            raise OpenVisionError(f"the model {self.model} at {self.url} takes no images: {said}; choose another")
        raise OpenVisionError(f"{self.url} refuses the request (status {status}): {said}; correct URL or --model")


def _trying(act: Callable[[], _T]) -> _T:
    """What may be gone at the next try, as TryAgainError."""
    try:
        return act()
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
        raise TryAgainError(str(error) or type(error).__name__) from error


def _key() -> str:
    """The key, empty without; raises OpenVisionError for what no header can carry, whose own message would show it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise OpenVisionError("OPENAI_API_KEY holds characters that no HTTP header can carry; set it again")
    return key


def _shown(text: str) -> str:
    """What the other side said, for a message: without the key, which is taken out before anything is cut."""
    if key := _key():
        text = text.replace(key, "***")
    return one_line(text)[:_SHOWN]


def _models(content: JsonObject) -> list[str]:
    return [str(entry["id"]) for entry in content["data"]]


def _answer(content: JsonObject) -> Answer:
    choice = content["choices"][0]
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError("the caption is no text")
    usage = content.get("usage")
    read, written = (_count(usage, f"{kind}_tokens") for kind in ("prompt", "completion"))
    return Answer(text.strip(), choice.get("finish_reason") == "length", None, read, written)


def _count(usage: object, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
