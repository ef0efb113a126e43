"""`openvision serve` in a process of its own, with our decoder, and its protocol, batches and bounds."""

import base64
import http.client
import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.files import read_json
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.vision import VisionConfig
from openvision.recaption.captioners.captioner import Answer, LocalCaptioner, Question, Sampling
from openvision.recaption.captioners.decoders import load_decoder
from openvision.recaption.captioners.endpoint import Endpoint
from openvision.recaption.captioners.request_queue import Patience
from openvision.recaption.job import recaption_shards
from openvision.recaption.prompts import load_prompt
from openvision.recaption.serving.server import KEY_VARIABLE, CaptionServer, is_local
from openvision.recaption.shard import Options
from openvision.text.tokenizer import Tokenizer
from openvision.weights.folder import save_folder
from tests.recaption.server import serving
from tests.recaption.test_captioners import native_captioner, noise, png

IMAGES = 40
SOON = Patience(shorten=lambda seconds: 0.001)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """OpenVision 2 with random weights so large that captions depend on the image; of this seed none is empty."""
    torch.manual_seed(11)
    config = OpenVision2Config(
        VisionConfig(width=32, depth=1, mlp_dim=64, heads=2, patch_size=8, image_size=32),
        AutoregressiveDecoderConfig(32, 2, 64, 2, vocab_size=120, caption_length=9, text_positions="learned"),
        keep_ratio=0.5,
    )
    network = OpenVision2(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_folder(folder, network, Tokenizer.train(["a red picture of something green"], 120), "", {})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=IMAGES // 4) as writer:
        for number in range(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.write(f"{number:04d}", buffer.getvalue(), "png", f"alt {number}", {})
    return folder


@pytest.fixture(scope="module")
def served(model) -> Iterator[str]:
    """The address of `openvision serve`."""
    command = [sys.executable, "-m", "openvision.cli.main", "serve", str(model), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("serving tiny at http://127.0.0.1:")
        yield line.split()[3].rstrip(";")
        process.terminate()


def captions_of(url: str, shards: Path, output: Path, model: str | None = None, **options) -> list:
    endpoint = Endpoint(url, model, Sampling(max_tokens=9), parallel=8, patience=SOON)
    # Random captions are bad ones.
    options = Options(on_bad="keep", **{"retries": 0, "language": None} | options)
    recaption_shards(str(shards), endpoint, load_prompt("v1"), output, options, lambda line: None)
    return [sample.synthetic for sample in ShardDataset(output, "recaption")]


def captions_here(model: Path, shards: Path) -> list[str | None]:
    """Captions of the same decoder, asked in this process; an empty one is none."""
    captioner = load_decoder(str(model), torch.device("cpu"), Sampling(max_tokens=9), 32)
    questions = [Question("", sample.key, 0, sample.image, "png", "", 0) for sample in ShardDataset(shards)]
    return [answer.text.strip() or None for _, answer in captioner.answers(questions)]


def test_a_job_against_our_decoder_in_another_process(served, model, shards, tmp_path):
    found = captions_of(served, shards, tmp_path / "out")
    assert found == captions_here(model, shards)
    assert len(set(found)) > IMAGES // 2


def test_no_fault_on_the_way_to_our_decoder_loses_an_image(served, model, shards, tmp_path):
    faults = ["slow", "429", "500", "cut", "garbage", "list", "endless"] * 3
    with serving(upstream=served, faults=faults) as proxy:
        found = captions_of(proxy.url, shards, tmp_path / "out")
        # Every fault but a slow answer is asked for again.
        assert len(proxy.bodies) == IMAGES + len(faults) - faults.count("slow")
        assert found == captions_here(model, shards)
        # What is too long stays too long: it is dropped by name, and the others are captioned.
        proxy.faults.extend(["too_long"] * 2)
        found = captions_of(proxy.url, shards, tmp_path / "long")
    assert (found.count(None), len(found)) == (2, IMAGES)
    reports = [read_json(path)["counts"] for path in (tmp_path / "long").glob("0*.recaption.json")]
    assert sum(counts.get("bad_too_long", 0) for counts in reports) == 2


def test_another_model_behind_the_url_stops_the_job_which_resumes(served, model, shards, tmp_path):
    """The model is exchanged while the job runs: one sentence, and what was finished stays."""
    with pytest.raises(OpenVisionError, match="has no model 'large', only: tiny; correct --model"):
        Endpoint(served, "large")
    endpoint = Endpoint(served, "tiny", Sampling(max_tokens=9), parallel=8, patience=SOON)
    options = Options(on_bad="keep", retries=0, language=None)
    arguments = load_prompt("v1"), tmp_path / "out", options, lambda line: None
    recaption_shards(str(shards), endpoint, *arguments, names=["000000.tar"])
    name = endpoint.name
    endpoint.model = "large"
    changed = pytest.MonkeyPatch()
    with changed.context() as patch:
        patch.setattr(Endpoint, "name", property(lambda self: name))
        with pytest.raises(
            OpenVisionError, match=r"refuses the request \(status 404.*the model 'large' does not exist"
        ):
            recaption_shards(str(shards), endpoint, *arguments)
    endpoint.model = "tiny"
    assert recaption_shards(str(shards), endpoint, *arguments)["captions"] == IMAGES
    assert [sample.synthetic for sample in ShardDataset(tmp_path / "out", "recaption")] == captions_here(model, shards)


@pytest.mark.slow
def test_a_fifth_of_all_requests_fails(served, model, tmp_path):
    rng = np.random.default_rng(1)
    with ShardWriter(tmp_path / "shards", samples_per_shard=100) as writer:
        for number in range(400):
            writer.write(f"{number:04d}", png(tuple(rng.integers(0, 256, 3).tolist())), "png", "", {})
    faults = rng.choice(["", "429", "cut", "500", "garbage"], 4000, p=[0.8, 0.05, 0.05, 0.05, 0.05]).tolist()
    with serving(upstream=served, faults=faults) as proxy:
        found = captions_of(proxy.url, tmp_path / "shards", tmp_path / "out")
    assert found == captions_here(model, tmp_path / "shards")


class Recorder:
    """A captioner that answers with the prompt, and waits where a test holds it."""

    name, can_retry, varies, shards_at_once = "recorder", True, True, 1
    sampling = Sampling()

    def __init__(self, batch_size: int = 2) -> None:
        self.batch_size = batch_size
        self.batches: list[tuple[list[Question], Sampling]] = []
        self.began, self.free = threading.Semaphore(0), threading.Event()
        self.free.set()

    def answers(self, questions) -> Iterator[tuple[Question, Answer]]:
        raise NotImplementedError

    def caption(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        self.batches.append((list(questions), sampling))
        self.began.release()
        assert self.free.wait(60)
        if any(question.prompt == "fail" for question in questions):
            raise RuntimeError("secret detail")
        return [
            Answer("", fault="too_long") if question.prompt == "long" else Answer(question.prompt, False, None, 3, 2)
            for question in questions
        ]


@contextmanager
def running(captioner: LocalCaptioner, **options) -> Iterator[CaptionServer]:
    with CaptionServer(captioner, "one", **options) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def test_an_image_that_is_too_long_is_refused_by_name_and_a_job_goes_on(tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        for key, size in (("a", (40, 20)), ("b", (200, 20)), ("c", (24, 24))):
            writer.write(key, noise(*size), "png", "", {})
    with running(native_captioner()) as server:
        found = captions_of(server.url, tmp_path / "shards", tmp_path / "out")
    assert [text is None for text in found] == [False, True, False]
    counts = read_json(tmp_path / "out/000000.recaption.json")["counts"]
    assert counts["bad_extreme_aspect"] == 1


def asked(server: CaptionServer, body: object, path: str = "/v1/chat/completions", **headers: str):
    """Status, content and headers of a response."""
    parts = urlsplit(server.url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            connection.request("POST", path, data, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def message(prompt: str = "hello", url: str | None = None, **fields: object) -> dict:
    data = url or f"data:image/png;base64,{base64.b64encode(png((1, 2, 3))).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
    return {"model": "one", "messages": [{"role": "user", "content": content}], **fields}


def test_the_protocol():
    captioner = Recorder()
    with running(captioner, most_tokens=50) as server:
        status, content, _ = asked(server, message(temperature=0.5, top_k=9, max_tokens=7, seed=-5))
        assert status == 200
        assert content["choices"] == [
            {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
        ]
        assert content["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        (question,), sampling = captioner.batches.pop()
        assert (question.image, question.seed, question.alt) == (png((1, 2, 3)), -5, "hello")
        assert sampling == Sampling(0.5, 9, 7)
        # Greedy where nothing is said; as long as the server allows; another seed every time.
        for _ in range(2):
            asked(server, message(max_completion_tokens=10**6, top_k=-1, n=1, stream=False, top_p=1))
        (first, greedy), (second, _) = captioner.batches
        assert greedy == Sampling(0.0, 0, 50)
        assert first[0].seed != second[0].seed
        _, listed, _ = asked(server, None, "/v1/models")
        assert [each["id"] for each in listed["data"]] == ["one"]
        assert asked(server, None, "/v1/models/one")[1]["id"] == "one"
        assert asked(server, None, "/v1/models/two")[0] == 404


IMAGE = message()["messages"][0]["content"][0]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"<html>", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        ([], 400, "no JSON object"),
        ({}, 400, "one message"),
        (message(n=2), 400, "n is not supported"),
        (message(n=True), 400, "n is not supported"),
        (message(stream=True), 400, "stream is not supported"),
        (message(top_p=0.9), 400, "top_p is not supported"),
        (message(temperature=3), 400, "from 0 to 2"),
        (message(temperature="hot"), 400, "from 0 to 2"),
        (json.dumps(message()).replace('"model"', '"temperature": NaN, "model"').encode(), 400, "from 0 to 2"),
        (message(max_tokens=0), 400, "max_tokens must be an integer from 1"),
        (message(seed=2**70), 400, "seed must be"),
        (message(top_k=-2), 400, "top_k must be"),
        (message("\ud800"), 400, "lone surrogate"),
        (message(url="http://localhost/secret.png"), 400, "nothing is downloaded"),
        (message(url="file:///etc/passwd"), 400, "nothing is downloaded"),
        (message(url="data:image/png;base64,%%%"), 400, "cannot be decoded"),
        (message(url="data:image/png;base64,aGVsbG8="), 400, "cannot be decoded"),
        ({"messages": [{"role": "user", "content": "hello"}]}, 400, "holds 0 images"),
        ({"messages": [{"role": "user", "content": [IMAGE, IMAGE]}]}, 400, "holds 2 images"),
        ({"messages": [{"role": "system", "content": [IMAGE]}]}, 400, "role user"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "neither a text nor"),
        ({"messages": [{"role": "user", "content": [7]}]}, 400, "neither a text nor"),
        (message() | {"model": "gpt\x1b[2J"}, 404, "does not exist here"),
        (message(prompt="long"), 400, "exceeds the context"),
        (message(prompt="fail"), 500, "the captioner failed: RuntimeError"),
    ],
)
def test_requests_that_are_refused(body, status, said, capfd):
    captioner = Recorder()
    with running(captioner) as server:
        found, content, _ = asked(server, body)
        assert (found, said in content["error"]["message"]) == (status, True), content
        assert "\x1b" not in content["error"]["message"]
        assert "secret detail" not in content["error"]["message"]
        # The server goes on.
        assert asked(server, message())[0] == 200
    assert len(captioner.batches) == (2 if status == 500 or "context" in said else 1)


def test_requests_that_are_no_requests():
    with running(Recorder()) as server:
        assert asked(server, None, "/")[0] == 404
        assert asked(server, None, "/v1/models-of-mine")[0] == 404
        assert asked(server, message(), "/v1/embeddings")[0] == 404
        status, content, headers = asked(server, b"", **{"Content-Length": "99999999999"})
        assert (status, "longer than 32 MiB" in content["error"]["message"]) == (413, True)
        assert headers["Connection"] == "close"
        assert asked(server, b"", **{"Content-Length": "9" * 6000})[0] == 413
        assert asked(server, b"", **{"Content-Length": "-1"})[0] == 411


def test_what_waits_is_decoded_together_by_sampling():
    captioner = Recorder(batch_size=3)
    captioner.free.clear()
    with running(captioner) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(asked, server, message("a"))
        captioner.began.acquire()
        others = []
        for prompt, temperature in [("b", 0), ("c", 1), ("d", 0), ("e", 0), ("f", 0)]:
            others.append(pool.submit(asked, server, message(prompt, temperature=temperature)))
            while len(server.batches._waiting) < len(others):
                pass
        captioner.free.set()
        texts = [each.result()[1]["choices"][0]["message"]["content"] for each in [first, *others]]
    assert texts == list("abcdef")
    batches = [([question.prompt for question in asked], how.temperature) for asked, how in captioner.batches]
    assert batches == [(["a"], 0), (["b", "d", "e"], 0), (["c"], 1), (["f"], 0)]


def test_a_request_that_fails_takes_no_other_with_it():
    captioner = Recorder(batch_size=8)
    captioner.free.clear()
    with running(captioner) as server, ThreadPoolExecutor(4) as pool:
        first = pool.submit(asked, server, message("a"))
        captioner.began.acquire()
        others = [pool.submit(asked, server, message(prompt)) for prompt in ("b", "fail", "c")]
        while len(server.batches._waiting) < 3:
            pass
        captioner.free.set()
        assert [each.result()[0] for each in [first, *others]] == [200, 200, 500, 200]


def test_more_requests_than_places_are_sent_again(shards, tmp_path):
    captioner = Recorder(batch_size=1)
    captioner.free.clear()
    with running(captioner) as server, ThreadPoolExecutor(8) as pool:
        held = [pool.submit(asked, server, message(str(number))) for number in range(4)]
        captioner.began.acquire()
        while len(server.batches._waiting) < 3:
            pass
        status, content, headers = asked(server, message())
        assert (status, content["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "1")
        captioner.free.set()
        assert [each.result()[0] for each in held] == [200] * 4
        # Twice as many at once as there are places: the client is told to wait, and loses nothing.
        found = captions_of(server.url, shards, tmp_path / "out")
    assert len(found) == IMAGES


def test_a_key_is_asked_for_and_never_told(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "sk-served")
    with running(Recorder()) as server:
        for headers in ({}, {"Authorization": "Bearer sk-other"}, {"Authorization": "Bearer sk-serv\xe9"}):
            for body, path in ((message(), "/v1/chat/completions"), (None, "/v1/models")):
                status, content, _ = asked(server, body, path, **headers)
                assert (status, "sk-" in json.dumps(content)) == (401, False)
        assert asked(server, message(), Authorization="Bearer sk-served")[0] == 200
        with pytest.raises(OpenVisionError, match="refuses the key"):
            Endpoint(server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-served")
        assert Endpoint(server.url).model == "one"


def test_who_reaches_an_address():
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [
        *[True] * 3,
        *[False] * 3,
    ]


def test_a_server_that_stops_answers_what_waits():
    captioner = Recorder(batch_size=1)
    captioner.free.clear()
    with ThreadPoolExecutor(3) as pool:
        with running(captioner) as server:
            asking = [pool.submit(asked, server, message(str(number))) for number in range(2)]
            captioner.began.acquire()
            while not server.batches._waiting:
                pass
            threading.Timer(0.1, captioner.free.set).start()
        assert sorted(each.result()[0] for each in asking) == [200, 503]


def test_bad_commands(model):
    def error_of(*arguments: str) -> str:
        return str(CliRunner().invoke(app, ["serve", *arguments]).exception)

    assert "is an endpoint already" in error_of("http://localhost:8000/v1")
    with running(Recorder()) as server:
        assert "cannot be opened" in error_of(str(model), "--port", str(server.server_address[1]))
    assert "runs/nothing" in error_of("runs/nothing")
