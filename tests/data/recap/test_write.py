"""Captions decoded with the wrong encoding are fixed; those that may be right stay as they are."""

import pytest

from openvision.data.recap.write import fix_mojibake


@pytest.mark.parametrize(
    ("text", "fixed"),
    [
        (r"CLR\xc2\xae Mold & Mildew", "CLR® Mold & Mildew"),
        (r"caf\xc3\xa9 \xE2\x82\xAC5", "café €5"),
        ("the cafÃ© we likeâ€™d", "the café we like’d"),
        ("smile ðŸ˜€", "smile 😀"),
        ("naÃ¯ve Ã\x9cber", "naïve Über"),
    ],
)
def test_mojibake_is_fixed(text, fixed):
    assert fix_mojibake(text) == fixed


@pytest.mark.parametrize(
    "text",
    [
        "NESCAFÉ® Gold",
        "AMANHÃ…",
        "café’…",
        "IRMÃ®",
        r"C:\xfiles",
        r"cut \xc2",
        r"\x41",
        "œuvre – déjà vu ™",
        "café Ã©",
        "日本 cafÃ©",
    ],
)
def test_texts_that_may_be_right_stay(text):
    assert fix_mojibake(text) == text
