"""The command line without its imports: one process imports everything once, and forks for every command.

    with Preloaded(folder): subprocess.run([folder / "openvision", "data", "verify", "shards"])

`openvision` in `folder` is a program that hands its arguments, folder, environment and streams to the server, and exits
with the code of the fork; `openvision -c PROGRAM` runs Python instead of a command. A fork is a fresh process in
everything but its imports, which take seconds each. Run as a script this file is the server.
"""

import importlib
import json
import os
import select
import socket
import subprocess
import sys
import traceback
from pathlib import Path

# What the commands of the documentation import.
MODULES = (
    *("torch._dynamo", "matplotlib.pyplot", "transformers", "openvision.cli.app", "openvision.training.trainer"),
    *("openvision.training.setup.fsdp", "openvision.evaluation.suites.run", "openvision.evaluation.report.run_page"),
    *("openvision.inference.embed", "openvision.multimodal.training.run", "openvision.weights.export.onnx"),
)
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
server.sendall(request)
code = server.recv(1)
# A process that was killed answers nothing.
sys.exit(code[0] if code else 137)
"""


class Preloaded:
    """The tests' end: starts the server, and writes a program `openvision` into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> "Preloaded":
        address = str(self.folder / "socket")
        self._server = subprocess.Popen(
            [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        program = self.folder / "openvision"
        program.write_text(CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def _serve(address: str) -> None:
    """The server's end. It starts no thread itself: a fork would lose it."""
    for name in MODULES:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        # Standard input ends with the tests, also where they are killed.
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _run(connection)
            connection.close()
            _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _run(connection: socket.socket) -> None:
    """Be the command until it ends."""
    from openvision.cli.main import main

    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as reading:
        arguments, folder, environment = json.loads(reading.read(int.from_bytes(size, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    sys.argv = ["openvision", *arguments]
    code: object = 0
    try:
        if arguments[:1] == ["-c"]:
            exec(arguments[1], {"__name__": "__main__"})
        else:
            main()
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    connection.sendall(bytes([code if isinstance(code, int) else int(code is not None)]))
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1])
