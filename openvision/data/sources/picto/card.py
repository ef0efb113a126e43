"""DATA.md: what lies beside the shards for whoever uses them, with the licence and the author of every source."""

from collections import Counter
from collections.abc import Iterable

from openvision.data.sources.picto.packages import Package
from openvision.data.sources.picto.split import SPLITS


def data_card(
    table: dict[str, Package], size: int, kept: Counter[tuple[str, str]], left_out: dict[str, Counter[str]]
) -> str:
    """The text of DATA.md; `kept` counts pairs by style and split, `left_out` drawings by style and reason."""
    return f"""# picto shards

Drawings at {size} px with alt-texts and captions; photographs at 28 px. Each sample has a `png`, a `txt` (a short and
messy alt-text) and a `json`: `name`, `concept` (the name without skin tones), `style`, `vendor`, `category`, `source`,
`licence`, and `synthetic`, a caption of sentences from names, tags, the style, and what was measured on the picture.

## Pairs
{_table(("style", *SPLITS), _count_rows(kept))}

- train: what is learnt from.
- validation_style: trained concepts by a vendor never trained on. Choices are made on it.
- heldout_style: trained concepts by another such vendor.
- heldout_concepts: emoji of no training style, by every vendor. Their words may occur in other names.
- fashion_mnist: photographs of ten classes, the test part.

The last three are not read before the final report. Of identical pictures one is kept, so none stands on two sides.

## Sources
Every package was fetched under the name and version given and has the SHA-512 given. A picture is under the licence of
its source, also as a shard; CC BY and CC BY-SA ask for the attribution in this table.

{_table(("package", "version", "licence", "attribution", "used for", "SHA-512 starts"), _source_rows(table))}

## Left out
{_table(("style", "reason", "drawings"), _left_out_rows(left_out))}
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(head)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _count_rows(kept: Counter[tuple[str, str]]) -> list[list[str]]:
    styles = list(dict.fromkeys(style for style, _ in kept))
    rows = [[style, *(_number(kept[style, split]) for split in SPLITS)] for style in sorted(styles)]
    totals = [str(sum(kept[style, split] for style in styles)) for split in SPLITS]
    return [*rows, ["all", *totals]]


def _number(count: int) -> str:
    return str(count) if count else ""


def _source_rows(table: dict[str, Package]) -> list[list[str]]:
    return [
        [package.name, package.version, package.licence, package.attribution, package.use, package.sha512[:16]]
        for package in table.values()
    ]


def _left_out_rows(left_out: dict[str, Counter[str]]) -> list[list[str]]:
    return [[style, reason, str(count)] for style, reasons in left_out.items() for reason, count in reasons.items()]
