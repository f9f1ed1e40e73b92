"""report.html from a run's files, opened in headless Chromium."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.report import render, write_report
from tests.orchestration.browser import CHROMIUM, num_printed_pages, opened
from tests.orchestration.sweep_records import grid_records, record
from tests.orchestration.sweeps import candidate_dict
from trainers.data import DataSpec, audit_data
from trainers.paths import (
    RunPaths,
    read_json_lines,
    read_state,
    write_json_lines,
    write_state,
)


def candidate(learning_rate: float, lora_rank: int = 4) -> dict:
    return candidate_dict(learning_rate=learning_rate, lora_rank=lora_rank, target=["attn", "mlp"])


def row(examples: int, eval_loss: float) -> dict:
    return {
        "examples": examples,
        "steps": examples // 16,
        "eval_loss": eval_loss,
        "eval_bits_per_byte": eval_loss / 2,
        "seconds": examples / 10,
    }


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunPaths:
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    run = RunPaths(tmp_path / "a<b>&c")
    trials = {
        "good": (candidate(1e-3), "finished", "", [row(0, 3.0), row(32, 2.5), row(64, 2.25)]),
        "worse": (
            candidate(1e-4),
            "stopped",
            "stopped by its scheduler",
            [row(0, 3.0), row(32, 2.9)],
        ),
        "wild": (
            candidate(1e-1),
            "diverged",
            "train_loss nan at step 3",
            [row(0, 3.0), row(32, 1.0)],
        ),
        "dead": (candidate(1e-2), "failed", "ValueError: <script>alert(1)</script>", []),
    }
    for name, (values, status, reason, rows) in trials.items():
        paths = run.trial(name)
        write_state(paths.config, {"candidate": values})
        write_state(paths.status, {"status": status, "reason": reason, "examples": 0, "steps": 0})
        write_json_lines(paths.metrics, rows)
    write_state(
        run.resolved, {"config": {"model": "m", "data": "d"}, "versions": {"torch": "2.13.0"}}
    )
    write_state(run.plan, plan())
    return run


def plan() -> dict:
    small = {
        "candidate": candidate(1e-3, 1),
        "adapter_bits": 20_000,
        "rule": "capacity",
        "numbers": {"lora_rank": 1, "adapter_bits": 20_000, "dataset_bits": 50_000},
        "reason": "rank 1 is too small",
    }
    return {
        "method": "sft",
        "model": {"name": "m", "num_params": 2_000_000},
        "dataset_tokens": 50_000,
        "dataset_bits": 50_000,
        "capacity": {
            "source": "doctrine",
            "bits_per_token": 1,
            "doctrine_bits": 50_000,
            "measured": None,
        },
        "data": None,
        "seq_len": 1024,
        "retention": None,
        "defaults": [{"key": "lora_alpha", "value": "32", "source": "LoRA Without Regret"}],
        "candidates": [{"candidate": candidate(1e-3), "adapter_bits": 80_000}],
        "discarded": [small],
        "cut_ranks": [{"target": ["attn"], "lora_ranks": [1, 2], "sufficient_rank": 3}],
        "pitfalls": [{"symptom": "slow", "evidence": "10 steps", "fix": "more epochs"}],
    }


def test_write_report_names_the_best_the_failed_and_the_discarded(run):
    write_report(run)
    text = run.report.read_text()
    assert "Best: rank 4, learning_rate 1.00e-3, batch 16" in text
    for part in (
        "2.2500",
        "train_loss nan at step 3",
        "rank 1 is too small",
        ">50,000 bits</td>",
        ">20,000 bits</td>",
        "10 steps",
        "lora_alpha",
        "lora_rank 1, 2 on attn",
    ):
        assert part in text
    assert "<script>alert(1)" not in text  # a reason is text, not markup
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']https?://""", markup)  # self-contained
    assert "<script src" not in text


def test_write_report_names_variants_with_their_scale_and_how_to_train_the_best_again(run):
    names = [folder.name for folder in run.trials.iterdir()]
    assert "variant</th>" not in written(run)
    for name in names:
        path = run.trial(name).config
        config = read_state(path)
        write_state(path, config | {"candidate": config["candidate"] | {"variant": "rslora"}})
    text = written(run)
    assert "Best: rank 4, variant rslora, learning_rate 1.00e-3" in text
    assert "variant: rslora" in text  # best.yaml
    for cell in ("<td>rslora</td>", ">16</td>", ">1.60e-02</td>"):  # 32 / sqrt(4), and times 1e-3
        assert cell in text


def written(run) -> str:
    write_report(run)
    return run.report.read_text()


def test_write_report_tells_the_packs_of_warm_workers_and_that_solo_had_none(run):
    write_report(run)
    assert "Engine solo" in run.report.read_text()
    packs = {"num_groups": 2, "workers_per_group": 1, "places": 4, "reason": "4 fill <a> forward"}
    groups = {
        "group-0": {"device": "CPU X", "max_tokens": 1024, "loaded_in_s": 3.21},
        "group-1": {"lost": "RuntimeError: no <memory>"},
    }
    write_state(run.packs, packs | {"keep_dequantized": True, "groups": groups})
    write_report(run)
    text = run.report.read_text()
    for part in (
        "2 group(s) of 1 worker(s), up to 4 adapters each: 4 fill &lt;a&gt; forward",
        "kept dequantized",
        "CPU X",
        "1,024",
        "3.2",
        "RuntimeError: no &lt;memory&gt;",
    ):
        assert part in text
    assert "Engine solo" not in text


def retained(run: RunPaths) -> None:
    """The same trials with a retention set, which one of them destroys."""
    losses = {"good": [2.0, 2.1, 2.25], "worse": [2.0, 2.0], "wild": [2.0, None]}
    for name, each in losses.items():
        path = run.trial(name).metrics
        rows = [
            old | {"retention_loss": loss}
            for old, loss in zip(read_json_lines(path), each, strict=True)
        ]
        write_json_lines(path, rows)
    facts = {"data": "general.jsonl", "num_rows": 5, "num_loss_tokens": 32_000}
    facts |= {"num_all_rows": 50, "num_all_loss_tokens": 320_000}
    write_state(run.plan, plan() | {"data": audited(run.root), "retention": facts})


def audited(folder) -> dict:
    """The audit of three rows, one of them empty, as a plan holds it."""
    rows = [{"prompt": "a", "completion": completion} for completion in ("b", "c", "")]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec(data=str(path), eval=str(path))
    return audit_data(spec).to_dict() | {"data": "rows.jsonl"}


def test_write_report_tells_what_was_forgotten_only_where_it_was_measured(run):
    write_report(run)
    assert "retention" not in re.sub(r"<script.*?</script>", "", run.report.read_text(), flags=re.S)
    retained(run)
    write_report(run)
    text = run.report.read_text()
    for part in (
        "2.2500 (+0.2500)",
        "2.0000 (+0.0000)",
        "not finite",
        "2.0000 for the untouched base",
        "general.jsonl: 5 of 50 rows, 32,000 of 320,000 loss-bearing tokens",
        "Retention: loss on general text",
        "6: completion 6",
        "3 trained, 3 held out",
        "<td>empty completions</td><td>2</td>",
    ):
        assert part in text


def test_write_report_tells_measured_bits_beside_the_doctrines(run):
    measured = {
        "bits_per_token": {"value": 2.5, "low": 2.25, "high": 2.75},
        "bits_per_byte": {"value": 0.75, "low": 0.7, "high": 0.8},
        "num_rows": 40,
        "num_loss_tokens": 3_000,
        "num_train_rows": 400,
        "quantization": "nf4",
        "dtype": "fp32",
        "device": "CPU X",
    }
    capacity = {"source": "measured", "bits_per_token": 2.5, "doctrine_bits": 20_000}
    write_state(
        run.plan,
        plan() | {"dataset_tokens": 20_000, "capacity": capacity | {"measured": measured}},
    )
    write_report(run)
    text = run.report.read_text()
    for part in (
        "20,000 loss-bearing tokens count for 50,000 bits",
        "2.500 (95%: 2.250 to 2.750) bits per loss-bearing token",
        "0.750 (95%: 0.700 to 0.800) bits/byte",
        "40 of 400 training rows (3,000 tokens, nf4, fp32, CPU X)",
        "1 bit/token gives 20,000 bits",
        "by the doctrine: 20,000",
        "dataset bits (measured)",
    ):
        assert part in html.unescape(text)


def test_write_report_without_a_usable_trial_says_so(run):
    for name in ("good", "worse"):
        write_state(
            run.trial(name).status,
            {"status": "diverged", "reason": "inf", "examples": 0, "steps": 0},
        )
    write_report(run)
    assert "No trial ended with a usable score" in run.report.read_text()


COLOURS = """<script>addEventListener('load', () => setTimeout(() => {
  const [page, tick] = [document.body, document.querySelector('.chart .xtick text')].map(getComputedStyle);
  document.body.append('⟦' + page.backgroundColor + ' ' + tick.fill + '⟧');
}, 500));</script>"""


def grid_page(folder) -> Path:
    """A page with every kind of chart: 3 ranks x 7 learning rates x 2 batches, retention, a trial without a row."""
    records = [*grid_records(), record(2e-3, None, status="failed", reason="RuntimeError: lost")]
    records[0] = replace(
        records[0], rows=tuple(row | {"retention_loss": 2.0} for row in records[0].rows)
    )
    facts = {"config": {"model": "m", "data": "d"}, "versions": {}}
    page = folder / "page.html"
    page.write_text(render("grid", plan(), facts, records) + COLOURS)
    return page


def charts_of(dom: str) -> list[str]:
    """What was drawn of each chart."""
    drawn = re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)
    return re.findall(r"<figure.*?</figure>", drawn, flags=re.DOTALL)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_write_report_in_chromium_draws_every_chart_without_an_error(tmp_path, dark):
    dom, errors = opened(grid_page(tmp_path), dark=dark)
    assert not errors
    charts = charts_of(dom)
    # Learning rates, rank, batch, capacity, learning curves, retention.
    assert len(charts) == 6
    for chart in charts:
        assert chart.count('<svg class="main-svg"') >= 2
        assert 'class="point"' in chart
    by_rate, by_rank, by_batch, _, curves, retention = charts
    for label in ("rank 1, batch 16", "rank 64, batch 32", "diverged", "stopped early"):
        assert label in by_rate
    # One curve for each trial that has rows.
    assert len(re.findall(r'class="trace scatter', curves)) == 42
    assert [chart.count('class="point"') for chart in (by_rank, by_batch)] == [36 + 3, 36 + 2]
    assert ">the untouched base<" in retention
    (page, tick) = re.findall(r"rgb\((\d+), (?:\d+), (?:\d+)\)", dom[dom.rindex("⟦") :])
    assert (int(page) < 40, int(tick) > 200) == (dark, dark)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_write_report_prints_charts_in_pairs_and_names_of_trials_on_few_lines(tmp_path):
    assert (
        num_printed_pages(grid_page(tmp_path)) <= 10
    )  # 15 with a chart a sheet and a name of 20 lines
