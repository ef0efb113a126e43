"""Real training processes at little cost: one process imports everything once, and forks whenever one is asked for.

    server = ForkServer(); ranks = server.start("scenarios:train", [{...}, {...}]); server.wait(ranks)

A fork is a process like any other: it has its own threads, sockets and signals and can be killed with -9. Only what it
imports is shared. Run as a script this file is the server; the tests talk to it through its standard input and output.
"""

import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE = 120.0


class ForkServer:
    """The tests' end: starts processes, waits for them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._ask({"ready": True})

    def start(self, function: str, arguments: dict[str, Any], log: Path, env: dict[str, str] | None = None) -> int:
        """Fork a process that calls `module:function(**arguments)`, its output in `log`; returns its number."""
        return int(self._ask({"call": function, "arguments": arguments, "log": str(log), "env": env or {}}))

    def start_ranks(
        self, function: str, arguments: list[dict[str, Any]], folder: Path, env: dict[str, str] | None = None
    ) -> list[int]:
        """Fork one process for each of `arguments`, as torchrun would set them up; logs are `folder`/rank-N.log."""
        common = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        common |= env or {}
        return [
            self.start(
                function, each, folder / f"rank-{rank}.log", {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, each in enumerate(arguments)
        ]

    def wait(self, process: int, seconds: float = PATIENCE) -> int:
        """Exit code of a process, negative for the signal that ended it; it is killed when it does not end."""
        return int(self._ask({"wait": process, "seconds": seconds}))

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())["answer"]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _serve() -> None:
    """The server's end. It starts no thread itself: a fork would lose it."""
    # Answers go to a descriptor of their own: nothing a library prints may come between.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Building an optimizer imports torch._dynamo; saving and sharding import the rest.
    training = "openvision.training"
    for name in ("torch._dynamo", f"{training}.checkpoint.tensors", f"{training}.setup.fsdp", f"{training}.trainer"):
        importlib.import_module(name)
    for line in sys.stdin:
        question = json.loads(line)
        if "call" in question:
            answer: Any = _fork(question)
        elif "wait" in question:
            answer = _wait(question["wait"], question["seconds"])
        else:
            answer = True
        answers.write(json.dumps({"answer": answer}) + "\n")
        answers.flush()


def _fork(question: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(number, target)
    os.environ |= question["env"]
    code = 70
    try:
        module, _, name = question["call"].partition(":")
        code = getattr(_module(module), name)(**question["arguments"]) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _module(name: str) -> Any:
    """A file beside this one, or below tests/, by path: tests are no package."""
    specification = importlib.util.spec_from_file_location(name.replace("/", "_"), HERE.parent / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _wait(process: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(process, 9)
            os.waitpid(process, 0)
            return -9999
        time.sleep(0.01)


if __name__ == "__main__":
    _serve()
