"""Recaption with Ray Data: each actor loads the captioner once and captions one shard after the other.

Which shards are done is in the output folder and nowhere else, as without Ray: when Ray starts a task again, or a
cluster is lost, finished shards stay finished, and workers outside the cluster may help.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openvision.data.recap.index import shard_names
from openvision.data.shards.store import join_folder
from openvision.errors import OpenVisionError, require
from openvision.recaption.captioners.captioner import AnyCaptioner
from openvision.recaption.job import count_finished, open_shards, recaption_shards
from openvision.recaption.prompts import Prompt
from openvision.recaption.shard import Options, is_finished


@dataclass(frozen=True)
class Cluster:
    """What the actors get."""

    workers: int = 1
    gpus: float = 0.0
    """GPUs of each worker; a fraction shares one."""
    cpus: float = 1.0
    address: str | None = None
    """Of a running cluster, e.g. auto; None starts Ray on this machine."""


@dataclass(frozen=True)
class _Job:
    shards: str
    load: Callable[[], AnyCaptioner]
    prompt: Prompt
    output: Path
    options: Options
    budget: int | None


class _Actor:
    """One process of the cluster."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.captioner = job.load()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Caption one shard; its line of progress, empty when another worker has it. An error comes back as text."""
        job, lines = self.job, list[str]()
        try:
            recaption_shards(
                *(job.shards, self.captioner, job.prompt, job.output, job.options, lines.append),
                names=[row["shard"]],
                budget=job.budget,
            )
        except OpenVisionError as error:
            # Ray would wrap it in a traceback of its own.
            return {"line": "", "error": str(error)}
        return {"line": "; ".join(lines), "error": ""}


def recaption_on_ray(
    shards: str,
    load: Callable[[], AnyCaptioner],
    prompt: Prompt,
    output: Path,
    options: Options,
    progress: Callable[[str], None],
    cluster: Cluster,
    budget: int | None = None,
) -> Counter[str]:
    """As `recaption_shards`, on the actors of a Ray cluster; shards and output lie on storage that all of them see.

    `load` makes the captioner, in each actor. Raises OpenVisionError without Ray, and with an actor's first error.
    """
    ray = require("ray", extra="ray")
    require("ray.data", extra="ray")
    names = shard_names(open_shards(shards, options))
    waiting = [{"shard": name} for name in names if not is_finished(output, name)]
    if not waiting:
        # Nothing to do but to see that it is this job that is done.
        return recaption_shards(shards, load(), prompt, output, options, progress, names=[])
    # Relative paths mean another folder in the working directory of an actor.
    job = _Job(str(join_folder(Path.cwd(), shards)), load, prompt, output.resolve(), options, budget)
    started = not ray.is_initialized()
    if started:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        data = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map(
            _Actor,
            fn_constructor_args=(job,),
            concurrency=cluster.workers,
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )
        for row in data.iter_rows():
            if row["error"]:
                raise OpenVisionError(row["error"])
            if row["line"]:
                progress(row["line"])
    finally:
        if started:
            ray.shutdown()
    return count_finished(output, names)
