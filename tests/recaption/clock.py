"""A clock that a test drives."""

import threading


class ManualClock:
    """Stands still but for those who wait."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        if seconds is None:
            changed.wait()
        else:
            # The lock of `changed` is held: nobody else reads the clock.
            self.seconds += seconds
