"""Recaptioning against a real HTTP server that misbehaves, and by our decoder: no image lost, none twice."""

import base64
import io
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
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
from openvision.data.shards.store import LocalStore, RemoteStore
from openvision.encoding import generate_captions
from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.images.decode import to_rgb_image
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision import OpenVision
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.variants import Sizes
from openvision.models.vision import VisionConfig
from openvision.recaption.captioners.captioner import Sampling
from openvision.recaption.captioners.endpoint import Endpoint
from openvision.recaption.captioners.request_queue import Patience
from openvision.recaption.job import recaption_shards
from openvision.recaption.progress import read_progress
from openvision.recaption.prompts import BUILT_IN, load_prompt
from openvision.recaption.quality import find_fault
from openvision.recaption.shard import Options
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.recaption.clock import ManualClock
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


def ignore(_line: str) -> None: ...


def recaption(shards, server, output, prompt="v1", pauses=None, parallel=32, sampling=None, tries=8, **options):
    noted = [] if pauses is None else pauses

    def shorten(seconds: float) -> float:
        noted.append(seconds)
        return 0.001

    patience = Patience(tries, shorten=shorten)
    endpoint = Endpoint(server.url, sampling=sampling or Sampling(), parallel=parallel, patience=patience)
    return recaption_shards(str(shards), endpoint, load_prompt(prompt), output, Options(**options), ignore)


def captions(folder: Path, key: str = "recaption") -> list:
    dataset = ShardDataset(folder, synthetic_key=key)
    return [dataset[i].synthetic for i in range(len(dataset))]


def test_the_loader_reads_new_and_old_captions_and_the_originals_stay(shards, tmp_path):
    (shards / "000000.captions.tar").write_bytes(captions_tar({"0001": {"other": "kept"}}))
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    with serving() as server:
        counts = recaption(shards, server, tmp_path / "out", prompt="v2")
        assert {body["messages"][0]["content"][1]["text"] for body in server.bodies} == {
            BUILT_IN["v2"].replace("{{ alt }}", f"alt {number}") for number in range(SAMPLES)
        }
        assert len({body["seed"] for body in server.bodies}) == SAMPLES
    tokens = {"tokens_read": 10 * SAMPLES, "tokens_written": 8 * SAMPLES}
    assert counts == {"images": SAMPLES, "captions": SAMPLES, "shards": 3, "shards_missing": 0} | tokens
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
    with serving(captions={3: ["too_long"] * 2}) as server:
        counts = recaption(shards, server, tmp_path / "out")
    assert (counts["bad_too_long"], counts["captions"], counts["retried"]) == (1, SAMPLES - 1, 1)


def test_several_captions_an_image(shards, tmp_path):
    with serving() as server:
        with pytest.raises(OpenVisionError, match="gives equal captions of one image"):
            recaption(shards, server, tmp_path / "out", per_image=2)
        recaption(shards, server, tmp_path / "out", per_image=2, sampling=Sampling(0.9, top_k=40))
        assert len({body["seed"] for body in server.bodies}) == 2 * SAMPLES
        assert {(body["temperature"], body["top_k"]) for body in server.bodies} == {(0.9, 40)}
        seeds = {(body["messages"][0]["content"][0]["image_url"]["url"], body["seed"]) for body in server.bodies}
    report = read_json(tmp_path / "out/000000.recaption.json")
    assert report["counts"] == {"images": 4, "captions": 8, "tokens_read": 80, "tokens_written": 64}
    found = read_captions(LocalStore(tmp_path / "out"), "000000.captions.tar")["0002"]
    assert found["recaption"] == [expected(2)] * 2
    # Every caption says which seed made it, and by whom.
    image = ShardDataset(shards)[2].image
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    assert {(url, seed) for seed in found["recaption_by"]["seeds"]} == {pair for pair in seeds if pair[0] == url}
    assert found["recaption_by"]["captioner"].endswith("temperature 0.9, top 40, 128 tokens")
    assert found["recaption_by"]["prompt_sha256"] == load_prompt("v1").sha256


@pytest.mark.parametrize(("on_bad", "kept"), [("drop", 0), ("keep", 1)])
def test_bad_captions_are_retried_once_then_dropped_or_kept(shards, tmp_path, on_bad, kept):
    sorry = "I'm sorry, but I can't see it."
    with serving(captions={0: ["", "a good caption"], 1: [sorry, sorry]}) as server:
        counts = recaption(shards, server, tmp_path / "out", on_bad=on_bad)
        warm = [body["seed"] for body in server.bodies if body["temperature"] == 0.7]
        assert len(warm) == 2
        assert len({body["seed"] for body in server.bodies}) == SAMPLES + 2
    assert (counts["retried"], counts["bad_refusal"], counts["bad_empty"]) == (2, 1, 0)
    assert counts["captions"] == SAMPLES - 1 + kept
    assert captions(tmp_path / "out")[:2] == ["a good caption", sorry if kept else None]
    origin = read_captions(LocalStore(tmp_path / "out"), "000000.captions.tar")["0000"]["recaption_by"]
    assert origin["seeds"][0] in warm
    assert origin["retries"] == [1]


def test_a_request_that_waits_holds_no_other(shards, tmp_path):
    """The first of three shards waits for Retry-After; all others are asked for in the meantime, one at a time."""
    order: list[str] = []
    with serving(faults=["429"]) as server:
        endpoint = Endpoint(server.url, parallel=1, patience=Patience(shorten=lambda seconds: 0.3))
        recaption_shards(
            str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), lambda line: order.append(line[:6])
        )
        seeds = [body["seed"] for body in server.bodies]
    # A worker holds two shards: the second and then the third would need the first one's end.
    assert order == ["000001", "000000", "000002"] or order == ["000001", "000002", "000000"]
    assert seeds.index(seeds[0], 1) >= 7


@pytest.mark.parametrize("fault", ["key", "no_image"])
def test_what_cannot_go_on_stops_at_once(fault, shards, tmp_path, monkeypatch):
    """Though every other request is to be sent again in a minute."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(faults=["429"] * 6 + [fault] * 6) as server:
        endpoint = Endpoint(server.url, parallel=2, patience=Patience(shorten=lambda seconds: 600))
        errors: list[OpenVisionError] = []

        def run() -> None:
            try:
                recaption_shards(str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), ignore)
            except OpenVisionError as error:
                errors.append(error)

        job = threading.Thread(target=run, daemon=True)
        job.start()
        job.join(60)
    assert not job.is_alive()
    assert ("refuses the key" if fault == "key" else "takes no images") in str(errors[0])
    assert not list((tmp_path / "out").glob("*.tar"))


def test_an_endpoint_that_lists_no_models_is_used_by_name(shards, tmp_path):
    with serving(lists=False) as server:
        with pytest.raises(OpenVisionError, match="lists no models; name one with --model"):
            Endpoint(server.url)
        endpoint = Endpoint(server.url, "colours")
        counts = recaption_shards(str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), ignore)
    assert counts["captions"] == SAMPLES


def test_a_budget_ends_the_job_between_shards(shards, tmp_path):
    # A caption takes 18 tokens, a shard 72.
    with serving() as server:
        endpoint = Endpoint(server.url, parallel=1)
        arguments = str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), ignore
        with pytest.raises(OpenVisionError, match="tokens are used; raise --budget"):
            recaption_shards(*arguments, budget=60)
        done = len(list((tmp_path / "out").glob("0*.recaption.json")))
        # What was begun when the budget was used up was finished.
        assert len(server.bodies) == 4 * done
        assert 1 <= done < 3
        assert recaption_shards(*arguments, budget=10_000)["captions"] == SAMPLES


def test_requests_a_minute_are_limited(shards, tmp_path):
    with serving() as server:
        clock = ManualClock()
        endpoint = Endpoint(server.url, parallel=8, patience=Patience(per_minute=1200, clock=clock))
        recaption_shards(str(shards), endpoint, load_prompt("v1"), tmp_path / "out", Options(), ignore)
        assert len(server.bodies) == SAMPLES
    # The first at once, each other one a twentieth of a second after the one before.
    assert clock.seconds == pytest.approx((SAMPLES - 1) * 0.05)


def test_new_shards_hold_images_texts_and_captions(shards, tmp_path):
    (shards / "000000.captions.tar").write_bytes(captions_tar({"0001": {"other": "kept"}}))
    with serving(captions={0: [""]}) as server:
        recaption(shards, server, tmp_path / "out", form="shards", retries=0)
        server.bodies.clear()
        counts = recaption(shards, server, tmp_path / "out", form="shards", retries=0)
        assert server.bodies == []
    assert counts["captions"] == SAMPLES - 1
    assert not list((tmp_path / "out").glob("*.captions.tar"))
    new, old = ShardDataset(tmp_path / "out", "recaption"), ShardDataset(shards)
    assert [new.key(i) for i in range(SAMPLES)] == [old.key(i) for i in range(SAMPLES)]
    assert [new[i].image for i in range(SAMPLES)] == [old[i].image for i in range(SAMPLES)]
    assert [new[i].alt for i in range(SAMPLES)] == [f"alt {i}" for i in range(SAMPLES)]
    # What was not captioned stays a sample; older captions stay beside the new one.
    assert [new[i].synthetic for i in range(SAMPLES)] == [None, *(expected(i) for i in range(1, SAMPLES))]
    assert (new[1].meta["synthetic"], new[1].meta["other"]) == ("old", "kept")


def test_shards_behind_a_url_become_new_shards(shards, tmp_path):
    url = "memory://recaption/shards"
    remote = RemoteStore(url)
    for path in shards.glob("*.tar"):
        remote.write(path.name, path.read_bytes())
    with serving() as server:
        with pytest.raises(OpenVisionError, match=r"memory://recaption/shards is not a local folder.*--as shards"):
            recaption(url, server, tmp_path / "out")
        with pytest.raises(OpenVisionError, match="has a user name") as caught:
            recaption("https://me:secret@host/shards", server, tmp_path / "out")
        assert "secret" not in str(caught.value)
        assert not (tmp_path / "out").exists()
        counts = recaption(url, server, tmp_path / "out", form="shards")
        assert len(server.bodies) == SAMPLES
    assert (counts["captions"], counts["shards_missing"]) == (SAMPLES, 0)
    assert captions(tmp_path / "out") == [expected(number) for number in range(SAMPLES)]
    assert read_json(tmp_path / "out/recaption.json")["shards"] == url
    assert read_progress(tmp_path / "out").finished == 3


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
    assert find_fault(caption, BUILT_IN["v1"], cut, "en") == fault


@pytest.mark.parametrize(
    ("caption", "is_other"),
    [
        ("Das Bild zeigt eine Katze, die auf einem roten Teppich sitzt.", True),
        ("L'image montre un chat qui est assis sur un tapis rouge dans une pièce avec des fenêtres.", True),
        ("La imagen muestra un gato que está sentado en una alfombra roja con los ojos cerrados y las orejas.", True),
        ("Un gatto è seduto sul tappeto rosso della stanza, con gli occhi chiusi.", True),
        ("图像显示一只猫坐在红色的地毯上。", True),
        ("Кошка сидит на красном ковре.", True),
        ("A poster that says 'La vie est belle' and 'Das Leben ist schön' hangs on the wall of a café.", False),
        ("Two dogs run.", False),
        ("A sign with the Chinese characters 猫 and 狗 on a red wall.", False),
    ],
)
def test_another_language(caption, is_other):
    assert (find_fault(caption, BUILT_IN["v1"], False, "en") == "language") == is_other
    assert find_fault(caption, BUILT_IN["v1"], False, None) is None


def test_templates_are_jinja_in_a_sandbox(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Describe it{% if alt %} ({{ alt | upper }}){% endif %}, way {{ number }}, {{ key }}.")
    prompt = load_prompt(str(path))
    assert prompt.fill("a {{ cat }}", "k", 1) == "Describe it (A {{ CAT }}), way 1, k."
    assert prompt.fill("", "k", 0) == "Describe it, way 0, k."
    # Workers of a cluster get it.
    assert pickle.loads(pickle.dumps(prompt)).fill("a", "k", 2) == "Describe it (A), way 2, k."
    # What stands in an alt-text is never part of a template.
    assert load_prompt("v2").fill("{{ 7 * 7 }}").endswith("it as: {{ 7 * 7 }}")
    for text, message in [
        ("{{ alt.__class__.__mro__ }}", "unsafe"),
        ("{{ caption }}", "'caption' is undefined"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ alt + 1 }}", "its variables are alt, key, number"),
        ("about {alt}", "write {{ alt }}"),
        (" ", "is empty"),
    ]:
        path.write_text(text)
        with pytest.raises(OpenVisionError, match=re.escape(message)):
            load_prompt(str(path))


def test_errors_name_the_remedy_and_never_the_key(shards, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(OpenVisionError, match="does not answer after 2 tries"):
        Endpoint(url, patience=Patience(2, shorten=lambda seconds: 0))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving(key="sk-other") as server:
        with pytest.raises(OpenVisionError, match="refuses the key") as caught:
            Endpoint(server.url)
        assert "secret" not in str(caught.value)
    with serving(faults=["no_image"], key="sk-secret") as server:
        with pytest.raises(OpenVisionError, match="takes no images"):
            recaption(shards, server, tmp_path / "out", parallel=1)
        with pytest.raises(OpenVisionError, match="has no model 'gpt', only: colours"):
            Endpoint(server.url, "gpt")
        assert not list((tmp_path / "out").glob("*.tar"))
        recaption(shards, server, tmp_path / "out")
        with pytest.raises(OpenVisionError, match="belongs to another job: its seed is 0, not 1"):
            recaption(shards, server, tmp_path / "out", seed=1)
        with pytest.raises(OpenVisionError, match="holds no recaption job"):
            recaption(shards, server, shards.parent)
        for url in (f"{server.url}?api-key=sk-secret", f"{server.url}#sk-secret", "http://[sk-secret"):
            with pytest.raises(OpenVisionError, match="the endpoint") as caught:
                Endpoint(url)
            assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(OpenVisionError, match="OPENAI_API_KEY holds characters") as caught:
        Endpoint(url="http://localhost:1/v1")
    assert "secret" not in str(caught.value)
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_a_key_is_taken_out_before_a_message_is_cut(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-many-letters")
    with serving(faults=["echo_key"]) as server, pytest.raises(OpenVisionError, match="refuses the request") as caught:
        recaption(shards, server, tmp_path / "out", parallel=1)
    assert "sk-s" not in str(caught.value)


@pytest.mark.parametrize("fault", ["refusal", "too_long"])
def test_a_shard_without_a_usable_caption_is_not_finished(fault, shards, tmp_path):
    text = "I'm sorry, but I can't see it." if fault == "refusal" else fault
    told = {number: [text] * 2 for number in range(4)}
    with serving(captions=told) as server, pytest.raises(OpenVisionError, match=f"none of 4 images .*bad_{fault} 4"):
        recaption(shards, server, tmp_path / "out")
    assert not (tmp_path / "out/000000.tar").is_symlink()


def test_a_shard_without_images_is_refused(shards, tmp_path):
    (shards / "000001.tar").write_bytes(captions_tar({"a": {"b": "c"}}))
    with serving() as server, pytest.raises(OpenVisionError, match="holds no image that can be read"):
        recaption(shards, server, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["000000.captions.tar", "000000.tar"]


def test_the_first_of_two_workers_is_not_taken_for_a_foreign_folder(shards, tmp_path, monkeypatch):
    """Its lock appears while the other one looks at the folder."""
    out, look = tmp_path / "out", Path.iterdir
    out.mkdir()

    def first_worker_begins(folder):
        if folder == out:
            (out / ".job.lock").touch()
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", first_worker_begins)
    with serving() as server:
        assert recaption(shards, server, out)["captions"] == SAMPLES


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
        counts = recaption(shards, server, out)
        assert len(server.bodies) == SAMPLES - 4 * len(finished)
    assert counts["captions"] == SAMPLES
    assert captions(out) == [expected(number) for number in range(SAMPLES)]


def test_our_decoder(shards, tmp_path):
    torch.manual_seed(0)
    shape: Sizes = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
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
    # All captions of a random model are cut.
    assert "retried\t12" in done.output
    again = CliRunner().invoke(app, [*arguments, "--retries", "0", "-o", str(tmp_path / "greedy")])
    assert "retried" not in again.output
    out = tmp_path / "greedy"
    assert all(captions(out))
    image = tmp_path / "one.png"
    image.write_bytes(ShardDataset(shards)[5].image)
    alone = CliRunner().invoke(app, ["caption", str(image), "--model", str(model)]).output
    assert captions(out)[5]
    assert captions(out)[5] == alone.rstrip("\n").partition("\t")[2]
    refused = CliRunner().invoke(app, [*arguments, "--per-image", "2"])
    assert "gives equal captions of one image" in str(refused.exception)


def test_the_decoder_of_version_1_reads_the_alt_text(shards, tiny_run, tmp_path):
    out = tmp_path / "out"
    arguments = ["recaption", str(shards), "--captioner", str(tiny_run), "-o", str(out), "--on-bad", "keep"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    encoder = openvision.load(tiny_run)
    assert isinstance(encoder.model, OpenVision)
    dataset = ShardDataset(shards)
    pictures = encoder.preprocess_all([to_rgb_image(dataset[i].image) for i in range(4)])
    alts = [f"alt {i}" for i in range(4)]
    alone = generate_captions(encoder.model, encoder.tokenizer, pictures, alts)
    assert [text or "" for text in captions(out)[:4]] == alone
