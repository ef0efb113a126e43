"""What img2dataset and the release of Recap-DataComp-1B leave on disk, in small: a thousand rows, 925 samples."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

PLACEHOLDER = "e" * 64


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def row(number: int) -> dict:
    """0-799 ordinary, 800-899 dead links, 900-939 without caption, 940-969 placeholder images, 970-989 other pages with
    images 0-19, 990-999 pairs with two captions of one image."""
    image = number - 970 if 970 <= number < 990 else number - number % 2 if number >= 990 else number
    caption = f"A long caption of image {image}."
    special = {5: r"A bottle of CLR\xc2\xae.", 6: "The cafÃ© is open."}
    empty = [None, "", "  "][number % 3] if 900 <= number < 940 else None
    return {
        "url": f"https://example.org/{number}.jpg?size=1",
        "re_caption": f"Statement {number}." if number >= 990 else special.get(image, caption),
        "org_caption": f"alt {number}",
        "sha256": PLACEHOLDER if 940 <= number < 970 else sha(f"image {image}"),
        "key": f"{number:012d}",
        "re_clip_score": 0.5,
        "org_clip_score": 0.25,
        "re_length": 6,
        "org_length": 2,
        "re_gpt4v_score": 4,
        "org_gpt4v_score": 3,
    } | (
        {"re_caption": empty}
        if 900 <= number < 940
        else {"sha256": [None, ""][number - 798]}
        if number in (798, 799)
        else {}
    )


def samples() -> list[tuple[str, str, dict]]:
    """Key, alt-text and json of the samples on disk: those of the rows but the dead links, and 50 of no row."""
    found = []
    for number in [*range(800), *range(900, 970), *range(990, 1000, 2)]:
        source = row(number)
        link = {"url": source["url"], "sha256": source["sha256"] or sha(f"image {number}"), "key": source["key"]}
        if number >= 990:
            link |= {"url": f"https://example.org/moved/{number}", "key": f"moved{number}"}
        found.append((link["key"], source["org_caption"] if number < 990 else "neither", link))
    for number in range(50):
        # Another download: the number of a row, and nothing else of it.
        link = {
            "url": f"https://example.org/new/{number}",
            "sha256": sha(f"new {number}"),
            "key": f"{800 + number:012d}",
        }
        found.append((link["key"], f"new alt {number}", link))
    return found


def write_shards(folder: Path, count: int = 925, per_shard: int = 100) -> None:
    folder.mkdir()
    everything = samples()[:count]
    for first in range(0, len(everything), per_shard):
        with tarfile.open(folder / f"{first // per_shard:06d}.tar", "w") as tar:
            for key, alt, link in everything[first : first + per_shard]:
                meta = link | {"uid": sha(key)[:32], "status": "success", "width": 8}
                for kind, data in (("jpg", f"image {key}"), ("json", json.dumps(meta)), ("txt", alt)):
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size, info.mtime = len(data.encode()), 1_700_000_000
                    tar.addfile(info, io.BytesIO(data.encode()))
        stats = {"count": 120, "successes": 100, "failed_to_download": 18, "failed_to_resize": 2}
        (folder / f"{first // per_shard:06d}_stats.json").write_text(json.dumps(stats))
        # img2dataset's own table beside the shard: not a recaption table, not to be stumbled over.
        parquet.write_table(
            pa.table({"url": ["x"], "status": ["success"]}), folder / f"{first // per_shard:06d}.parquet"
        )


def write_table(folder: Path, rows: list[dict]) -> None:
    folder.mkdir()
    for name, part in (("train-00000-of-00002", rows[:600]), ("train-00001-of-00002", rows[600:])):
        parquet.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=100)
