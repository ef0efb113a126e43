"""A promise: a sentence about what a run does when something fails, and the function that makes it fail and looks."""

from collections.abc import Callable
from dataclasses import dataclass

from bench import Bench


@dataclass(frozen=True)
class Promise:
    """A sentence, and the function that puts it to the test; it returns what was seen, in a few words."""

    says: str
    check: Callable[[Bench], str]
    short: bool

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.check.__name__


PROMISES: list[Promise] = []


def promise(says: str, short: bool = False) -> Callable[[Callable[[Bench], str]], Callable[[Bench], str]]:
    """Put a function on the list."""

    def add(check: Callable[[Bench], str]) -> Callable[[Bench], str]:
        PROMISES.append(Promise(says, check, short))
        return check

    return add


def table(kept: dict[str, str]) -> str:
    """The promises and what was seen of each."""
    width = max(len(each.says) for each in PROMISES)
    lines = [f"{each.says:<{width}}  {kept.get(each.name, 'not run')}" for each in PROMISES]
    return "\n".join(["promises kept", "-" * 13, *lines])
