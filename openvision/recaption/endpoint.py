"""An OpenAI-compatible endpoint as captioner: requests in parallel, repeated with back-off where that can help.

`http.client` follows no redirect, so that the key reaches the named host alone. The key is read from OPENAI_API_KEY
and appears in no message.
"""

import base64
import http.client
import io
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.images.decode import to_rgb_image
from openvision.recaption.captioner import Answer, Question
from openvision.untrusted import json_text, load_json, one_line

_MIME = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
# Bytes; a caption takes a few thousand.
_LONGEST_ANSWER = 2**20
_LONGEST_PAUSE = 60.0
_RETRY_TEMPERATURE = 0.7
_SHOWN = 200
# Threads for each request at once: those that wait to repeat theirs keep no other from being sent.
_WAITING = 4


_T = TypeVar("_T")


class _TryAgainError(Exception):
    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _TooLongError(Exception):
    """One image and its prompt exceed the context of the model; the others may not."""


@dataclass
class Endpoint:
    """A model behind `url`, e.g. http://localhost:8000/v1; raises OpenVisionError when it cannot be asked."""

    url: str
    model: str | None = None
    """None: the only one that the endpoint lists."""
    temperature: float = 0.0
    max_tokens: int = 128
    timeout: float = 120.0
    """Seconds without an answer."""
    tries: int = 8
    parallel: int = 32
    """Requests at once."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    samples = True

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise OpenVisionError("the endpoint must be a URL like http://localhost:8000/v1, without a user name")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/")
        self._slots = threading.BoundedSemaphore(self.parallel)
        self.model = self._find_model()

    @property
    def name(self) -> str:
        """Model, URL and how it samples."""
        return f"{self.model} at {self.url}, temperature {self.temperature:g}, {self.max_tokens} tokens"

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """n questions, `parallel` of them asked at the same time -> n answers."""
        with ThreadPoolExecutor(self.parallel * _WAITING) as pool:
            futures = [pool.submit(self._ask_one, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _find_model(self) -> str:
        listed = self._persist("GET", "/models", None, _models)
        if self.model is None and len(listed) == 1:
            return listed[0]
        names = ", ".join(map(_shown, listed[:8])) or "none"
        if self.model is None:
            raise OpenVisionError(f"{self.url} has {len(listed)} models ({names}); name one with --model")
        if self.model not in listed:
            raise OpenVisionError(f"{self.url} has no model {self.model!r}, only: {names}; correct --model")
        return self.model

    def _ask_one(self, question: Question) -> Answer:
        data, mime = question.image, _MIME.get(question.extension)
        if mime is None:
            buffer = io.BytesIO()
            to_rgb_image(data).save(buffer, "PNG")
            data, mime = buffer.getvalue(), "image/png"
        image = {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": question.prompt}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": max(self.temperature, _RETRY_TEMPERATURE) if question.retry else self.temperature,
            "seed": question.seed,
        }
        try:
            return self._persist("POST", "/chat/completions", json_text(body).encode(), _answer)
        except _TooLongError:
            return Answer("", fault="too_long")

    def _persist(self, method: str, path: str, body: bytes | None, read: Callable[[JsonObject], _T]) -> _T:
        """Send a request until it is answered in full; raises OpenVisionError after `tries`."""
        pause = 0.5
        for left in reversed(range(self.tries)):
            try:
                with self._slots:
                    content = self._send(method, path, body)
                return read(content)
            except (
                _TryAgainError,
                OSError,
                http.client.HTTPException,
                ValueError,
                KeyError,
                TypeError,
                IndexError,
            ) as error:
                reason = str(error) or type(error).__name__
                if not left:
                    raise OpenVisionError(
                        f"{self.url} does not answer after {self.tries} tries: {_shown(reason)}; start or "
                        "correct the endpoint, then run the same command"
                    ) from error
                asked = error.pause if isinstance(error, _TryAgainError) else None
                self.sleep(min(pause if asked is None else asked, _LONGEST_PAUSE))
                pause *= 2
        raise AssertionError("tries is below 1")

    def _send(self, method: str, path: str, body: bytes | None) -> JsonObject:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, self._path + path, body, headers)
            response = connection.getresponse()
            data = response.read(_LONGEST_ANSWER + 1)
        finally:
            connection.close()
        if response.status != 200:
            self._refuse(response.status, response.getheader("Retry-After"), data)
        if len(data) > _LONGEST_ANSWER:
            raise _TryAgainError("the answer is longer than 1 MiB")
        content = load_json(data)
        if not isinstance(content, dict):
            raise _TryAgainError("the answer is no JSON object")
        return content

    def _refuse(self, status: int, retry_after: str | None, data: bytes) -> None:
        said = _shown(data.decode("utf-8", "replace"))
        if status in (408, 409, 425, 429) or status >= 500:
            seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
            raise _TryAgainError(f"status {status}", seconds)
        if status in (401, 403):
            raise OpenVisionError(f"{self.url} refuses the key (status {status}); set OPENAI_API_KEY")
        if status == 400 and "context" in said.lower():
            raise _TooLongError
        if status == 400 and "image" in said.lower():
            raise OpenVisionError(f"the model {self.model} at {self.url} takes no images: {said}; choose another")
        raise OpenVisionError(f"{self.url} refuses the request (status {status}): {said}; correct URL or --model")


def _shown(text: str) -> str:
    """What the other side said, for a message: without the key, which is taken out before anything is cut."""
    if key := os.environ.get("OPENAI_API_KEY"):
        text = text.replace(key, "***")
    return one_line(text)[:_SHOWN]


def _models(content: JsonObject) -> list[str]:
    return [str(entry["id"]) for entry in content["data"]]


def _answer(content: JsonObject) -> Answer:
    choice = content["choices"][0]
    text = choice["message"].get("content") or ""
    if not isinstance(text, str):
        raise TypeError("the caption is no text")
    return Answer(text.strip(), choice.get("finish_reason") == "length")
