"""Worker processes that end with the process that started them."""

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """Have this worker end when its parent does, even by kill -9.

    To be called in the worker when it starts. Shared memory of both is then removed by the tracker of Python's
    multiprocessing, which waits for the last of them. Does nothing in a process that is no worker.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def wait() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
