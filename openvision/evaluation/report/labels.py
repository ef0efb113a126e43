"""Metrics as people read them: their names and their values in %."""

from collections.abc import Sequence

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "ece": "calibration error",
    "t2i_r1": "text to image R@1",
    "t2i_r5": "R@5",
    "t2i_r10": "R@10",
    "t2i_median": "median rank",
    "i2t_r1": "image to text R@1",
    "i2t_r5": "R@5 ",
    "i2t_r10": "R@10 ",
    "i2t_median": "median rank ",
    "patch_accuracy": "patches right",
    "miou": "mean IoU",
    "caption_loss": "caption loss, nats per token",
    "caption_perplexity": "caption perplexity",
}
_NO_SHARE = ("t2i_median", "i2t_median", "caption_loss", "caption_perplexity")
# Smaller is better.
LESS = ("ece", *_NO_SHARE)


def label(metric: str) -> str:
    """The name of a metric in a table of its evaluator."""
    return METRICS.get(metric, metric.replace("_", " ")).strip()


def full_label(metric: str) -> str:
    """A name of a metric that stands alone."""
    way = {"t2i": "text to image ", "i2t": "image to text "}.get(metric[:3], "")
    return way + label(metric).removeprefix(way)


def shown(metric: str, value: float, bounds: Sequence[float] | None = None) -> str:
    """A value for a table: percent with its interval, a rank or a loss as it is."""
    if metric in _NO_SHARE:
        return f"{value:.4g}"
    text = f"{100 * value:.1f}"
    return f"{text} ({100 * bounds[0]:.1f}-{100 * bounds[1]:.1f})" if bounds else text
