"""report.html and results.csv of studies, from results.json as the studies write it; opened in Chromium."""

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestration.studies.report import write_study_report
from tests.orchestration.study_results import capacity, lr_ratio, nothing_yet, points_of, unfinished
from trainers.paths import write_json

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WIDTHS = (1280, 420)


@pytest.fixture
def write(tmp_path):
    """Writes a study's page and returns its text."""

    def written(results: dict) -> str:
        write_json(tmp_path / "results.json", results)
        write_study_report(tmp_path)
        return (tmp_path / "report.html").read_text()

    return written


def markup(text: str) -> str:
    return re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def words(text: str) -> str:
    """What a reader sees, without tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", markup(text)))


def test_study_report_of_hostile_names_shows_them_as_text(write):
    text = write(lr_ratio())
    assert "<h1>lr ratio &amp; &lt;script&gt;alert(1)&lt;/script&gt;</h1>" in text
    for part in ("<script>alert", "<i>alpha", "<ratio>", "step 17 <b>"):
        assert part not in text
    for part in ("r16 <i>alpha</i> 8", "the <ratio> is biased", "train_loss nan at step 17 <b>"):
        assert part in words(text)


def test_study_report_is_one_file_with_the_script_of_the_charts_once(write):
    text = write(lr_ratio())
    assert text.count("plotly.js v") == 1
    assert not re.search(r"""(src|href)=["'](?!data:)""", markup(text))
    assert text.count('class="plotly-graph-div"') == 2


def test_study_report_calls_a_range_of_seeds_no_interval(write):
    claim = {"name": "2 bits/parameter", "arm": "r1", "predicted": 2.0, "measured": 0.5, "low": 0.4}
    claim |= {"high": 0.6, "status": "undecided", "sentence": "half a bit"}
    text = words(write(capacity() | {"claims": [claim]}))
    assert "least and most of the seeds" in text
    assert "95% interval" not in text
    assert "95% interval" in words(write(lr_ratio()))


def test_study_report_of_settled_arms_shows_verdict_intervals_and_claims(write):
    text = words(write(lr_ratio()))
    for part in (
        "contradicted",
        "2.1 (95%: 1.7 to 2.7) times FullFT's",
        "What would decide it: The same at hidden 640",
        "2.62e-3 to 4.25e-3",  # 3.4e-3 / 1.3 and * 1.25
        "1.36e-3 to above 6.80e-3",  # the grid ends before the tolerance does
        "within 1.0% of the best",
        "1.719 to 2.75",
        "1 of 3",
        "1,312,000",
        "3.6200",
        "AdamW, no weight decay",
        "2 cores of an Intel Xeon",
        "torch 2.13.0",
        "tenfold study lr-ratio --preset laptop",
        "Regret of the priors",
        "0.31",
    ):
        assert part in text


def test_study_report_of_an_unsettled_arm_gives_the_reason_and_no_rate(write):
    text = words(write(lr_ratio()))
    assert "r16 <i>alpha</i> 8: its best rate lies beside a diverged one" in text
    assert (
        "8.00e-3" not in text
    )  # the rate that a fit would have had; the grid is at 1e-2 * 10^(k/4)


def test_study_report_lists_every_run_with_its_reason_in_a_folded_table(write):
    results = lr_ratio()
    folded = re.search(r"<details>.*?</details>", write(results), flags=re.DOTALL)
    assert folded
    num_diverged = len(points_of(results, "diverged"))
    assert num_diverged == folded[0].count("train_loss nan at step 17") > 0
    assert folded[0].count("<tr") == 1 + 4 * 11 * 3  # arms, rates, seeds


def test_study_report_of_an_unfinished_study_says_so_first(write):
    text = words(write(unfinished()))
    assert "42 of 66 runs have ended" in text  # 2 arms of 33 runs; 12 of each are not there
    assert text.index("unfinished") < text.index("undecided") < text.index("Loss by learning rate")
    assert "1 failed run not drawn. 24 unfinished runs not drawn." in text
    assert "unfinished" not in words(write(capacity()))


def test_study_report_before_any_run_has_tables_and_no_chart(write, tmp_path):
    text = write(nothing_yet())
    assert "plotly" not in markup(text)
    assert "Loss by learning rate" not in text
    assert "0 of 66 runs have ended" in words(text)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 66


def test_study_report_without_arms_draws_its_figures_alone(write):
    text = write(capacity())
    assert re.findall(r"<figcaption>(.*?)<", text) == [
        "Bits stored as the load grows",
        "Bits a parameter",
    ]
    assert "<details>" not in text


def test_study_report_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_study_report(tmp_path)


def test_study_csv_has_one_row_a_run_with_the_arm(write, tmp_path):
    results = lr_ratio()
    results["arms"][1]["points"][0]["reason"] = 'a "quote", a comma\nand a line'
    write(results)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = (
        "arm method lora_rank lora_alpha target global_batch_size trained_params learning_rate seed "
        "status reason eval_loss base_loss examples steps loss_tokens seconds peak_bytes trial"
    )
    assert " ".join(rows[0]) == columns
    assert len(rows) == 132
    first, source = rows[33], results["arms"][1]["points"][0]
    assert (first["arm"], first["target"], first["lora_rank"]) == ("r4 alpha 32", "attn+mlp", "4")
    assert float(first["eval_loss"]) == source["eval_loss"]
    assert first["reason"] == source["reason"]
    assert {row["eval_loss"] for row in rows if row["status"] == "diverged"} == {""}


def test_study_csv_without_arms_has_the_rows_of_all_tables(write, tmp_path):
    write(capacity())
    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "table,rank,stored bits,bound",
        'Stored,1,"2,560",',
        'Stored,4,"10,240",',
        'Stored,16,"40,960",',
        "Bound,1,,9",
    ]


PROBE = """<script>
for (const each of document.querySelectorAll('details')) each.open = true;
addEventListener('load', () => setTimeout(() => parent.postMessage({
  width: innerWidth, scroll: document.documentElement.scrollWidth,
  charts: [...document.querySelectorAll('.js-plotly-plot')].map(plot => ({
    points: plot.querySelectorAll('.scatterlayer path.point').length,
    lines: plot.querySelectorAll('.scatterlayer path.js-line').length,
    inside: plot.querySelector('.main-svg').getBoundingClientRect().right <= innerWidth })),
}, '*'), 500));</script>"""


def opened(folder: Path, *, dark: bool) -> tuple[dict[int, dict], str]:
    """What Chromium drew of the page by its width, and its log. In frames, since a window of a headless
    Chromium is at least 500 pixels wide."""
    text = (folder / "report.html").read_text()
    (folder / "probed.html").write_text(text + PROBE)
    frames = "".join(
        f'<iframe src="probed.html" width="{w}" height="900"></iframe>' for w in WIDTHS
    )
    keep = (
        "<script>onmessage = m => document.body.append('@' + JSON.stringify(m.data) + '@')</script>"
    )
    (folder / "frames.html").write_text(f"<body>{keep}{frames}")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-sync", "--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={folder / 'chrome'}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=8000", "--dump-dom", "--window-size=1800,2000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [*command, (folder / "frames.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    seen = [json.loads(html.unescape(each)) for each in re.findall(r"@(\{.*?\})@", done.stdout)]
    return {each["width"]: each for each in seen}, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("results", "dark", "num_points"),
    [
        # every run, and three marks of each of the three fits; ratios and laws
        (lr_ratio(), False, [132 + 9, 6]),
        (lr_ratio(), True, [132 + 9, 6]),
        (unfinished(), False, [41, 6]),
        (capacity(), False, [0, 3]),  # lines alone; one of four values is missing
    ],
)
def test_study_report_in_chromium_draws_every_chart_and_overflows_at_no_width(
    write, tmp_path, results, dark, num_points
):
    write(results)
    seen, log = opened(tmp_path, dark=dark)
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert set(seen) == set(WIDTHS)
    for width, page in seen.items():
        assert page["scroll"] <= width
        assert [chart["points"] for chart in page["charts"]] == num_points
        assert all(chart["inside"] for chart in page["charts"])
    if results["kind"] == "capacity":
        assert seen[420]["charts"][0]["lines"] == 6  # three lines and their bands
