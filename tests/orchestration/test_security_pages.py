"""Reports whose every text is an attack, opened in headless Chromium: nothing that came from data is run, nothing
of it becomes an element, and it is read as it was written."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestration import report
from orchestration.results import TrialRecord
from orchestration.studies.report import write_study_report
from tests.orchestration.browser import CHROMIUM, dom_of
from tests.orchestration.study_results import capacity, lr_ratio
from tests.orchestration.test_orch_report import audited, candidate, plan, row
from trainers.paths import write_json, write_text

RUN = "document.body.dataset.ran=1"
ATTACKS = (
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload='{RUN}'>",
    f"</pre></table></style></title><iframe srcdoc='<script>parent.{RUN}</script>'>",
    f"<a href=\"javascript:{RUN}\" style='position:fixed;inset:0'>x</a><b>bold</b>",
    f"{{{{constructor.constructor('{RUN}')()}}}}",
    f"\u2028\\u003cscript\\u003e{RUN}//*/-->`+{RUN}+`",
)
ATTACK = " ".join(ATTACKS)
MEANT = ("status", "kind", "mode", "dash", "strategy", "source", "severity", "preset")
"""Keys whose texts are our own words, by which the pages decide; the rest of a file is whatever it is."""
HOVER_AND_CLICK = """<script>addEventListener('load', () => setTimeout(() => {
  for (const plot of document.querySelectorAll('.js-plotly-plot'))
    for (const [curve, trace] of plot.data.entries())
      for (const [point] of (trace.x || []).entries()) {
        try { Plotly.Fx.hover(plot, [{curveNumber: curve, pointNumber: point}]); } catch { continue; }
        const label = plot.querySelector('.hovertext');
        if (label) document.body.append('⟦' + label.textContent + '⟧');
      }
  for (const link of document.querySelectorAll('a')) link.click();
}, 500));</script>"""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def attacked(value: Any, key: str = "") -> Any:
    """A value with the attack behind each of its texts, names of keys excepted."""
    if isinstance(value, dict):
        return {name: attacked(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [attacked(one, key) for one in value]
    return f"{value} {ATTACK}" if isinstance(value, str) and key not in MEANT else value


def sweep_page(folder: Path, change: Callable[[Any], Any]) -> str:
    """A report of three trials with everything in it, its texts changed."""
    retention = {"data": "g", "num_rows": 5, "num_loss_tokens": 3, "num_all_rows": 50}
    facts = plan() | {"data": audited(folder), "retention": retention | {"num_all_loss_tokens": 9}}
    facts["pitfalls"][0] |= {"severity": "warning"}
    packs = {"num_groups": 1, "workers_per_group": 1, "places": 4, "reason": "r", "where": "here"}
    packs |= {"keep_dequantized": True, "groups": {"group-0": {"lost": "RuntimeError: gone"}}}
    found = [("good", 1e-3, "finished"), ("wild", 1e-1, "diverged"), ("dead", 1e-2, "failed")]
    records = [
        TrialRecord(
            name=change(name),
            candidate=candidate(rate) | {"target": change(["attn", "mlp"])},
            status=status,
            reason=change(f"{name} for a reason"),
            rows=tuple(row(seen, 3.0 - seen / 64) | {"retention_loss": 2.0} for seen in (0, 32)),
        )
        for name, rate, status in found
    ]
    resolved = {"config": {"model": "m", "data": "d", "name": "n"}, "versions": {"torch": "2.13"}}
    return report.render(change("run"), change(facts), change(resolved), records, change(packs))


def study_page(folder: Path, results: dict[str, Any]) -> str:
    write_json(folder / "results.json", results)
    write_study_report(folder)
    return (folder / "report.html").read_text()


def pages(folder: Path) -> dict[str, tuple[str, str]]:
    """Kind of page -> the page under attack, and the same without."""
    found = {"sweep": (sweep_page(folder, attacked), sweep_page(folder, lambda value: value))}
    for kind, results in (("lr-ratio", lr_ratio()), ("capacity", capacity())):
        found[kind] = (study_page(folder, attacked(results)), study_page(folder, results))
    return found


@needs_chromium
@pytest.mark.parametrize("kind", ["sweep", "lr-ratio", "capacity"])
def test_report_of_attacks_runs_none_and_is_made_of_the_elements_of_a_harmless_one(kind, tmp_path):
    attack, harmless = pages(tmp_path)[kind]
    elements = []
    for name, page in (("attack", attack), ("harmless", harmless)):
        write_text(tmp_path / f"{name}.html", page + HOVER_AND_CLICK)
        dom = dom_of(tmp_path / f"{name}.html")
        assert "data-ran" not in dom
        labels = [html.unescape(each) for each in re.findall("⟦([^⟧]+)⟧", dom)]
        assert labels  # it was hovered over
        if (
            name == "attack" and kind == "sweep"
        ):  # in a study's, legends as long as these leave no chart
            assert any(ATTACKS[0] in label and ATTACKS[5] in label for label in labels)
        body = re.sub(
            r"<svg.*?</svg>", "", re.sub(r"<style.*?</style>", "", dom, flags=re.S), flags=re.S
        )
        elements.append([e for e in re.findall(r"<([a-z][a-z0-9]*)", body) if e != "br"])
    for element in ("script", "img", "iframe", "a", "b", "pre", "table", "td", "title"):
        assert elements[0].count(element) == elements[1].count(element), element


@needs_chromium
def test_report_of_attacks_would_be_caught_where_one_text_was_not_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestration.page.html.escape", lambda text, quote=True: text)
    write_text(tmp_path / "page.html", sweep_page(tmp_path, attacked))
    assert "data-ran" in dom_of(tmp_path / "page.html")


@pytest.mark.parametrize("kind", ["sweep", "lr-ratio", "capacity"])
def test_report_of_attacks_shows_them_to_the_letter(kind, tmp_path):
    page, _ = pages(tmp_path)[kind]
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    shown = html.unescape(re.sub(r"<[^>]+>", "", markup))
    for attack in ATTACKS:
        assert attack in shown
