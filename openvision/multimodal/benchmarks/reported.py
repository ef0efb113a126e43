"""What the papers report on the benchmarks (reported.toml): for "ours / reported"."""

from dataclasses import dataclass

from openvision.evaluation.suites.reported import PublishedTable, published_tables


@dataclass(frozen=True)
class PublishedScore:
    """A cell of a published table."""

    table: str
    """Framework and language model, and the paper with its table."""
    model: str
    value: str
    """In the unit of the benchmark: percent, OCRBench points, MME perception/cognition."""


def tables() -> list[PublishedTable]:
    """Every table, with a column for each benchmark; MME has two, `mme.perception` and `mme.cognition`."""
    return published_tables("openvision.multimodal.benchmarks")


def find_reported(benchmark: str, text: str) -> list[PublishedScore]:
    """Rows that report `benchmark` and have `text`, in any case, in table or model."""
    found = []
    for table in tables():
        where = f"{table.title} ({table.source})"
        for model, row in table.rows.items():
            values = [value for column, value in row.items() if column.partition(".")[0] == benchmark]
            if values and text.lower() in f"{where} {model}".lower():
                found.append(PublishedScore(where, model, "/".join(f"{value:g}" for value in values)))
    return found
