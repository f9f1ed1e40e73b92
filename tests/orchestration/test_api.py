"""`from orchestration import Sweep`: the verbs from Python, without a start of Ray."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import orchestration
from orchestration import Sweep, cli, run, sweep
from tests.orchestration.sweeps import BASE, ROOT
from tests.orchestration.written_runs import KEYS, WrittenRun
from trainers.paths import read_state

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def ended(write_sweep) -> WrittenRun:
    """runs/run, of which one trial was stopped, and one has finished as the best."""
    written = WrittenRun()
    worse, better = written.names
    written.trains(worse, 3.0, status="stopped", reason="stopped by its scheduler")
    written.trains(better, 3.1, 2.5, 2.0, 2.2, status="finished")
    return written


def test_examples_of_the_page_run(ended, write_sweep, capsys):
    Path("base").symlink_to(BASE)
    Path("train.jsonl").write_bytes(Path("good.jsonl").read_bytes())
    write_sweep(name="other")
    third = ended.maker.plan.pruned.admitted[0]
    open_trial = ended.maker.write(type(third).from_dict(third.to_dict() | {"seed": 9}))["name"]
    ended.trains(open_trial, 3.2)
    stopped = ended.paths.trial(ended.names[0])
    stopped.status.unlink()  # the page stops the second of the results
    names: dict[str, object] = {}
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "interrupted {'finished': 1, 'interrupted': 2}" in shown
    assert "lora_rank" in shown
    commands = sorted(ended.paths.commands.glob("*.json"))
    assert [read_state(path)["kind"] for path in commands] == ["clone", "stop"]
    assert list(names["best"].index) == [ended.names[1]]  # type: ignore
    assert shown.splitlines()[-1] == str(ended.paths.report)
    assert ended.paths.report.is_file()


def test_results_hold_a_row_for_each_trial_best_first(ended):
    frame = Sweep.open("runs/run").results()
    worse, better = ended.names
    assert list(frame.index) == [better, worse]
    assert list(frame.is_best) == [True, False]
    first = frame.loc[better]
    rates = {name: frame.learning_rate[name] for name in ended.names}
    assert rates == {
        name: candidate.learning_rate
        for name, candidate in zip(ended.names, ended.plan.pruned.admitted, strict=True)
    }
    assert (first.score, first.base_score, first.examples, first.steps) == (2.0, 3.5, 48, 3)
    assert (first.examples_seen, first.seconds, first.status) == (64, 8.0, "finished")
    assert (first.lora_rank, first.target, first.variant) == (4, "attn+mlp+unembed", "lora")
    assert frame.reason[worse] == "stopped by its scheduler"


def test_metrics_hold_a_row_for_each_evaluation(ended):
    frame = Sweep.open("runs/run").metrics()
    assert len(frame) == 2 + 5
    better = frame[frame.trial == ended.names[1]]
    assert list(better.eval_loss) == [3.5, 3.1, 2.5, 2.0, 2.2]
    assert list(better.examples) == [0, 16, 32, 48, 64]
    assert "crc" not in frame.columns


def test_results_of_a_run_without_rows_have_none(write_sweep):
    written = WrittenRun()
    frame = Sweep.open("runs/run").results()
    assert set(frame.index) == set(written.names)
    assert frame.score.isna().all()
    assert not frame.is_best.any()
    assert Sweep.open("runs/run").metrics().empty


def test_plan_and_check_are_those_of_the_command_line(write_sweep, capsys):
    import json

    path = write_sweep(lora_rank=4, learning_rate=[1e-3])
    for verb, value in (("plan", Sweep(path).plan()), ("check", Sweep(path).check())):
        assert cli.main([verb, str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(value))


def test_keys_win_over_the_file_and_are_what_the_run_keeps(write_sweep, monkeypatch):
    path, kept = write_sweep(lora_rank=4, name="a"), []
    monkeypatch.setattr(run, "run_sweep", lambda config, source, **_: kept.append(source) or 0)
    by_file = Sweep(path, name="b").run()
    assert (by_file.config.name, by_file.place) == ("b", "runs/b")
    by_keys = Sweep(
        path, seed=np.int64(3), data=Path("good.jsonl"), learning_rate=(np.float64(1e-3), 3e-3)
    ).run()
    assert by_keys.config.seed == 3
    assert kept[0] == path.read_text()
    written = yaml.safe_load(kept[1])
    assert (written["seed"], written["lora_rank"]) == (3, 4)
    assert (written["data"], written["learning_rate"]) == ("good.jsonl", [1e-3, 3e-3])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "Sweep must be given a sweep.yaml, or model= and data="),
        ({"model": "m", "data": "d", "lora_rnk": 4}, "did you mean 'lora_rank'?"),
        ({"model": "m", "data": "d", "name": "hf_abcdefghijklmnopqrstuvwxyz0123456789"}, "name"),
    ],
)
def test_config_that_cannot_be_used_is_a_valueerror_of_one_line(workplace, given, told):
    with pytest.raises(ValueError, match=r"Sweep") as error:
        Sweep(**given)
    assert told in str(error.value)
    assert "hf_abc" not in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_the_verbs_are_valueerrors_and_nothing_exits(ended, workplace):
    with pytest.raises(ValueError, match="must be the folder of a sweep"):
        Sweep.open("runs/none")
    opened = Sweep.open("runs/run")
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        opened.clone_trial(ended.names[0], learning_rat=1)
    with pytest.raises(ValueError, match="must be a trial that has not ended, it is stopped"):
        opened.stop_trial(ended.names[0])
    with pytest.raises(ValueError, match="has no trial 'none'"):
        opened.export(trial="none")
    with pytest.raises(ValueError, match="no such file"):
        Sweep("none.yaml")
    with pytest.raises(AttributeError, match="no attribute 'Sweeps'"):
        _ = orchestration.Sweeps  # type: ignore


def test_full_disk_is_a_valueerror_of_the_line(ended, monkeypatch):
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", "runs/run/x")

    monkeypatch.setattr(run, "resume_sweep", full)
    with pytest.raises(ValueError, match=r"^runs/run/x: No space left on device; what was saved"):
        Sweep.open("runs/run").resume()


def test_interrupted_run_says_how_to_go_on(ended, monkeypatch):
    monkeypatch.setattr(run, "resume_sweep", lambda *_: 130)
    with pytest.raises(KeyboardInterrupt, match="`tenfold resume runs/run` goes on"):
        Sweep.open("runs/run").resume()


def test_quiet_run_prints_nothing_and_any_thread_may_run_it(ended, monkeypatch, capsys):
    def said(place: str, address: str | None, console) -> int:
        console.print("a line of a sweep")
        return 0

    monkeypatch.setattr(run, "resume_sweep", said)
    opened, told = Sweep.open("runs/run"), []
    thread = threading.Thread(target=lambda: told.append(opened.resume(quiet=True)))
    thread.start()
    thread.join()
    assert told == [opened]
    assert capsys.readouterr().out == ""
    opened.resume()
    assert capsys.readouterr().out == "a line of a sweep\n"


def test_process_runs_one_sweep_at_a_time(ended, monkeypatch):
    opened = Sweep.open("runs/run")
    monkeypatch.setattr(run, "resume_sweep", lambda *_: opened.resume() and 0)
    with pytest.raises(ValueError, match="a process must run one sweep at a time"):
        opened.resume()
    monkeypatch.setattr(run, "resume_sweep", lambda *_: 0)
    assert opened.resume() is opened


def test_export_without_a_folder_goes_where_the_verb_puts_it(ended, monkeypatch):
    asked = []
    monkeypatch.setattr("orchestration.export.export", lambda place, **given: asked.append(given))
    opened = Sweep.open("runs/run")
    assert opened.export() == ended.paths.root / "export" / "adapter"
    assert opened.export(merge=True) == ended.paths.root / "export" / "merged"
    assert opened.export(output="mine") == Path("mine")
    assert [given["output"] for given in asked] == [
        ended.paths.root / "export" / "adapter",
        ended.paths.root / "export" / "merged",
        Path("mine"),
    ]


def test_place_is_the_runs_folder_or_url():
    keys = {key: value for key, value in KEYS.items() if key != "name"}
    assert Sweep(**keys, name="run").place == "runs/run"
    assert Sweep(**keys, name="run", storage="s3://bucket/x").place == "s3://bucket/x/run"
    assert repr(Sweep(**keys, name="run")) == "Sweep('runs/run')"


# A Ray of the user's


def nodes(number: int) -> list[dict]:
    return [{"Alive": True}] * number + [{"Alive": False}]


def test_ray_of_several_machines_is_joined_by_its_address_alone():
    sweep.require_usable(None, nodes(1), "10.0.0.1:6379")
    sweep.require_usable("10.0.0.1:6379", nodes(2), "10.0.0.1:6379")
    sweep.require_usable("auto", nodes(2), "10.0.0.1:6379")
    with pytest.raises(ValueError, match=r"several machines \(2\): set address: 10\.0\.0\.1:6379"):
        sweep.require_usable(None, nodes(2), "10.0.0.1:6379")
    with pytest.raises(ValueError, match=r"address 10\.0\.0\.2:6379: this process is connected"):
        sweep.require_usable("10.0.0.2:6379", nodes(1), "10.0.0.1:6379")


def test_ray_of_the_user_is_neither_started_nor_ended_and_his_environment_stays(monkeypatch):
    import os

    import ray

    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes(1))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda **_: pytest.fail("the user's Ray was touched"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = dict(os.environ)
    sweep.start_ray(None)
    assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
    sweep.stop_ray()
    assert dict(os.environ) == before
