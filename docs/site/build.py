"""`make docs`: the site of the documentation, from docs/ and from the code, with strict links and without a network.

    python docs/site/build.py -o build/docs

Pages are written for GitHub, where people read them too. Here they are copied below the output, with links out of docs/
led to copies inside of the site; the reference is written from the code beside them, and Zensical makes OUT/html.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import tomli_w
from reference import ROOT, pages

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks/results"
CONFIG = Path(__file__).with_name("zensical.toml")
STYLE = CONFIG.with_name("site.css")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
# A list that follows a paragraph without an empty line, which GitHub reads as a list and Python-Markdown does not.
LIST = re.compile(r"^(?!\s*[-*] |\s*[|>]|\s*\d+\. |#)(\S[^\n]*)\n(?=(?:- |1\. ))", re.MULTILINE)


def sources() -> dict[str, Path]:
    """Path of each page in the site -> the file that it is made from."""
    own = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    results = {f"results/{path.name}": path for path in sorted(RESULTS.rglob("*.md"))}
    return {**own, **results, "contributing.md": ROOT / "CONTRIBUTING.md"}


def page_of(path: Path, made: dict[str, Path]) -> str | None:
    """Where the site has a file of the repository; None for one that is no page."""
    if path == ROOT / "README.md":
        return "index.md"
    return next((page for page, source in made.items() if source == path), None)


def convert(page: str, source: Path, made: dict[str, Path], out: Path) -> str:
    """Markdown of a page for the site: links led into it, markers of tests left out, lists set apart."""

    def led(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups(default="")
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        path = (source.parent / target).resolve()
        inside = page_of(path, made)
        if inside is None and path.is_file() and path.is_relative_to(ROOT):
            inside = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
            inside = inside if path.is_relative_to(DOCS) else f"files/{inside}.txt"
            (out / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / inside)
        if inside is None:
            return match.group()  # Zensical says that it leads nowhere.
        return f"{opening}{os.path.relpath(inside, Path(page).parent)}{anchor}{closing}"

    parts = FENCE.split(re.sub(r"^<!-- [^\n]* -->\n", "", source.read_text(encoding="utf-8"), flags=re.MULTILINE))
    return "".join(part if part.startswith("```") else LIST.sub(r"\1\n\n", LINK.sub(led, part)) for part in parts)


def stage(out: Path) -> None:
    """Write the pages and the configuration of the site below `out`."""
    made = sources()
    if out.exists():
        shutil.rmtree(out)
    for page, source in made.items():
        file = out / "pages" / page
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(convert(page, source, made, out / "pages"), encoding="utf-8")
    for name, text in pages().items():
        file = out / "pages/reference" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    shutil.copyfile(STYLE, out / "pages" / STYLE.name)
    config = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    tables = [{title_of(out / "pages" / page): page} for page in made if page.startswith("results/")]
    config["project"]["nav"][-1]["Evidence"].append({"Benchmarks": tables})
    check_navigation(config["project"]["nav"], out / "pages")
    (out / "zensical.toml").write_text(tomli_w.dumps(config), encoding="utf-8")


def title_of(page: Path) -> str:
    """First heading of a page, or its name."""
    found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else page.stem.replace("_", " ")


def listed(navigation: object) -> list[str]:
    """Pages of a navigation, in order."""
    if isinstance(navigation, str):
        return [navigation]
    entries = (
        navigation.values() if isinstance(navigation, dict) else navigation if isinstance(navigation, list) else []
    )
    return [page for entry in entries for page in listed(entry)]


def check_navigation(navigation: object, folder: Path) -> None:
    """Every page is in the navigation, once, and every entry is a page; exits with one sentence otherwise."""
    named = listed(navigation)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    if lost := sorted(there - set(named)):
        sys.exit(f"{', '.join(lost)}: no entry in docs/site/zensical.toml leads there; add one to nav")
    if gone := sorted(set(named) - there):
        sys.exit(f"docs/site/zensical.toml: nav names {', '.join(gone)}, which do not exist; remove the entry")
    if len(named) != len(set(named)):
        sys.exit("docs/site/zensical.toml: nav names a page twice")


def main() -> None:
    """Build the site; exits with the code of Zensical, which counts a warning as an error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build/docs", help="Folder for pages and site.")
    out: Path = parser.parse_args().out.resolve()
    stage(out)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=out, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    html = out / "html"
    print(f"{html / 'index.html'}: open it in a browser; the search needs a server: python -m http.server -d {html}")


if __name__ == "__main__":
    main()
