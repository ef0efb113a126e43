"""The error of a single sample that cannot be used: counted by reason and replaced, not fatal."""

from openvision.errors import OpenVisionError


class BadSampleError(OpenVisionError):
    """A sample that cannot be used; `reason` is the short name it is counted by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
