"""Independent work on a Ray cluster: each actor opens what it needs once, then takes one item after the other.

Which items are done is in the output of the work and nowhere else, as without Ray: when Ray starts a task again, or a
cluster is lost, finished items stay finished.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from openvision.errors import OpenVisionError, require

Work = Callable[[str], str]
"""Does the item of a name; what it returns comes back. An OpenVisionError ends the job."""


@dataclass(frozen=True)
class Cluster:
    """What the actors get."""

    workers: int = 1
    gpus: float = 0.0
    """GPUs of each worker; a fraction shares one."""
    cpus: float = 1.0
    address: str | None = None
    """Of a running cluster, e.g. auto; None starts Ray on this machine."""


class _Actor:
    """One process of the cluster."""

    def __init__(self, open_work: Callable[[], Work]) -> None:
        self.work = open_work()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Do one item; an error comes back as text, which Ray would wrap in a traceback of its own."""
        try:
            return {"done": self.work(row["item"]), "error": ""}
        except OpenVisionError as error:
            return {"done": "", "error": str(error)}


def check_ray() -> None:
    """Raise OpenVisionError unless Ray Data is installed."""
    require("ray", extra="ray")
    require("ray.data", extra="ray")


def run_on_ray(items: Sequence[str], open_work: Callable[[], Work], cluster: Cluster) -> Iterator[str]:
    """What the work returns for each item, as it is done; `open_work` is pickled and called in each actor.

    Raises OpenVisionError without Ray, and with an actor's first error.
    """
    check_ray()
    ray = require("ray", extra="ray")
    started = not ray.is_initialized()
    if started:
        # Without an address Ray joins a cluster that it remembers, and waits for one that is gone.
        ray.init(address=cluster.address or "local", log_to_driver=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"item": item} for item in items]
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Actor,
            fn_constructor_args=(open_work,),
            concurrency=cluster.workers,
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )
        for row in data.iter_rows():
            if row["error"]:
                raise OpenVisionError(row["error"])
            yield row["done"]
    finally:
        if started:
            ray.shutdown()
