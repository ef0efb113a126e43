"""Encoding on a cluster: the vectors of one process, each shard once, whoever encodes it and whatever stops."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.cluster import Cluster, Work
from openvision.errors import OpenVisionError
from openvision.inference import encode_cluster
from openvision.inference.encode_cluster import encode_on_ray
from openvision.inference.vector_folder import encode_folder
from tests.conftest import COLOURS, SHAPES, draw


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for colour in COLOURS:
        for shape in SHAPES:
            (folder / f"{colour}-{shape}.png").write_bytes(draw(colour, shape))
    (folder / "broken.png").write_bytes(b"none")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def two_actors(asked: list[str]) -> Callable[[Sequence[str], Callable[[], Work], Cluster], Iterator[str]]:
    """In the place of Ray: two actors in this process, which share the items."""

    def run(items: Sequence[str], open_work: Callable[[], Work], cluster: Cluster) -> Iterator[str]:
        actors = [open_work() for _ in range(cluster.workers)]
        for number, item in enumerate(reversed(items)):
            asked.append(item)
            yield actors[number % len(actors)](item)

    return run


def test_two_actors_write_what_one_process_writes_and_resume(images, tiny_run, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(encode_cluster, "check_ray", lambda: None)
    monkeypatch.setattr(encode_cluster, "run_on_ray", two_actors(asked))
    alone, together = tmp_path / "alone", tmp_path / "together"

    def load() -> openvision.VisionEncoder:
        return openvision.load_vision(tiny_run)

    encode_folder(load(), images, alone, shard=5)
    shown: list[tuple[int, int]] = []
    arguments = (images, together, Cluster(2))
    found = encode_on_ray(load(), load, *arguments, shard=5, progress=lambda done, total: shown.append((done, total)))
    assert (found.encoded, len(found.skipped)) == (16, 1)
    assert contents(together) == contents(alone)
    assert sorted(asked) == ["0", "1", "2", "3"]
    assert shown == [(2, 17), (7, 17), (12, 17), (17, 17)]
    # What is done stays; what is missing is encoded again, alone.
    asked.clear()
    (together / "000002.npy").unlink()
    encode_on_ray(load(), load, *arguments, shard=5)
    assert asked == ["2"]
    assert contents(together) == contents(alone)
    encode_on_ray(load(), load, *arguments, shard=5)
    assert asked == ["2"]


def test_an_actor_that_sees_other_images_stops_the_job(images, tiny_run, tmp_path, monkeypatch):
    def load() -> openvision.VisionEncoder:
        return openvision.load_vision(tiny_run)

    def on_another_machine(items: Sequence[str], open_work: Callable[[], Work], cluster: Cluster) -> Iterator[str]:
        (images / "new.png").write_bytes(draw("red", "bar"))
        try:
            open_work()
        finally:
            (images / "new.png").unlink()
        yield ""

    monkeypatch.setattr(encode_cluster, "check_ray", lambda: None)
    monkeypatch.setattr(encode_cluster, "run_on_ray", on_another_machine)
    with pytest.raises(OpenVisionError, match=r"vectors of another job \(images differ\)"):
        encode_on_ray(openvision.load_vision(tiny_run), load, images, tmp_path / "out", Cluster(), shard=5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_bad_input_is_one_sentence_and_nothing_is_written(images, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    common = ["encode", str(images), "--model", str(tiny_run), "--ray-workers", "2"]
    done = CliRunner().invoke(app, [*common, "-o", str(tmp_path / "out")])
    assert "openvision-encoders[ray]" in str(done.exception)
    done = CliRunner().invoke(app, [*common, "-o", str(tmp_path / "out.parquet")])
    assert "--ray-workers share the shards of an output folder" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


# Workers are on two nodes if they are two, because no node has room for a second one.
TWO_NODES = """
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster as Nodes

import openvision
from openvision.cluster import Cluster
from openvision.inference.encode_cluster import encode_on_ray

images, model, out, notes = map(Path, sys.argv[1:])
nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
for _ in range(2):
    nodes.add_node(num_cpus=1, object_store_memory=10**8)


def load():
    found = openvision.load_vision(model)
    if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
        (notes / ray.get_runtime_context().get_node_id()).touch()
    return found


found = encode_on_ray(load(), load, images, out, Cluster(2, address=nodes.address), shard=1)
print(found.encoded, "encoded", len(found.skipped), "skipped")
"""


@pytest.mark.slow
def test_on_two_nodes(images, tiny_run, tmp_path):
    """Three Ray nodes of one processor on this machine: two workers, and Ray's own tasks."""
    pytest.importorskip("ray")
    encode_folder(openvision.load_vision(tiny_run), images, tmp_path / "alone", shard=1)
    script, notes = tmp_path / "nodes.py", tmp_path / "notes"
    script.write_text(TWO_NODES)
    notes.mkdir()
    command = [sys.executable, script, images, tiny_run, tmp_path / "out", notes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "16 encoded 1 skipped" in done.stdout
    assert len(list(notes.iterdir())) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_on_a_local_ray(images, tiny_run, tmp_path):
    """Beside the memory of a cluster that is gone, which the test before leaves."""
    pytest.importorskip("ray")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "openvision.cli.main", "encode", str(images), "--model", str(tiny_run)]
    for workers in ("0", "2"):
        arguments = ["-o", str(out if workers == "2" else tmp_path / "alone"), "--ray-workers", workers]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        assert "16 images encoded, 1 skipped" in done.stdout
    assert contents(out) == contents(tmp_path / "alone")
    manifest = json.loads((out / "manifest.json").read_text())
    # A stop between two shards: the same command completes the folder.
    (out / "manifest.json").write_text(json.dumps(manifest | {"shards": None}))
    (out / "000000.npy").unlink()
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "alone")
