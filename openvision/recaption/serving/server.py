"""The HTTP server of `openvision serve`: `/v1/models` and `/v1/chat/completions`."""

import hmac
import json
import os
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import unquote

from openvision.errors import OpenVisionError
from openvision.files import JsonObject
from openvision.recaption.captioners.captioner import LocalCaptioner
from openvision.recaption.serving.batches import Batches
from openvision.recaption.serving.chat import (
    RequestError,
    chat_response,
    check_model,
    models_response,
    read_request,
)
from openvision.terminal import echo

KEY_VARIABLE = "OPENVISION_SERVE_KEY"
"""Where it is set, clients must send it; it is read from the environment alone."""
_MOST_BYTES = 32 * 2**20
# Seconds without a byte of a request.
_SILENCE = 60.0
# Open requests for each that is decoded at once: the next batch waits, and a few more.
_OPEN = 4
_RETRY_SECONDS = "1"
_BLOCK = 2**16


class CaptionServer(ThreadingHTTPServer):
    """Serves one captioner until it is closed."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, captioner: LocalCaptioner, name: str, host: str = "127.0.0.1", port: int = 0, most_tokens: int = 512
    ) -> None:
        """`name` is the model's for clients, `port` 0 any free one. Raises OpenVisionError for a port in use."""
        self.name, self.most_tokens = name, most_tokens
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Closed with the server, also where the port cannot be opened.
        self.batches = Batches(captioner, _OPEN * captioner.batch_size)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise OpenVisionError(
                f"{host} port {port} cannot be opened: {error}; give another one with --port or --host"
            ) from error

    @property
    def url(self) -> str:
        """Base address for clients."""
        host, port = self.server_address[:2]
        text = str(host)
        return f"http://{f'[{text}]' if ':' in text else text}:{port}/v1"

    def server_bind(self) -> None:
        """Bind, without looking up the name of this machine, which may take long and is not used."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def server_close(self) -> None:
        """Close the port; requests that wait are refused."""
        super().server_close()
        self.batches.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: CaptionServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "openvision", ""
    timeout = _SILENCE

    def do_GET(self) -> None:
        """`/v1/models`, and `/v1/models/NAME`."""
        self._respond(self._models)

    def do_POST(self) -> None:
        """`/v1/chat/completions`."""
        self._respond(self._complete)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what strangers ask for is not printed."""

    def _models(self) -> JsonObject:
        self._check_key()
        before, models, name = self._page.partition("/v1/models")
        if before or not models or (name and not name.startswith("/")):
            raise _no_page()
        if name:
            check_model(unquote(name[1:]), self.server.name)
            return models_response(self.server.name)["data"][0]
        return models_response(self.server.name)

    def _complete(self) -> JsonObject:
        self._unread = self._body_length()
        self._check_key()
        if self._page != "/v1/chat/completions":
            raise _no_page()
        with self.server.batches.place():
            body = self.rfile.read(self._unread)
            self._unread = 0
            request = read_request(body, self.server.name, self.server.most_tokens)
            return chat_response(self.server.batches.ask(request), self.server.name)

    @property
    def _page(self) -> str:
        return self.path.partition("?")[0].rstrip("/")

    def _body_length(self) -> int:
        text = self.headers["Content-Length"] or ""
        if not text.isdecimal():
            raise RequestError("the request needs a Content-Length", HTTPStatus.LENGTH_REQUIRED)
        # Digits without end are a number too, and take a while.
        if len(text) > len(str(_MOST_BYTES)) or int(text) > _MOST_BYTES:
            message = f"the request is longer than {_MOST_BYTES // 2**20} MiB"
            raise RequestError(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return int(text)

    def _check_key(self) -> None:
        sent = (self.headers["Authorization"] or "").encode("utf-8", "surrogateescape")
        if self.server.key and not hmac.compare_digest(sent, f"Bearer {self.server.key}".encode()):
            raise RequestError("the key is missing or wrong", HTTPStatus.UNAUTHORIZED, "invalid_api_key")

    def _respond(self, act: Callable[[], JsonObject]) -> None:
        # None: how much is left of the request is not known, or too much.
        self._unread: int | None = None if self.command == "POST" else 0
        status, content = HTTPStatus.OK.value, dict[str, object]()
        try:
            content = act()
        except RequestError as error:
            status, content = error.status, error.content
        except OSError:
            # The client went away, or said nothing for a minute.
            self.close_connection = True
            return
        # What is a mistake of ours is an answer too, and a line for who runs the server.
        except Exception as error:
            echo(f"a request failed: {type(error).__name__}: {error}", err=True)
            wrong = RequestError("the server failed", HTTPStatus.INTERNAL_SERVER_ERROR, "server_failed")
            status, content = wrong.status, wrong.content
        self._discard()
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            self.send_header("Retry-After", _RETRY_SECONDS)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _discard(self) -> None:
        """Read what is left of a request that was refused: a client that still sends would not see the answer."""
        if self._unread is None:
            self.close_connection = True
            return
        while self._unread > 0 and (data := self.rfile.read(min(self._unread, _BLOCK))):
            self._unread -= len(data)


def _no_page() -> RequestError:
    return RequestError("there is no such page; ask /v1/models or /v1/chat/completions", HTTPStatus.NOT_FOUND)
