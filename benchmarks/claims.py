"""Does the recipe pay? Every table of docs/claims.md from one command, on scenes of `openvision data scenes`.

    python benchmarks/claims.py speeds full clip              # on this machine's CPU, a thread for each run
    python benchmarks/claims.py tune full clip                # learning rates, chosen on the validation scenes
    python benchmarks/claims.py table a --seeds 0 1 2
    python benchmarks/claims.py gpu --minutes 8.5 --out OUT   # scenes, tuning, training and rows on one GPU
    python benchmarks/claims.py show benchmarks/results/claims-cpu --picture b docs/images/claims_alt_texts.png

Runs that are compared train for equal seconds (or with `--samples` on equal samples), a process each. On a CPU these
are seconds of processor time by the speeds that `speeds` measured; without them, and on a GPU, each run measures its
speed under the common load first. Rows are written as they finish, into
rows.jsonl beside table-*.md, and the same command makes only those that are missing. Held-out scenes are read by the
suite alone; learning rates come from tuned.json, which `tune` writes, or from `--rate`.

`--smoke` is the same command with tiny towers and few scenes: it proves that everything works and measures nothing.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ablations.rows import SPEEDS, TUNING, Rows, key_of, markdown
from ablations.variants import MEASUREMENTS, PROFILES, TABLES, VARIANTS, costs_as, variant

from openvision.errors import OpenVisionError
from openvision.files import JsonObject, append_lines, atomic_write_bytes, atomic_write_text, make_folder

if TYPE_CHECKING:
    from ablations.budget import Speed
    from ablations.runs import Task

RESULTS = Path(__file__).parent / "results"
TUNED, ROWS = "tuned.json", "rows.jsonl"
# Seconds of a group beside training and measuring its speed: processes and loaders start, and the evaluation.
START_SECONDS, EVALUATION_SECONDS = 40.0, 75.0


class Claims:
    """One command: where it runs, what it has so far, and what it says."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from ablations.schedule import Machine

        name = "smoke" if arguments.smoke else arguments.command if arguments.command == "gpu" else "cpu"
        profile = PROFILES[name]
        self.profile = replace(profile, scenes=arguments.scenes) if arguments.scenes else profile
        self.stored = RESULTS / f"claims-{name}" / TUNED
        self.out: Path = make_folder(arguments.out or RESULTS / f"claims-{name}")
        self.rows = Rows(self.out / ROWS)
        cores = os.cpu_count() or 1
        self.device: str = arguments.device or ("auto" if arguments.command == "gpu" else "cpu")
        workers = arguments.workers
        if workers is None:
            # A core for each run and the others for the loaders; on a CPU a run has one core, and decodes itself.
            workers = max(0, round(cores / arguments.at_once) - 1) if arguments.command == "gpu" else 0
        work = arguments.work or Path("runs") / f"claims-{name}"
        threads = max(1, cores // arguments.at_once)
        self.machine = Machine(_device_name(self.device), arguments.at_once, workers, threads, work)
        self.suite: str = arguments.suite
        self.start: str | None = arguments.start
        self.start_seconds: float | None = arguments.start_seconds
        self.cores = cores
        if self.start_seconds is not None and (self.start is None or not 0 < self.start_seconds < math.inf):
            raise OpenVisionError("--start-seconds is the time of the run behind --start, a number above 0; give both")

    def say(self, message: str) -> None:
        """Print a line and keep it beside the rows."""
        line = f"{time.strftime('%H:%M:%S')} {message}"
        print(line, flush=True)
        append_lines(self.out / "log.txt", line + "\n")

    def check_suite(self) -> None:
        """Raise OpenVisionError for a suite that cannot be read before anything is trained for it."""
        from openvision.evaluation.suites.suite import load_suite

        load_suite(self.suite)

    @property
    def world(self) -> str:
        """Version and number of the scenes."""
        from openvision.data.sources.scenes.scene import VERSION

        return f"scenes{VERSION}-{self.profile.scenes}"

    def data_of(self, name: str) -> tuple[Path, Path, Path]:
        """Scenes that a variant is trained on, scenes that it is measured on, vocabulary; made where missing."""
        from ablations.worlds import make_vocabulary, make_world

        root, world = self.machine.work / self.world, variant(name).world
        worlds = (world, world.with_default_texts)
        data, held_out = (make_world(root, each, self.profile, self.cores) for each in worlds)
        return data, held_out, make_vocabulary(root, variant(name).vocabulary, self.profile, self.cores)

    def tasks(
        self,
        table: str,
        names: Sequence[str],
        seeds: Sequence[int],
        rates: Callable[[str], Sequence[float]],
        seconds: float | None,
        samples: int | None,
        suite: str | None,
    ) -> "list[Task]":
        """Runs of some variants, seed by seed, without those whose rows are there."""
        from ablations.runs import Task

        others = [name for name in names if variant(name).program != "openvision"]
        if self.start is not None and others:
            raise OpenVisionError(f"{others[0]} cannot start from {self.start}; leave out --start, or name --variants")
        found = []
        for seed in seeds:
            for name in names:
                data, held_out, vocabulary = self.data_of(name)
                for rate in rates(name):
                    task = Task(
                        table=table,
                        variant=name,
                        seed=seed,
                        profile=self.profile.name,
                        rate=rate,
                        seconds=seconds,
                        samples=samples,
                        world=self.world,
                        data=str(data),
                        held_out=str(held_out),
                        vocabulary=str(vocabulary),
                        suite=suite,
                        device=self.machine.device,
                        workers=self.machine.workers,
                        evaluation_threads=self.machine.evaluation_threads,
                        folder="",
                        group="",
                        members=(),
                        start=self.start,
                        start_seconds=self.start_seconds,
                        speeds=self.speeds_of(name) if seconds is not None and table != SPEEDS else (),
                    )
                    found.append(replace(task, folder=str(self.machine.work / "runs" / task.name)))
        wanted = {"planned_seconds": seconds, "planned_samples": samples}
        return [task for task in found if key_of({**vars(task), **wanted}) not in self.rows]

    def make(self, tasks: "Sequence[Task]", deadline: float | None) -> bool:
        """Make the runs, group by group; returns whether all are finished."""
        from ablations.schedule import grouped, run_group

        complete = True
        for group in grouped(tasks, self.machine):
            self.say(f"{len(group)} at once: {', '.join(task.name for task in group)}")
            complete &= run_group(group, deadline, self._keep, self.say)
            if deadline is not None and time.monotonic() > deadline:
                return False
        return complete

    def _keep(self, row: JsonObject) -> None:
        self.rows.put(row)
        if "score" not in row:
            return
        took = f"{row['seconds']:.0f} s (planned {row['planned_seconds'] or 0:.0f}), {row['samples']:,} samples"
        self.say(f"{row['variant']} seed {row['seed']} rate {row['rate']:g}: {took}, score {row['score']:.3f}")
        if row["measured"]:
            self.write_table(row["table"])

    def write_table(self, table: str) -> None:
        """Write the Markdown of a table."""
        atomic_write_text(self.out / f"table-{table}.md", markdown(self.rows.of(TABLES.get(table, tuple(VARIANTS)))))

    def tune(self, names: Sequence[str], rates: Sequence[float], seconds: float, deadline: float | None) -> None:
        """Try learning rates on each variant for `seconds` and write down the best of all that were tried so long."""
        tasks = self.tasks(TUNING, names, [0], lambda name: rates, seconds, None, None)
        self.make(tasks, deadline)
        chosen = self.tuned()
        for name in names:
            tried = {
                row["rate"]: row["score"]
                for row in self.rows.serving(TUNING)
                if row["variant"] == name and row["planned_seconds"] == seconds
            }
            if tried:
                # Of equally good ones the lowest: the runs are longer than those it was tried on.
                best = max(sorted(tried), key=lambda rate: tried[rate])
                scores = {f"{rate:g}": round(tried[rate], 4) for rate in sorted(tried)}
                chosen[name] = {"rate": best, "seconds": seconds, "scores": scores}
                edge = ", at the edge of what was tried" if best in (min(tried), max(tried)) else ""
                self.say(f"{name}: learning rate {best:g} of {scores}{edge}")
        atomic_write_text(self.out / TUNED, json.dumps(chosen, indent=1) + "\n")

    def measure(self, names: Sequence[str], rounds: int) -> None:
        """Measure the speed of variants `rounds` times, in turns."""
        rate = self.profile.rates[0]
        self.make(self.tasks(SPEEDS, names, range(rounds), lambda name: (rate,), None, None, None), None)
        for name in names:
            stages = " ".join(f"{speed.rate:.1f}" for speed in self.speeds_of(name))
            self.say(f"{name}: {stages} samples/s")

    def speeds_of(self, name: str) -> "tuple[Speed, ...]":
        """The fastest of the measured speeds of a variant, stage by stage; empty where there are none."""
        from ablations.budget import Speed, fastest

        rows = [
            row
            for row in self.rows.serving(SPEEDS)
            if costs_as(variant(name), variant(row["variant"])) and row["profile"] == self.profile.name
        ]
        return tuple(fastest([[Speed(**each) for each in row["speeds"]] for row in rows])) if rows else ()

    def tuned(self) -> JsonObject:
        """Learning rates that were chosen so far, by variant: the repository's, and those beside the rows."""
        found: JsonObject = {}
        for file in (self.stored, self.out / TUNED):
            found |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def rate_of(self, name: str) -> float:
        """The learning rate of a variant: its own, or that of the variant it is tuned as."""
        chosen, source = self.tuned(), name
        while source not in chosen and variant(source).tuned_as:
            source = variant(source).tuned_as
        if source not in chosen:
            raise OpenVisionError(
                f"{self.out / TUNED} has no learning rate for {source}: run `claims.py tune {source}`, or give --rate"
            )
        return float(chosen[source]["rate"])


def _device_name(device: str) -> str:
    """The device by its type: every run is told the same."""
    from openvision.runtime import resolve_device

    return resolve_device(device).type


def make_table(arguments: argparse.Namespace) -> None:
    """`table`: the rows of one table on this machine."""
    claims = Claims(arguments)
    claims.check_suite()
    names = arguments.variants or TABLES[arguments.table]
    seconds = None if arguments.samples else arguments.seconds
    rates = _rates(claims, arguments.rate)
    tasks = claims.tasks(arguments.table, names, arguments.seeds, rates, seconds, arguments.samples, claims.suite)
    complete = claims.make(tasks, None)
    claims.write_table(arguments.table)
    print((claims.out / f"table-{arguments.table}.md").read_text(encoding="utf-8"))
    if not complete:
        sys.exit("a run failed; the same command makes it again")


def _rates(claims: Claims, given: float | None) -> Callable[[str], Sequence[float]]:
    return (lambda name: (given,)) if given else (lambda name: (claims.rate_of(name),))


def tune(arguments: argparse.Namespace) -> None:
    """`tune`: learning rates by the validation scenes."""
    claims = Claims(arguments)
    claims.tune(arguments.variants, arguments.rates or claims.profile.rates, arguments.seconds, None)


def speeds(arguments: argparse.Namespace) -> None:
    """`speeds`: samples a second of every stage, measured in turns."""
    Claims(arguments).measure(arguments.variants, arguments.rounds)


def gpu(arguments: argparse.Namespace) -> None:
    """`gpu`: all of it on one GPU before `--minutes` have passed."""
    begin = time.monotonic()
    deadline = begin + 60 * arguments.minutes
    claims = Claims(arguments)
    claims.check_suite()
    names, machine = arguments.variants, claims.machine
    for name in names:
        claims.data_of(name)
    claims.say(f"{claims.profile.scenes:,} scenes after {time.monotonic() - begin:.0f} s, {machine}")
    known = claims.tuned()
    sides = [name for name in names if not variant(name).tuned_as and name not in known and arguments.rate is None]
    if sides:
        claims.tune(sides, claims.profile.rates, arguments.tune_seconds, deadline)
    if arguments.only_tune:
        return
    groups = -(-len(names) * len(arguments.seeds) // machine.at_once)
    beside = (START_SECONDS + EVALUATION_SECONDS) * (0.3 if arguments.smoke else 1.0)
    beside += MEASUREMENTS * claims.profile.calibration_seconds
    seconds = arguments.seconds or float(int((deadline - time.monotonic()) / groups - beside))
    if seconds < 1:
        sys.exit(f"{groups} groups do not fit into {arguments.minutes} minutes; give fewer variants or seeds")
    claims.say(f"{groups} groups of {machine.at_once} runs, {seconds:.0f} s of training each")
    rates = _rates(claims, arguments.rate)
    claims.make(claims.tasks("gpu", names, arguments.seeds, rates, seconds, None, claims.suite), deadline)
    claims.write_table("gpu")
    print((claims.out / "table-gpu.md").read_text(encoding="utf-8"))


def show(arguments: argparse.Namespace) -> None:
    """`show`: the tables of a folder of results, made from its rows."""
    rows = Rows(arguments.results / ROWS)
    shown: list[list[JsonObject]] = []
    for table, names in TABLES.items():
        found = rows.of(names)
        # Two tables that share all rows there are say the same.
        if len({row["variant"] for row in found}) > 1 and found not in shown:
            shown.append(found)
            print(f"**{table}**\n\n{markdown(found)}")
    if arguments.picture is not None:
        from ablations.figure import crossing, is_drawn, picture

        table, file = arguments.picture
        if table not in TABLES:
            raise OpenVisionError(f"there is no table {table!r}; choose of {', '.join(TABLES)}")
        drawn = [row for row in rows.of(arguments.variants or TABLES[table]) if is_drawn(row)]
        if not drawn:
            raise OpenVisionError(f"{rows.path} has no rows for the picture of table {table}: equal time, with names")
        atomic_write_bytes(Path(file), (crossing if table == "b" else picture)(drawn))


def run(arguments: argparse.Namespace) -> None:
    """`run`: one run, in a process that the others started."""
    from ablations.runs import Task, run

    run(Task.read(arguments.task))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, help="folder of rows and tables; benchmarks/results/claims-* by default")
    common.add_argument("--work", type=Path, help="folder of scenes and runs; runs/claims-* by default")
    common.add_argument("--suite", default="scenes", help="name or file of the suite that measures")
    common.add_argument("--device", help="the CPU for table and tune, auto for gpu")
    common.add_argument("--workers", type=int, help="decoding processes of each run")
    common.add_argument("--scenes", type=int, help="training scenes")
    common.add_argument("--start", help="model folder that every run starts from; fresh weights by default")
    common.add_argument("--start-seconds", type=float, help="planned seconds of the run that --start comes from")
    common.add_argument("--smoke", action="store_true", help="tiny towers, few scenes")
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    measured.add_argument("--rate", type=float, help="learning rate per 256 samples, instead of the tuned ones")

    one = commands.add_parser("table", parents=[common, measured], help=make_table.__doc__)
    one.add_argument("table", choices=sorted(TABLES))
    one.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), help="instead of all of the table")
    one.add_argument("--seconds", type=float, default=440.0, help="training time of each run")
    one.add_argument("--samples", type=int, help="equal samples instead of equal time")
    one.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    one.set_defaults(call=make_table)

    one = commands.add_parser("speeds", parents=[common], help=speeds.__doc__)
    one.add_argument("variants", nargs="+", choices=sorted(VARIANTS))
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(call=speeds, at_once=1)

    one = commands.add_parser("tune", parents=[common], help=tune.__doc__)
    one.add_argument("variants", nargs="+", choices=sorted(VARIANTS))
    one.add_argument("--rates", type=float, nargs="+", help="learning rates per 256 samples; the profile's by default")
    one.add_argument("--seconds", type=float, default=200.0, help="training time of each run")
    one.add_argument("--at-once", type=int, default=os.cpu_count() or 1)
    one.set_defaults(call=tune)

    one = commands.add_parser("gpu", parents=[common, measured], help=gpu.__doc__)
    one.add_argument("--minutes", type=float, default=8.5, help="when the command has ended")
    one.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=["full", "clip"])
    one.add_argument("--seconds", type=float, help="training time of each run; what fits by default")
    one.add_argument("--tune-seconds", type=float, default=45.0, help="of each learning rate that tuned.json lacks")
    one.add_argument("--only-tune", action="store_true", help="stop when learning rates are chosen")
    one.add_argument("--at-once", type=int, default=6)
    one.set_defaults(call=gpu)

    one = commands.add_parser("show", help=show.__doc__)
    one.add_argument("results", type=Path)
    one.add_argument("--picture", nargs=2, metavar=("TABLE", "FILE"), help="also draw a table as PNG")
    one.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), help="of the picture, instead of all")
    one.set_defaults(call=show)
    one = commands.add_parser("run", help=run.__doc__)
    one.add_argument("task", type=Path)
    one.set_defaults(call=run)
    return parser.parse_args()


def main() -> None:
    """Do what the command line says; an error that a user can correct is one sentence."""
    arguments = parse()
    try:
        arguments.call(arguments)
    except OpenVisionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
