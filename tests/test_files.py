"""Files of JSON lines outlive a crash in the middle of a line, and a full disk."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvision.errors import OpenVisionError
from openvision.files import PatientLines, append_lines, atomic_folder, locked, read_json_lines

ROWS = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), min_size=1), max_size=5)


@settings(max_examples=100, deadline=None)
@given(before=ROWS, after=ROWS, cut=st.integers(0, 200))
def test_a_torn_last_line_is_removed_and_whole_ones_stay(before, after, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    whole = [json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for row in before]
    written = b"".join(whole)[: max(0, sum(map(len, whole)) - cut)]
    path.write_bytes(written)
    left = read_json_lines(path)
    append_lines(path, "".join(json.dumps(row) + "\n" for row in after))
    # A row whose line feed alone is missing is whole.
    assert left == before[: len(left)]
    assert len(left) in (written.count(b"\n"), written.count(b"\n") + 1)
    assert read_json_lines(path) == left + after


def test_a_line_that_another_process_is_writing_is_not_torn(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ThreadPoolExecutor() as pool:
        with open(path, "a+b", buffering=0) as file, locked(file.fileno()):
            file.write(b'{"a": ')
            later = pool.submit(append_lines, path, '{"b": 2}\n')
            with pytest.raises(TimeoutError):
                later.result(timeout=0.2)
            file.write(b"1}\n")
        later.result()
    assert read_json_lines(path) == [{"a": 1}, {"b": 2}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\n{"a": 2}\n')
    with pytest.raises(OpenVisionError, match=r"rows.jsonl, line 2 is not JSON"):
        read_json_lines(path)
    path.write_bytes(b'{"a": 1}\n[]\n{"a": 2}\n')
    with pytest.raises(OpenVisionError, match=r"rows.jsonl, line 2 is no JSON object"):
        read_json_lines(path)


def test_lines_wait_for_room_and_the_oldest_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.symlink_to("/dev/full")
    lines = PatientLines(path, most=2)
    assert lines.write(["1\n"])
    assert "No space left" in str(lines.problem)
    assert not lines.write(["2\n", "3\n"])
    path.unlink()
    assert lines.write(["4\n"])
    assert lines.problem is None
    assert path.read_text() == "3\n4\n"


def test_a_folder_without_room_is_not_there(tmp_path):
    told = r"cannot write folder .*model: No space left on device; make room"
    with pytest.raises(OpenVisionError, match=told), atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").symlink_to("/dev/full")
        (folder / "weights").write_text("all of them")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "model") as folder:
        (folder / "nowhere" / "else").write_text("")
