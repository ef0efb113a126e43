"""Recaption with Ray Data: each actor loads the captioner once and captions one shard after the other.

Workers outside the cluster may help: which shards are done is in the output folder alone.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openvision.cluster import Cluster, Work, check_ray, run_on_ray
from openvision.data.recap.index import shard_names
from openvision.data.shards.store import join_folder
from openvision.recaption.captioners.captioner import AnyCaptioner
from openvision.recaption.job import count_finished, open_shards, recaption_shards
from openvision.recaption.prompts import Prompt
from openvision.recaption.shard import Options, is_finished


@dataclass(frozen=True)
class _Job:
    shards: str
    load: Callable[[], AnyCaptioner]
    prompt: Prompt
    output: Path
    options: Options
    budget: int | None

    def __call__(self) -> Work:
        """Load the captioner; a shard's line of progress is empty when another worker has it."""
        captioner = self.load()

        def caption(name: str) -> str:
            lines: list[str] = []
            recaption_shards(
                *(self.shards, captioner, self.prompt, self.output, self.options, lines.append),
                names=[name],
                budget=self.budget,
            )
            return "; ".join(lines)

        return caption


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
    check_ray()
    names = shard_names(open_shards(shards, options))
    waiting = [name for name in names if not is_finished(output, name)]
    if not waiting:
        # Nothing to do but to see that it is this job that is done.
        return recaption_shards(shards, load(), prompt, output, options, progress, names=[])
    # Relative paths mean another folder in the working directory of an actor.
    job = _Job(str(join_folder(Path.cwd(), shards)), load, prompt, output.resolve(), options, budget)
    for line in run_on_ray(waiting, job, cluster):
        if line:
            progress(line)
    return count_finished(output, names)
