"""Requests in parallel; one that must wait before it is sent again leaves its place to others.

Threads take the oldest request that is ready. No thread sleeps for a request, so that an error ends all at once, and
as many requests as allowed are at work while others wait. A pause doubles with every failure; but where other requests
succeed in the meantime, the other side is well, and a cut or garbled one is soon sent again.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from queue import SimpleQueue
from typing import Protocol

from openvision.recaption.captioners.captioner import Answer, Question

LONGEST_PAUSE = 60.0
_FIRST_PAUSE = 0.5
# So many failures of a request may be chance; what fails still waits longer, whatever the others do.
_CHANCE = 4
# Open requests for each one at work: at a fifth of failures that wait three seconds, enough are ready.
_OPEN = 16


class TryAgainError(Exception):
    """The same request may succeed later, after `pause` seconds where the other side names them."""

    def __init__(self, reason: str, pause: float | None = None, is_busy: bool = False) -> None:
        """`is_busy`: the other side has more requests than it can take."""
        super().__init__(reason)
        self.pause, self.is_busy = pause, is_busy


class Clock(Protocol):
    """What the queue waits by."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        """Wait for `changed`, whose lock is held, at most so long."""
        ...


class SystemClock:
    """The machine's, which nobody sets."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        """Wait for `changed`, at most so long."""
        changed.wait(seconds)


@dataclass(frozen=True)
class Patience:
    """How often a request is sent, and how fast."""

    tries: int = 8
    per_minute: float = 0.0
    """Most requests a minute; 0: no limit."""
    shorten: Callable[[float], float] = field(default=lambda seconds: seconds, repr=False)
    """What becomes of a pause; tests shorten them."""
    clock: Clock = field(default_factory=SystemClock, repr=False)

    def pause(self, failures: int, asked: float | None) -> float:
        """Seconds to wait after so many failures: doubled each time, or what the other side asked for."""
        seconds = _FIRST_PAUSE * 2 ** (failures - 1) if asked is None else asked
        return self.shorten(min(seconds, LONGEST_PAUSE))


@dataclass(order=True)
class _Request:
    rank: tuple[bool, int]
    question: Question = field(compare=False)
    failures: int = field(default=0, compare=False)


class RequestQueue:
    """Questions answered by `ask` in `parallel` threads; an error other than TryAgainError ends them all."""

    def __init__(self, ask: Callable[[Question], Answer], parallel: int, patience: Patience) -> None:
        """`ask` is called again for a question after it raised TryAgainError."""
        self._ask, self._parallel, self._patience = ask, parallel, patience
        self._ready: list[_Request] = []
        self._waiting: list[tuple[float, _Request]] = []
        self._changed = threading.Condition()
        self._results: SimpleQueue[tuple[Question, Answer] | BaseException] = SimpleQueue()
        self._stopped = False
        # Requests that failed since the last one that did not.
        self._in_a_row = 0
        self._next_start = 0.0

    def answers(self, questions: Iterable[Question | None]) -> Iterator[tuple[Question, Answer]]:
        """Each question with its answer, as they come; raises the last TryAgainError of a request without tries."""
        for _ in range(self._parallel):
            # Of a connection that hangs nobody waits for the end.
            threading.Thread(target=self._work, daemon=True).start()
        source, numbers = iter(questions), count()
        open_requests, ended = 0, False
        try:
            while True:
                while not ended and open_requests < self._parallel * _OPEN:
                    try:
                        question = next(source)
                    except StopIteration:
                        ended = True
                        break
                    if question is None:
                        break
                    # A second try comes first: its shard may wait for nothing else.
                    self._add(_Request((not question.retry, next(numbers)), question))
                    open_requests += 1
                if not open_requests:
                    return
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                open_requests -= 1
                yield result
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()

    def _add(self, request: _Request) -> None:
        with self._changed:
            heapq.heappush(self._ready, request)
            self._changed.notify()

    def _work(self) -> None:
        while (request := self._take()) is not None:
            try:
                answer = self._ask(request.question)
                with self._changed:
                    self._in_a_row = 0
                self._results.put((request.question, answer))
            except TryAgainError as error:
                request.failures += 1
                if request.failures >= self._patience.tries:
                    self._results.put(error)
                    return
                with self._changed:
                    self._in_a_row += 1
                    failures = request.failures
                    if not error.is_busy:
                        failures = max(min(failures, self._in_a_row), failures - _CHANCE + 1)
                    due = self._patience.clock.now() + self._patience.pause(failures, error.pause)
                    heapq.heappush(self._waiting, (due, request))
                    self._changed.notify()
            except BaseException as error:
                self._results.put(error)
                return

    def _take(self) -> _Request | None:
        """The oldest request that is ready, waited for; None after the end."""
        clock = self._patience.clock
        with self._changed:
            while not self._stopped:
                now = clock.now()
                while self._waiting and self._waiting[0][0] <= now:
                    heapq.heappush(self._ready, heapq.heappop(self._waiting)[1])
                if self._ready and now >= self._next_start:
                    if self._patience.per_minute:
                        self._next_start = max(now, self._next_start) + 60 / self._patience.per_minute
                    return heapq.heappop(self._ready)
                ends = [self._next_start] if self._ready else [due for due, _ in self._waiting[:1]]
                clock.wait(self._changed, ends[0] - now if ends else None)
        return None
