"""95 % intervals of any metric: pictures are drawn again, with all their questions, and the metric is read again."""

import math
from collections.abc import Mapping

import numpy as np

from openvision.evaluation.metrics.ranks import wilson_interval
from openvision.multimodal.benchmarks.question import Benchmark, Marks, Question

_RESAMPLES = 1000


def tabulate(benchmark: Benchmark, questions: list[Question], answers: Mapping[str, str]) -> Marks:
    """Mark every question's answer."""
    rows = [benchmark.mark(question, answers[question.id]) for question in questions]
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    names = [question.cluster or str(question.image) for question in questions]
    clusters = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return Marks(columns, np.array([question.group for question in questions]), clusters)


def with_intervals(benchmark: Benchmark, marks: Marks, seed: int = 0) -> dict[str, dict[str, float]]:
    """Every metric as {"value", "low", "high"}: percentiles of a bootstrap over clusters.

    Where all answers are wrong, or all right, resampling knows no spread; the Wilson interval of that many clusters
    stands in. Metrics of which no question was asked are left out.
    """
    values = benchmark.metrics(marks, np.ones(len(marks)))
    clusters = int(marks.clusters.max()) + 1
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=_RESAMPLES)
    samples = [benchmark.metrics(marks, draw[marks.clusters].astype(np.float64)) for draw in draws]
    result = {}
    for name, value in values.items():
        read = np.array([sample[name] for sample in samples])
        read = read[~np.isnan(read)]
        top = benchmark.top.get(name, 100.0)
        if math.isnan(value) or not len(read):
            continue
        if value in (0, top):
            low, high = (top * bound for bound in wilson_interval(clusters if value else 0, clusters))
        else:
            low, high = np.percentile(read, (2.5, 97.5)).tolist()
        result[name] = {"value": value, "low": low, "high": high}
    return result
