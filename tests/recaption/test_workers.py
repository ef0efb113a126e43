"""Several workers on one folder: killed at any moment, watched, and on a local Ray."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.recap.write import read_captions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.shards.store import LocalStore
from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.recaption.captioners.endpoint import Endpoint
from openvision.recaption.job import Part, lock_path, recaption_shards
from openvision.recaption.progress import Prices, read_progress
from openvision.recaption.prompts import load_prompt
from openvision.recaption.shard import Options
from tests.recaption.server import serving
from tests.recaption.test_captioners import png

SHARDS, IN_SHARD = 12, 5
SAMPLES = SHARDS * IN_SHARD


@pytest.fixture
def shards(tmp_path) -> Path:
    with ShardWriter(tmp_path / "shards", samples_per_shard=IN_SHARD) as writer:
        for number in range(SAMPLES):
            writer.write(f"{number:04d}", png((number, 20, 30)), "png", f"alt {number}", {})
    return tmp_path / "shards"


def start(shards: Path, server, out: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "openvision.cli.main", "recaption", str(shards), "-o", str(out)]
    return subprocess.Popen(
        [*command, "--captioner", server.url, "--batch-size", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(20))
def test_kill_any_of_four_workers_at_any_moment(moment, shards, tmp_path):
    """Only the shards that the killed worker held are asked for again; nothing is missing and nothing twice."""
    out = tmp_path / "out"
    rng = random.Random(moment)
    with serving(faults=["slow"] * 10_000) as server:
        workers = [start(shards, server, out) for _ in range(4)]
        # From before the first shard to beyond the last one, counted in requests: a machine may be slow.
        wanted = moment * (SAMPLES + 4) // 19
        deadline = time.monotonic() + 300
        while len(server.bodies) < wanted and any(worker.poll() is None for worker in workers):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers did not ask {wanted} times")
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        killed = rng.choice(workers)
        if killed.poll() is None:
            os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        for worker in workers:
            if worker is not killed:
                _, said = worker.communicate(timeout=300)
                assert (worker.returncode, said) == (0, b"")
        last = start(shards, server, out)
        assert last.wait(300) == 0
        again = Counter(body["seed"] for body in server.bodies)
    # A worker holds at most two shards.
    assert sum(count - 1 for count in again.values()) <= 2 * IN_SHARD
    assert max(again.values()) <= 2
    assert len(again) == SAMPLES
    dataset = ShardDataset(out, "recaption")
    assert [sample.synthetic for sample in dataset] == [
        f"a plain image of colour {(i, 20, 30)}" for i in range(SAMPLES)
    ]
    store = LocalStore(out)
    found = [key for name in store.sizes(".captions.tar") for key in read_captions(store, name)]
    assert sorted(found) == [f"{number:04d}" for number in range(SAMPLES)]
    counts = sum((Counter(read_json(path)["counts"]) for path in out.glob("0*.recaption.json")), Counter())
    assert counts["captions"] == SAMPLES
    assert not [path for path in out.iterdir() if path.name.endswith((".tmp", ".link"))]


def test_progress_over_all_workers(shards, tmp_path):
    out = tmp_path / "out"
    with serving() as server:
        endpoint = Endpoint(server.url, parallel=1)
        arguments = str(shards), endpoint, load_prompt("v1"), out, Options(), lambda line: None
        recaption_shards(*arguments, names=[f"{number:06d}.tar" for number in range(3)])
        # Another worker is busy with the fourth shard, a third one died long ago with the fifth.
        lock_path(out, "000003.tar").write_text('{"worker": "elsewhere:7"}')
        lock_path(out, "000004.tar").write_text('{"worker": "dead:1"}')
        os.utime(lock_path(out, "000004.tar"), (0, 0))
        found = read_progress(out)
        own = next(name for name in found.workers if name != "elsewhere:7")
        assert set(found.workers) == {own, "elsewhere:7"}
        assert (found.finished, found.shards, found.workers[own].counts["captions"]) == (3, 12, 15)
        assert found.workers["elsewhere:7"].holds == ("000003.tar",)
        # Nobody who is at work has finished a shard: how long one takes is not known.
        assert found.seconds_left is None
        lock_path(out, "000003.tar").write_text(f'{{"worker": "{own}"}}')
        found = read_progress(out)
        rate = 15 / found.workers[own].seconds
        assert found.rate == pytest.approx(rate)
        assert found.seconds_left == pytest.approx(9 * 5 / rate)
        # 15 captions of 10 tokens read and 8 written.
        prices = Prices(read=1e6, written=2e6)
        assert prices.cost(list(found.workers.values())) == 15 * 10 + 15 * 8 * 2
        assert found.cost_at_the_end(prices) == 4 * (15 * 10 + 15 * 8 * 2)
        table = CliRunner().invoke(app, ["recaption-progress", str(out), "--price-read", "1000000"])
        assert "shards\t3 of 12" in table.output
        assert "cost\t150.00 so far, 600.00 at the end" in table.output
        recaption_shards(*arguments)
        table = CliRunner().invoke(app, ["recaption-progress", str(out)])
        assert "time left\t0 min 00 s" in table.output
    with pytest.raises(OpenVisionError, match="holds no recaption job"):
        read_progress(tmp_path)


def test_parts_share_the_shards_without_talking(shards, tmp_path):
    """Workers of an array, one of them started twice at the same time; then a part that has nothing to do."""
    out = tmp_path / "out"
    found: dict[int, Counter[str]] = {}
    with serving(faults=["slow"] * 10) as server:

        def work(worker: int, part: str) -> None:
            endpoint = Endpoint(server.url, parallel=4)
            arguments = str(shards), endpoint, load_prompt("v1"), out, Options(), lambda line: None
            found[worker] = recaption_shards(*arguments, part=Part.parse(part))

        parts = ["1/5", "2/5", "2/5", "3/5", "4/5", "5/5"]
        workers = [threading.Thread(target=work, args=each) for each in enumerate(parts)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == SAMPLES
        work(6, "20/20")
        assert len(server.bodies) == SAMPLES
    # 12 shards in five parts; of the two equal workers the last one to end has seen all of theirs finished.
    assert [found[worker]["shards"] for worker in (0, 3, 4, 5)] == [3, 2, 2, 2]
    assert max(found[1]["shards"], found[2]["shards"]) == 3
    assert all(found[worker]["shards_missing"] == 0 for worker in (0, 3, 4, 5))
    assert found[6] == {"shards_missing": 0}
    assert len(ShardDataset(out, "recaption")) == SAMPLES


def test_a_part_alone_leaves_the_others(shards, tmp_path):
    out = tmp_path / "out"
    with serving() as server:
        command = ["recaption", str(shards), "--captioner", server.url, "-o", str(out)]
        done = CliRunner().invoke(app, [*command, "--part", "2/5"])
        assert done.exit_code == 0, done.output
        assert [path.name for path in sorted(out.glob("0*.tar")) if path.is_symlink()] == [
            "000001.tar",
            "000006.tar",
            "000011.tar",
        ]
        assert "shards\t3" in done.output
        assert "shards_missing\t0" in done.output
        whole = CliRunner().invoke(app, command)
        assert f"captions\t{SAMPLES}" in whole.output
        assert len(server.bodies) == SAMPLES


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "a/b", "-1/4", "1/4/2", ""])
def test_a_part_that_is_none(part, tmp_path):
    command = ["recaption", str(tmp_path), "--captioner", "http://localhost:1/v1", "-o", str(tmp_path / "out")]
    assert "e.g. 3/16" in str(CliRunner().invoke(app, [*command, f"--part={part}"]).exception)
    both = CliRunner().invoke(app, [*command, "--part", "1/2", "--ray-workers", "2"])
    assert "leave out --part" in str(both.exception)
    assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_is_named(shards, tmp_path, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with serving() as server:
        endpoint = Endpoint(server.url)
        monkeypatch.setattr("openvision.recaption.job.fcntl.flock", refuse)
        with pytest.raises(OpenVisionError, match="out cannot be locked: Function not implemented; choose"):
            recaption_shards(str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), lambda line: None)


def test_the_locks_of_finished_shards_are_empty(shards, tmp_path):
    with serving() as server:
        endpoint = Endpoint(server.url)
        recaption_shards(str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), lambda line: None)
    assert {path.read_text() for path in (tmp_path / "out").glob(".0*.lock")} == {""}


def test_without_ray_one_sentence_names_the_extra(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["recaption", str(shards), "--captioner", "http://localhost:1/v1", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--ray-workers", "2"])
    assert "openvision-encoders[ray]" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_local_ray(shards, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    with serving() as server:
        command = [sys.executable, "-m", "openvision.cli.main", "recaption", str(shards), "-o", str(out)]
        command += ["--captioner", server.url, "--ray-workers", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        assert f"captions\t{SAMPLES}" in done.stdout
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies) == SAMPLES
        # Both actors worked; nothing is left to do.
        assert len(read_progress(out).workers) == 2
        again = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert again.returncode == 0, again.stderr
        assert len(server.bodies) == SAMPLES
        wrong = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True, timeout=500, check=False)
    assert (wrong.returncode, "belongs to another job" in wrong.stderr) == (1, True)
