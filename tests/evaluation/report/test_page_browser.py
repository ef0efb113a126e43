"""The page in a real browser: pictures load, tables sort by a click, nothing is asked of any server.

Chromium runs without a window and prints the page after a script of ours has clicked; `make test-slow` installs it.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from openvision.evaluation.report.comparison_page import build_page
from openvision.evaluation.report.run_page import build_report
from openvision.evaluation.suites.run import run_suite
from openvision.evaluation.suites.suite import load_suite

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROBE = """
<script>
addEventListener("load", async () => {
  const said = { images: 0, broken: [], tables: [], requests: [] };
  document.querySelectorAll("details").forEach(one => one.open = true);
  const images = [...document.images];
  images.forEach(image => image.loading = "eager");
  for (let tries = 0; tries < 50 && !images.every(image => image.complete); tries++) {
    await new Promise(done => setTimeout(done, 100));
  }
  said.images = images.filter(image => image.complete && image.naturalWidth > 0).length;
  said.broken = images.filter(image => !image.naturalWidth).map(image => image.alt);
  const read = (table, column) => [...table.tBodies[0].rows].map(row => row.cells[column].dataset.value);
  for (const table of document.querySelectorAll("table.sortable")) {
    const column = table.tHead.rows[0].cells.length - 1;
    const before = read(table, column);
    table.tHead.rows[0].cells[column].querySelector("button").click();
    const once = read(table, column);
    table.tHead.rows[0].cells[column].querySelector("button").click();
    said.tables.push({ before, once, twice: read(table, column),
                       sort: table.tHead.rows[0].cells[column].getAttribute("aria-sort") });
  }
  const asked = performance.getEntriesByType("resource").map(entry => entry.name);
  said.requests = asked.filter(name => !name.startsWith("data:"));
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
});
</script>
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium here: run `make test-slow`, which installs it")
    return found


def in_browser(browser: str, page: Path, tmp_path: Path) -> dict:
    """What the page does under our script."""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert said, done.stderr[-2000:]
    return json.loads(said.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


def check(said: dict) -> None:
    assert said["broken"] == []
    assert said["images"] > 20
    assert said["requests"] == []
    assert said["tables"]
    for table in said["tables"]:
        assert table["sort"] == "ascending"
        numbers = [[float(value) for value in table[state]] for state in ("once", "twice")]
        assert numbers[0] == sorted(numbers[0], reverse=True)
        assert numbers[1] == sorted(numbers[1])
        assert sorted(table["before"]) == sorted(table["once"]) == sorted(table["twice"])


def test_the_comparison(browser, fake_run, fake_data, tmp_path) -> None:
    (tmp_path / "s.toml").write_text(
        """
        [[evaluate]]
        kind = "zero_shot"
        name = "shapes"
        data = "heldout_compositional"
        label = "category"
        [[evaluate]]
        kind = "retrieval"
        name = "alt"
        data = "heldout_compositional"
        """
    )
    checkpoints = []
    for name in ("first", "second"):
        shutil.copytree(fake_run, tmp_path / name)
        checkpoints.append(str(tmp_path / name / "model"))
    suite = load_suite(str(tmp_path / "s.toml"))
    results = run_suite(checkpoints, suite, fake_data, tmp_path / "out", say=lambda line: None)
    said = in_browser(browser, build_page(results, tmp_path / "out/index.html"), tmp_path)
    check(said)
    # Overview, differences, and one for each evaluator with its classes.
    assert len(said["tables"]) >= 4


def test_the_report_of_a_run(browser, fake_run, fake_data, tmp_path) -> None:
    shutil.copytree(fake_run, tmp_path / "run")
    check(in_browser(browser, build_report(tmp_path / "run", fake_data), tmp_path))
