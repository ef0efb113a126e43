"""Recaptioning against a real HTTP server that misbehaves, and by our decoder: no image lost, none twice."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import openvision
from openvision.cli.main import app
from openvision.data.recap.write import captions_tar, read_captions
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.data.shards.store import LocalStore
from openvision.encoding import generate_captions
from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.images.decode import to_rgb_image
from openvision.models.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.vision import VisionConfig
from openvision.recaption.endpoint import Endpoint
from openvision.recaption.job import Options, recaption_shards
from openvision.recaption.prompts import BUILT_IN, load_prompt
from openvision.recaption.quality import find_fault
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.recaption.server import serving

SAMPLES = 12


def colour(number: int) -> tuple[int, int, int]:
    return (number, 20, 30)


def expected(number: int) -> str:
    return f"a plain image of colour {colour(number)}"


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of four plain images."""
    with ShardWriter(tmp_path / "shards", samples_per_shard=4) as writer:
        for number in range(SAMPLES):
            buffer = io.BytesIO()
            Image.new("RGB", (24, 24), colour(number)).save(buffer, "PNG")
            writer.write(f"{number:04d}", buffer.getvalue(), "png", f"alt {number}", {"synthetic": "old"})
    return tmp_path / "shards"


def recaption(shards, server, output, prompt="v1", pauses=None, **options):
    endpoint = Endpoint(server.url, sleep=(pauses if pauses is not None else []).append)
    return recaption_shards(str(shards), endpoint, load_prompt(prompt), output, Options(**options), lambda line: None)


def captions(folder: Path, key: str = "recaption") -> list:
    dataset = ShardDataset(folder, synthetic_key=key)
    return [dataset[i].synthetic for i in range(len(dataset))]


def test_the_loader_reads_new_and_old_captions_and_the_originals_stay(shards, tmp_path):
    (shards / "000000.captions.tar").write_bytes(captions_tar({"0001": {"other": "kept"}}))
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    with serving() as server:
        counts = recaption(shards, server, tmp_path / "out", prompt="v2")
        assert {body["messages"][0]["content"][1]["text"] for body in server.bodies} == {
            BUILT_IN["v2"].replace("{alt}", f"alt {number}") for number in range(SAMPLES)
        }
        assert len({body["seed"] for body in server.bodies}) == SAMPLES
    assert counts == {"images": SAMPLES, "captions": SAMPLES, "shards": 3, "shards_missing": 0}
    assert captions(tmp_path / "out") == [expected(number) for number in range(SAMPLES)]
    assert captions(tmp_path / "out", "other")[1] == "kept"
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    manifest = read_json(tmp_path / "out/recaption.json")
    assert manifest["captioner"].startswith("colours at http://127.0.0.1")
    assert (manifest["prompt_sha256"], manifest["seed"]) == (load_prompt("v2").sha256, 0)


def test_shards_of_several_folders_become_one_folder(shards, tmp_path):
    (tmp_path / "more").mkdir()
    (shards / "000002.tar").rename(tmp_path / "more/0.tar")
    with serving() as server:
        counts = recaption(f"{shards}/{{000000..000001}}.tar::{tmp_path}/more/0.tar", server, tmp_path / "out")
    assert (counts["captions"], counts["shards"]) == (SAMPLES, 3)
    assert sorted(captions(tmp_path / "out")) == sorted(expected(number) for number in range(SAMPLES))


def test_no_fault_of_the_endpoint_loses_an_image(shards, tmp_path):
    faults = ["429", "500", "cut", "garbage", "list", "endless", "slow", "429", "cut"]
    pauses: list[float] = []
    with serving(faults=faults) as server:
        counts = recaption(shards, server, tmp_path / "out", pauses=pauses)
        assert len(server.bodies) == SAMPLES + len(faults) - 1
    assert counts["captions"] == SAMPLES
    assert captions(tmp_path / "out") == [expected(number) for number in range(SAMPLES)]
    assert pauses.count(3.0) == 2
    assert len(pauses) == len(faults) - 1


def test_what_stays_too_long_is_counted_and_the_others_are_captioned(shards, tmp_path):
    with serving(faults=["too_long", "too_long"]) as server:
        counts = recaption(shards, server, tmp_path / "out", batch_size=1)
    assert (counts["bad_too_long"], counts["captions"], counts["retried"]) == (1, SAMPLES - 1, 1)


def test_several_captions_an_image(shards, tmp_path):
    with serving() as server:
        recaption(shards, server, tmp_path / "out", per_image=2)
        assert len({body["seed"] for body in server.bodies}) == 2 * SAMPLES
    report = read_json(tmp_path / "out/000000.recaption.json")
    assert report["counts"] == {"images": 4, "captions": 8}
    assert read_captions(LocalStore(tmp_path / "out"), "000000.captions.tar")["0002"]["recaption"] == [expected(2)] * 2


@pytest.mark.parametrize(("on_bad", "kept"), [("drop", 0), ("keep", 1)])
def test_bad_captions_are_retried_once_then_dropped_or_kept(shards, tmp_path, on_bad, kept):
    sorry = "I'm sorry, but I can't see it."
    with serving(captions=["", "a good caption", sorry, sorry]) as server:
        counts = recaption(shards, server, tmp_path / "out", batch_size=1, on_bad=on_bad)
        seeds = [body["seed"] for body in server.bodies[:2]]
        assert seeds[0] != seeds[1]
        assert [body["temperature"] for body in server.bodies[:2]] == [0.0, 0.7]
    assert (counts["retried"], counts["bad_refusal"], counts["bad_empty"]) == (2, 1, 0)
    assert counts["captions"] == SAMPLES - 1 + kept
    assert captions(tmp_path / "out")[:2] == ["a good caption", sorry if kept else None]


@pytest.mark.parametrize(
    ("caption", "cut", "fault"),
    [
        (" . ", False, "empty"),
        ("I\u2019m sorry, I can't help.", False, "refusal"),
        ("Please generate a detailed caption of this image. A cat.", False, "prompt_echo"),
        ("Here is a detailed description of the image: a cat", False, "boilerplate"),
        ("a cat " + "on the red mat " * 5, False, "looping"),
        ("very very very very very very large", False, "looping"),
        ("A cat sits on", True, "cut"),
        ("A cat sits on a mat. The mat is red, the cat is black.", False, None),
        ("Sorry! is printed on a red card.", False, None),
    ],
)
def test_faults_of_captions(caption, cut, fault):
    assert find_fault(caption, BUILT_IN["v1"], cut) == fault


def test_errors_name_the_remedy_and_never_the_key(shards, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(OpenVisionError, match="does not answer after 2 tries"):
        Endpoint(url, tries=2, sleep=lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(key="sk-other") as server:
        with pytest.raises(OpenVisionError, match="refuses the key") as caught:
            Endpoint(server.url)
        assert "secret" not in str(caught.value)
    with serving(faults=["no_image"], key="sk-secret") as server:
        with pytest.raises(OpenVisionError, match="takes no images"):
            recaption(shards, server, tmp_path / "out", batch_size=1)
        with pytest.raises(OpenVisionError, match="has no model 'gpt', only: colours"):
            Endpoint(server.url, "gpt")
        assert not list((tmp_path / "out").glob("*.tar"))
        recaption(shards, server, tmp_path / "out")
        with pytest.raises(OpenVisionError, match="belongs to another job: its seed is 0, not 1"):
            recaption(shards, server, tmp_path / "out", seed=1)
        with pytest.raises(OpenVisionError, match="holds no recaption job"):
            recaption(shards, server, shards.parent)
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_key_is_taken_out_before_a_message_is_cut(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-many-letters")
    with serving(faults=["echo_key"]) as server, pytest.raises(OpenVisionError, match="refuses the request") as caught:
        recaption(shards, server, tmp_path / "out", batch_size=1)
    assert "sk-s" not in str(caught.value)


@pytest.mark.parametrize("fault", ["refusal", "too_long"])
def test_a_shard_without_a_usable_caption_is_not_finished(fault, shards, tmp_path):
    told = {"captions": ["I'm sorry, but I can't see it."] * 8} if fault == "refusal" else {"faults": ["too_long"] * 8}
    with serving(**told) as server, pytest.raises(OpenVisionError, match=f"none of 4 images .*bad_{fault} 4"):
        recaption(shards, server, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_shard_without_images_is_refused(shards, tmp_path):
    (shards / "000001.tar").write_bytes(captions_tar({"a": {"b": "c"}}))
    with serving() as server, pytest.raises(OpenVisionError, match="holds no image that can be read"):
        recaption(shards, server, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["000000.captions.tar", "000000.tar"]


def test_kill_two_workers_and_resume(shards, tmp_path):
    """Workers share the shards; what a killed one held is done by the next, and nothing finished is done again."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "openvision.cli.main", "recaption", str(shards), "-o", str(out)]
    with serving(faults=["slow"] * 1000) as server:
        arguments = [*command, "--captioner", server.url, "--batch-size", "1"]
        workers = [subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(2)]
        deadline = time.monotonic() + 60
        while not (out / "000000.tar").is_symlink() and time.monotonic() < deadline:
            time.sleep(0.02)
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
        finished = sorted(path.name for path in out.glob("*.tar") if path.is_symlink())
        assert 0 < len(finished) < 3
        # While both ran, none of the shards was asked for twice.
        assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
        server.faults.clear()
        server.bodies.clear()
        recaption_endpoint = Endpoint(server.url)
        counts = recaption_shards(
            str(shards), recaption_endpoint, load_prompt("v1"), out, Options(batch_size=1), lambda line: None
        )
        assert len(server.bodies) == SAMPLES - 4 * len(finished)
    assert counts["captions"] == SAMPLES
    assert captions(out) == [expected(number) for number in range(SAMPLES)]


def test_our_decoder(shards, tmp_path):
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    config = OpenVision2Config(
        VisionConfig(**shape, patch_size=8, image_size=32),
        AutoregressiveDecoderConfig(32, 2, 64, 2, vocab_size=120, caption_length=9, text_positions="learned"),
        keep_ratio=0.5,
    )
    model = tmp_path / "model"
    save_folder(model, OpenVision2(config), Tokenizer.train(["a red picture of something green"], 120), "", {})
    out = tmp_path / "out"
    arguments = ["recaption", str(shards), "--captioner", str(model), "-o", str(out), "--on-bad", "keep"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "retried" not in done.output
    image = tmp_path / "one.png"
    image.write_bytes(ShardDataset(shards)[5].image)
    alone = CliRunner().invoke(app, ["caption", str(image), "--model", str(model)]).output
    assert (captions(out)[5] or "") == alone.rstrip("\n").partition("\t")[2]
    refused = CliRunner().invoke(app, [*arguments, "--per-image", "2"])
    assert "gives one caption an image" in str(refused.exception)


def test_the_decoder_of_version_1_reads_the_alt_text(shards, tiny_run, tmp_path):
    out = tmp_path / "out"
    arguments = ["recaption", str(shards), "--captioner", str(tiny_run), "-o", str(out), "--on-bad", "keep"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    encoder = openvision.load(tiny_run)
    dataset = ShardDataset(shards)
    pictures = encoder.preprocess_all([to_rgb_image(dataset[i].image) for i in range(4)])
    alts = [f"alt {i}" for i in range(4)]
    alone = generate_captions(encoder.model, encoder.tokenizer, pictures, alts)
    assert [text or "" for text in captions(out)[:4]] == alone
