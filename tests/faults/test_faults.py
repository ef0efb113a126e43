"""Every promise of docs/reliability.md, put to the test by real processes that are really killed."""

import pytest
from promises import PROMISES, Promise, table

_KEPT: dict[str, str] = {}


def _names(promises: list[Promise]) -> list[str]:
    return [promise.name for promise in promises]


SHORT = [promise for promise in PROMISES if promise.short]


@pytest.mark.parametrize("promise", SHORT, ids=_names(SHORT))
def test_short(promise, bench):
    assert promise.check(bench)


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES, ids=_names(PROMISES))
def test_all(promise, bench):
    _KEPT[promise.name] = "NOT KEPT"
    try:
        _KEPT[promise.name] = promise.check(bench)
    except pytest.skip.Exception as skipped:
        _KEPT[promise.name] = f"not run: {skipped}"
        raise


@pytest.mark.slow
def test_table(capsys):
    """Prints what the tests above have seen; runs after them."""
    with capsys.disabled():
        print(f"\n{table(_KEPT)}")
    assert _KEPT
