"""Benchmarks of multimodal models: scorers with the official metrics, and a runner over local copies.

Each benchmark has a module in `scorers`. `BENCHMARKS` has them by their names on the command line.
"""

from openvision.errors import OpenVisionError
from openvision.multimodal.benchmarks.benchmark import Benchmark, Question
from openvision.multimodal.benchmarks.scorers.chartqa import CHARTQA
from openvision.multimodal.benchmarks.scorers.gqa import GQA
from openvision.multimodal.benchmarks.scorers.mme import MME
from openvision.multimodal.benchmarks.scorers.mmvet import MMVET
from openvision.multimodal.benchmarks.scorers.ocrbench import OCRBENCH
from openvision.multimodal.benchmarks.scorers.pictures import PICTURES
from openvision.multimodal.benchmarks.scorers.pope import POPE
from openvision.multimodal.benchmarks.scorers.scienceqa import SCIENCEQA
from openvision.multimodal.benchmarks.scorers.seed import SEED
from openvision.multimodal.benchmarks.scorers.textvqa import TEXTVQA

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (TEXTVQA, CHARTQA, OCRBENCH, MME, SEED, MMVET, SCIENCEQA, GQA, POPE, PICTURES)
}

__all__ = ["BENCHMARKS", "Benchmark", "Question", "find_benchmark"]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark `name`; raises OpenVisionError that lists all names."""
    if name not in BENCHMARKS:
        raise OpenVisionError(f"unknown benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
