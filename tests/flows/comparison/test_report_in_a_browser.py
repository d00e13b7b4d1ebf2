"""The page as a browser shows it: plotly is unpacked and draws, the table answers, nothing is asked
of a network.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from foldstack.flows.comparison.report import write_report
from foldstack.flows.comparison.result import Comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CLICKS = """<script>
addEventListener("load", () => {
  const head = [...document.querySelectorAll("th")].find((each) => each.textContent === "x dense");
  head.click();
  head.click();
  [...document.querySelectorAll(".tools button")].find((b) => b.textContent === "30 %").click();
});
</script></body>"""


def shown(page: Path, profile: Path) -> str:
    """The page's elements after its scripts, in a browser that can reach nothing."""
    assert CHROMIUM is not None
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
        "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_pictures_are_drawn_and_the_table_sorts_and_filters(
    comparison: Comparison, tmp_path: Path
) -> None:
    page = write_report(comparison, tmp_path, ranking=None, config="", origin={})
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    dom = shown(page, tmp_path / "profile")
    assert dom.count('class="plot drawn"') == 2
    assert dom.count('class="main-svg"') >= 2
    assert "cannot be told apart" in dom
    rows = re.findall(
        r'<tr class="[^"]*" data-size="([^"]*)"[^>]*?( hidden="")?>\s*<td[^>]*>([^<]+)', dom
    )
    assert [label for _, hidden, label in rows if not hidden] == [
        "shortgpt 0.30", "modegpt 0.30", "svd_llm 0.30", "mka 0.30",
    ]  # fmt: skip
    assert len(rows) == 7
