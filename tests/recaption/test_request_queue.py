"""Pauses of requests that fail, on a clock that the test drives."""

import pytest

from openvision.recaption.captioners.captioner import Answer, Question
from openvision.recaption.captioners.request_queue import Patience, RequestQueue, TryAgainError
from tests.recaption.clock import ManualClock

DOUBLED = [0.5, 1, 2, 4, 8, 16, 32]


def pauses_of(error: TryAgainError, others: int) -> list[float]:
    """Pauses of a request that fails seven times, while `others` are answered, each in a second."""
    clock, pauses = ManualClock(), list[float]()
    failures = 7

    def note(seconds: float) -> float:
        pauses.append(seconds)
        return seconds

    def ask(question: Question) -> Answer:
        nonlocal failures
        clock.seconds += 1
        if question.key == "bad" and failures:
            failures -= 1
            raise error
        return Answer(question.key)

    keys = ["bad", *map(str, range(others))]
    questions = [Question("s", key, 0, b"", "png", "", 0) for key in keys]
    queue = RequestQueue(ask, 1, Patience(shorten=note, clock=clock))
    assert sorted(answer.text for _, answer in queue.answers(questions)) == sorted(keys)
    return pauses


def test_pauses_double_while_nothing_succeeds():
    assert pauses_of(TryAgainError("cut"), 0) == DOUBLED


def test_a_failure_by_chance_does_not_wait_long():
    """The others show that the endpoint is well; only what fails a fifth time waits longer."""
    assert pauses_of(TryAgainError("cut"), 80) == [0.5] * 4 + DOUBLED[1:4]


def test_a_busy_endpoint_is_given_time():
    assert pauses_of(TryAgainError("status 503", is_busy=True), 80) == DOUBLED


@pytest.mark.parametrize(("asked", "waited"), [(3.0, 3.0), (3600.0, 60.0)])
def test_what_the_endpoint_asks_for_is_waited(asked, waited):
    assert pauses_of(TryAgainError("status 429", asked, is_busy=True), 0) == [waited] * 7
