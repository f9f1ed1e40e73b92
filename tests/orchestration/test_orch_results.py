"""Results from a folder tree alone, written here as a worker would leave it."""

import json
import math
import zlib
from dataclasses import replace

import pytest

from orchestration.results import best_trial, mark_ended, read_trial, read_trials
from orchestration.run import tokenizer_files
from orchestration.sweep import finish
from trainers.data import DataSpec
from trainers.integrity import check_folder, seal_folder
from trainers.paths import RunPaths, read_state, write_state

NAN, INF = math.nan, math.inf


@pytest.fixture
def run(tmp_path) -> RunPaths:
    (tmp_path / "run" / "trials").mkdir(parents=True)
    return RunPaths(tmp_path / "run")


def write_trial(run: RunPaths, name: str, losses: list[float], status: str | None = "finished"):
    """A trial whose rows have these eval losses; the first row is the untouched base (step 0)."""
    folder = run.root / "trials" / name
    folder.mkdir()
    write_state(folder / "config.json", {"candidate": {"lora_rank": 4}})
    rows = [
        {"examples": 16 * step, "steps": step, "eval_loss": loss, "eval_bits_per_byte": loss / 2}
        for step, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(map(line_of, rows)))
    if status is not None:
        write_state(
            folder / "status.json", {"status": status, "reason": "why", "examples": 0, "steps": 0}
        )


def line_of(row: dict) -> str:
    """A row of metrics.jsonl, also with numbers that we would not write."""
    text = json.dumps(row)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def best_name(run: RunPaths) -> str | None:
    best = best_trial(read_trials(run))
    return best.name if best else None


def test_best_trial_skips_the_diverged_failed_and_unfinished_whatever_they_scored(run):
    write_trial(run, "a-diverged", [3.0, 0.1], "diverged")
    write_trial(run, "b-failed", [3.0, 0.2], "failed")
    write_trial(run, "c-unfinished", [3.0, 0.3], None)
    write_trial(run, "d-finished", [3.0, 2.0])
    write_trial(run, "e-stopped", [3.0, 1.5], "stopped")
    assert best_name(run) == "e-stopped"


def test_best_trial_nan_first_does_not_win(run):
    # Field case C01: any comparison with NaN is false.
    for name, loss in (("a", NAN), ("b", 1.0), ("c", 2.0)):
        write_trial(run, name, [3.0, loss])
    assert best_name(run) == "b"


def test_best_trial_of_rows_that_are_not_finite_is_none(run):
    write_trial(run, "a", [3.0, NAN])
    write_trial(run, "b", [3.0, INF])
    write_trial(run, "c", [3.0, 1.0], "diverged")
    assert best_name(run) is None


def test_best_trial_of_no_trials_is_none(run):
    assert read_trials(run) == []
    assert best_trial([]) is None


def test_best_row_within_a_trial_is_the_lowest_not_the_last(run):
    # Field case C05.
    write_trial(run, "a", [9.0, 3.0, 1.0, 2.0])
    best = read_trial(run.trial("a")).best
    assert (best["eval_loss"], best["steps"], best["examples"]) == (1.0, 2, 32)


def test_best_row_of_a_nan_is_skipped(run):
    write_trial(run, "a", [9.0, NAN, 2.0, NAN])
    assert read_trial(run.trial("a")).best["steps"] == 2


def test_best_row_is_never_the_untouched_base(run):
    write_trial(run, "a", [1.0, 3.0, 2.0])
    record = read_trial(run.trial("a"))
    assert (record.best["eval_loss"], record.base_loss) == (2.0, 1.0)
    write_trial(run, "b", [1.0])
    only_base = read_trial(run.trial("b"))
    assert (only_base.best, only_base.base_loss) == (None, 1.0)
    assert best_name(run) == "a"


def test_best_row_of_equal_losses_is_the_first(run):
    write_trial(run, "a", [9.0, 2.0, 2.0])
    assert read_trial(run.trial("a")).best["steps"] == 1


def test_read_trials_order_is_usable_by_score_then_the_rest(run):
    write_trial(run, "z", [3.0, 1.0])
    write_trial(run, "y", [3.0, 2.0], "stopped")
    write_trial(run, "x", [3.0, 2.0])  # a tie is ordered by name
    write_trial(run, "w", [3.0])  # usable, without a score
    write_trial(run, "b", [3.0, 0.5], "failed")
    write_trial(run, "a", [3.0, 0.7], "diverged")
    assert [record.name for record in read_trials(run)] == ["z", "x", "y", "w", "b", "a"]


def test_read_trials_folder_without_config_is_no_trial(run):
    write_trial(run, "a", [3.0, 1.0])
    (run.trials / "not-a-trial").mkdir()
    assert [record.name for record in read_trials(run)] == ["a"]


def test_read_trial_without_status_or_rows_is_unfinished(run):
    write_trial(run, "a", [], None)
    (run.trials / "a" / "metrics.jsonl").unlink()
    record = read_trial(run.trial("a"))
    assert (record.status, record.rows, record.best, record.base_loss) == (
        "unfinished",
        (),
        None,
        None,
    )


def test_mark_ended_writes_where_the_trial_stood(run):
    write_trial(run, "a", [3.0, 2.0, 1.0], None)
    mark_ended(run.trial("a"), "stopped", "stopped by its scheduler")
    assert read_state(run.trial("a").status) == {
        "status": "stopped",
        "reason": "stopped by its scheduler",
        "examples": 32,
        "steps": 2,
    }


def test_mark_ended_of_a_trial_without_rows_is_at_zero(run):
    write_trial(run, "a", [], None)
    mark_ended(run.trial("a"), "failed", "out of memory")
    status = json.loads(run.trial("a").status.read_text())
    assert (status["examples"], status["steps"]) == (0, 0)


def test_mark_ended_does_not_overwrite_what_the_worker_wrote(run):
    write_trial(run, "a", [3.0, 2.0], "diverged")
    before = run.trial("a").status.read_bytes()
    mark_ended(run.trial("a"), "stopped", "stopped by its scheduler")
    assert run.trial("a").status.read_bytes() == before
    assert read_trial(run.trial("a")).status == "diverged"


def test_best_adapter_stands_beside_the_tokenizer_and_template_that_it_was_trained_with(
    run, tmp_path
):
    write_trial(run, "good", [3.0, 2.0])
    write_state(run.resolved, {"config": {"model": "models/base", "revision": None}})
    (run.trial("good").best).mkdir()
    (run.trial("good").best / "adapter_config.json").write_text('{"r": 4}')
    seal_folder(run.trial("good").best)
    model, given = tmp_path / "model", tmp_path / "mine.jinja"
    model.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "chat_template.json", "config.json"):
        (model / name).write_text(f"the model's {name}")
    given.write_text("mine")
    own = DataSpec(data="rows.jsonl", model=str(model))
    finish(run, tokenizer_files(own), pytest.fail)
    names = ["adapter_config.json", "chat_template.jinja", "chat_template.json", "checksums.json"]
    names += ["tokenizer.json"]
    check_folder(run.best)
    assert sorted(path.name for path in run.best.iterdir()) == names
    assert (run.best / "chat_template.jinja").read_text() == "the model's chat_template.jinja"
    # The base is named as the user named it (field case B19).
    named = {"base_model_name_or_path": "models/base", "revision": None}
    assert json.loads((run.best / "adapter_config.json").read_text()) == {"r": 4} | named
    finish(run, tokenizer_files(replace(own, chat_template=str(given))), pytest.fail)
    check_folder(run.best)
    names.remove("chat_template.json")
    assert sorted(path.name for path in run.best.iterdir()) == names
    assert (run.best / "chat_template.jinja").read_text() == "mine"
