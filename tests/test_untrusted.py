"""Names and texts from strangers: no path leaves its folder, no control character is printed."""

import ast
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from openvision.errors import OpenVisionError
from openvision.terminal import Console, echo
from openvision.untrusted import is_utf8, json_text, load_json, one_line, path_inside, printable, safe_name

PACKAGE = Path(__file__).parents[1] / "openvision"
# Every code point, lone surrogates included.
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))
OBEYED = {chr(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@given(ANY_TEXT, ANY_TEXT)
def test_a_safe_name_is_a_file_of_its_folder(first, second):
    name = safe_name(first, second)
    assert name == Path(name).name
    assert not name.startswith(".")
    assert 0 < len(name.encode()) <= 200
    assert path_inside(Path("folder"), f"{name}.png") == Path("folder") / f"{name}.png"


@pytest.mark.parametrize(
    ("names", "safe"),
    [
        (("a red car", "k"), "a-red-car"),
        (("../x/..", "k"), "x"),
        (("...", "../../x/owned"), "x-owned"),
        (("", "/etc/passwd"), "etc-passwd"),
        (("\x1b]0;owned\x07", "k"), "0-owned"),
        (("näme", "k"), "näme"),
        (("ü" * 300,), "ü" * 100),
    ],
)
def test_safe_names(names, safe):
    assert safe_name(*names) == safe


def test_a_name_without_letters_becomes_a_hash_of_its_own():
    assert safe_name("..", "///") == safe_name("///")
    assert len({safe_name("/"), safe_name("//"), safe_name("\ud800")}) == 3


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", ".", "", "a\0b", "a/..", "./.."])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(OpenVisionError, match="does not name a file inside"):
        path_inside(tmp_path, name)


@pytest.mark.parametrize(("name", "path"), [("a.png", "a.png"), ("a/b/../c.png", "a/c.png"), ("..a", "..a")])
def test_names_inside(name, path):
    assert path_inside(Path("images"), name) == Path("images") / path


@given(ANY_TEXT)
def test_what_is_printed_holds_nothing_that_a_terminal_obeys(text):
    assert not OBEYED & (set(printable(text)) - set("\t\n"))
    assert not OBEYED & set(one_line(text))
    assert is_utf8(printable(text))
    assert printable(printable(text)) == printable(text)


@given(
    st.recursive(ANY_TEXT | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner))
)
def test_json_for_people_says_the_same_and_prints_safely(value):
    text = json_text(value)
    assert json.loads(text) == value
    assert not OBEYED & set(text)
    assert is_utf8(text)


def test_too_deep_json_is_an_error_of_the_value():
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json(b"[" * 100_000)


def test_texts_are_escaped_wherever_they_are_printed(capsys):
    echo("name \x1b]0;owned\x07\x9b2J\u202e")
    assert capsys.readouterr().out == "name \\x1b]0;owned\\x07\\x9b2J\\u202e\n"
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=80)
    table = Table("name")
    table.add_row("[green]ramp[/] \x1b[2J")
    console.print(table)
    console.print("\x1b]0;owned\x07", markup=False)
    shown = screen.getvalue()
    # Rich's own colours pass.
    assert "\x1b[32mramp" in shown
    assert "\\x1b[2J" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]" not in shown


def _calls(tree: ast.AST) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_line_is_printed_by_terminal(path):
    """`terminal.echo` and `terminal.Console` escape; a progress line rewrites itself and holds no text from outside."""
    if path.name in ("terminal.py", "progress.py") and path.parent in (PACKAGE, PACKAGE / "cli"):
        return
    if path.name == "edge.py":
        # The script of a bundle runs where this package is not; its test prints a hostile label.
        return
    text = path.read_text(encoding="utf-8")
    used = {"print", "typer.echo", "typer.secho", "rich.print", "sys.stdout.write", "sys.stderr.write"}
    assert not used & set(_calls(ast.parse(text))), f"{path}: print with openvision.terminal"
    assert "rich.console" not in text, f"{path}: take the Console of openvision.terminal"
