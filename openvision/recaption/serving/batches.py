"""Requests of many clients, decoded in batches by one thread.

The thread takes the oldest request and all that wait beside it with the same sampling. What comes meanwhile is the next
batch, so that a lone request waits for nobody.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from openvision.errors import OpenVisionError
from openvision.recaption.captioners.captioner import Answer, LocalCaptioner
from openvision.recaption.serving.chat import ChatRequest, RequestError
from openvision.terminal import echo

_Waiting = tuple[ChatRequest, "Future[Answer]"]


class Batches:
    """A captioner that any thread may ask."""

    def __init__(self, captioner: LocalCaptioner, most_open: int) -> None:
        """At most `most_open` requests are open at once; more are refused, to be sent again."""
        self._captioner = captioner
        self._places = threading.BoundedSemaphore(most_open)
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the open requests, taken before a body is read; raises RequestError 429 when there is none."""
        if not self._places.acquire(blocking=False):
            raise RequestError("too many requests at once; send it again", 429, "rate_limit_exceeded")
        try:
            yield
        finally:
            self._places.release()

    def ask(self, request: ChatRequest) -> Answer:
        """The answer, waited for; raises RequestError 500 when the captioner fails, 503 when the server stops."""
        future: Future[Answer] = Future()
        with self._changed:
            if self._stopped:
                raise _stops()
            self._waiting.append((request, future))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Answer no more; returns after the batch in progress."""
        with self._changed:
            self._stopped = True
            for _, future in self._waiting:
                future.set_exception(_stops())
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = self._captioner.caption([request.question for request, _ in batch], batch[0][0].sampling)
        # A failure must not end the server: no memory, an image that no step foresaw.
        except Exception as error:
            echo(f"a batch of {len(batch)} failed: {type(error).__name__}: {error}", err=True)
            if len(batch) > 1:
                # Whoever's request it was, the others are not to blame.
                for one in batch:
                    self._answer([one])
                return
            known = str(error) if isinstance(error, OpenVisionError) else type(error).__name__
            batch[0][1].set_exception(RequestError(f"the captioner failed: {known}", 500, "captioner_failed"))
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _take(self) -> list[_Waiting]:
        """The next batch, waited for; empty after the end."""
        with self._changed:
            while not self._waiting and not self._stopped:
                self._changed.wait()
            batch, rest = list[_Waiting](), list[_Waiting]()
            for one in self._waiting:
                is_alike = one[0].sampling == self._waiting[0][0].sampling
                (batch if is_alike and len(batch) < self._captioner.batch_size else rest).append(one)
            self._waiting = rest
            return batch


def _stops() -> RequestError:
    return RequestError("the server stops", 503, "server_stops")
