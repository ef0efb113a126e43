"""What the machine has run out of is one sentence."""

import errno

import pytest

from openvision.errors import OpenVisionError, describe_exhaustion


def _behind(cause: OSError) -> OpenVisionError:
    error = OpenVisionError("shard cannot be read; restore it")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "out of memory on this machine"),
        (OSError(errno.EMFILE, "", "a.tar"), "cannot open a.tar: too many open files; raise the limit"),
        (_behind(OSError(errno.ENFILE, "")), "cannot open: too many open files; raise the limit"),
        (OSError(errno.ENOSPC, "No space left", "out.npz"), "cannot write out.npz: No space left; make room"),
        (_behind(OSError(errno.ENOSPC, "No space left")), None),
        (FileNotFoundError(errno.ENOENT, "gone"), None),
        (ValueError("a bug"), None),
    ],
)
def test_exhaustion(error, sentence):
    told = describe_exhaustion(error)
    assert told is None if sentence is None else str(told).startswith(sentence)
