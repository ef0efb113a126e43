"""An OpenAI-compatible endpoint over real HTTP that misbehaves as told: its captions name the colour of the image, or
are those of another server behind it."""

import base64
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class Server(ThreadingHTTPServer):
    """`faults` are used up by the next requests for a caption, `captions` by those for an image of this red value."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        faults: Iterable[str] = (),
        captions: Mapping[int, Iterable[str]] | None = None,
        key: str | None = None,
        lists: bool = True,
        upstream: str | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.key = deque(faults), key
        self.captions = {red: deque(texts) for red, texts in (captions or {}).items()}
        self.lists = lists
        # The URL of the server that answers what is no fault.
        self.upstream = upstream
        self.bodies: list[dict] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that is killed is no fault of this server."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args) -> None: ...

    def answer(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def forward(self, request: urllib.request.Request) -> None:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                self.answer(response.status, response.read())
        except urllib.error.HTTPError as error:
            self.answer(error.code, error.read())

    def refused(self) -> bool:
        wrong = self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}"
        if wrong:
            self.answer(401, {"error": f"bad key {self.headers['Authorization']}"})
        return bool(wrong)

    def do_GET(self) -> None:
        if self.server.upstream:
            self.forward(urllib.request.Request(f"{self.server.upstream}/models"))
        elif not self.server.lists:
            self.answer(404, {"error": "no such page"})
        elif not self.refused():
            self.answer(200, {"data": [{"id": "colours"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.popleft() if self.server.faults else ""
            told = self.server.captions.get(_colour(body)[0]) if self.server.captions and not fault else None
            caption = told.popleft() if told else None
        if self.refused():
            return
        if fault == "429":
            self.answer(429, {}, Retry_After="3")
        elif fault == "500":
            self.answer(500, b"boom")
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "garbage":
            self.answer(200, b"<html>{]")
        elif fault == "list":
            self.answer(200, [])
        elif fault == "endless":
            self.answer(200, b" " * 2**21)
        elif "too_long" in (fault, caption):
            self.answer(400, {"error": "maximum context length is 512 tokens"})
        elif fault == "echo_key":
            # The key begins before the place where messages are cut, and ends behind it.
            self.answer(400, {"error": "x" * 170 + " " + self.headers["Authorization"]})
        elif fault == "key":
            self.answer(401, {"error": "no such key"})
        elif fault == "no_image":
            self.answer(400, {"error": "this model does not support image input"})
        else:
            time.sleep({"slow": 0.4, "half": 0.5}.get(fault, 0))
            if self.server.upstream:
                url, data = f"{self.server.upstream}/chat/completions", json.dumps(body).encode()
                self.forward(urllib.request.Request(url, data, {"Content-Type": "application/json"}))
                return
            text = _caption(body) if caption is None else caption
            usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            self.answer(200, {"choices": [choice], "usage": usage})


def _caption(body: dict) -> str:
    return f"a plain image of colour {_colour(body)}"


def _colour(body: dict) -> tuple[int, ...]:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    colour = image.convert("RGB").getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour


@contextmanager
def serving(**options) -> Iterator[Server]:
    server = Server(**options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
