"""`tenfold status` and `tenfold trial`, in one process: with a driver, without one, and on an object store."""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestration import cli, trial_verb
from orchestration.clones import clones_of
from orchestration.commands import Answer, answer_of, post, unanswered
from orchestration.control import Control
from orchestration.run_folder import driver_of, driving, run_at
from orchestration.status import status_lines, status_of
from tests.orchestration.written_runs import Driver, WrittenRun
from tests.spoilers import flipped
from trainers.lease import Holder, living_driver
from trainers.mirror import mirror_of
from trainers.object_store import ObjectStore
from trainers.paths import RunPaths, write_state
from trainers.run_lock import is_locked

RUN = "runs/run"


@pytest.fixture
def sweep(write_sweep) -> WrittenRun:
    """Two trials that wait, in the current folder."""
    return WrittenRun()


# The verbs


@contextmanager
def driven(sweep: WrittenRun) -> Iterator[None]:
    with driving(sweep.paths):
        yield


def test_verbs_of_a_sweep_that_nobody_drives_say_that_a_resume_obeys(sweep, capsys):
    first, second = sweep.names
    assert cli.main(["trial", "stop", RUN, first]) == 0
    assert cli.main(["trial", "clone", RUN, second, "--set", "seed=3"]) == 0
    stop, clone = capsys.readouterr().out.splitlines()
    assert "`tenfold resume runs/run` obeys it" in stop
    assert clone.startswith(f"clone of {second}: r4-")
    commands = [command for _, command in unanswered(sweep.paths)]
    assert [command and command.kind for command in commands] == ["stop", "clone"]


def test_verb_tells_what_the_driver_answers(sweep, capsys, monkeypatch):
    driver = Driver(sweep)

    def wait(run, command, wait_s, poll_s):
        driver.control.look_now()
        return answer_of(run, command.id)

    monkeypatch.setattr(trial_verb, "wait_for_answer", wait)
    with driven(sweep):
        assert cli.main(["trial", "clone", RUN, sweep.names[0], "--set", "seed=3"]) == 0
        assert f": cloned of {sweep.names[0]} (" in capsys.readouterr().out
        monkeypatch.setattr(Control, "_stop", _refuse)
        assert cli.main(["trial", "stop", RUN, sweep.names[0]]) == 2
    assert capsys.readouterr().err == "tenfold: it has just ended\n"


def _refuse(self: Control, command: Any) -> Answer:
    raise ValueError("it has just ended")


def test_verb_whose_driver_does_not_look_says_that_it_is_written_down(sweep, capsys, monkeypatch):
    monkeypatch.setattr(trial_verb, "WAIT_S", 0)
    with driven(sweep):
        assert cli.main(["trial", "stop", RUN, sweep.names[0]]) == 0
    assert "its driver obeys it when it looks next" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["stop"], ["clone", "--set", "seed=3"]])
def test_verbs_refuse_what_is_no_trial_and_write_nothing(sweep, capsys, verb):
    kind, *flags = verb
    for trial, told in (("r9", "has no trial 'r9'"), ("r4", "is that of 2"), ("", "has no trial")):
        assert cli.main(["trial", kind, RUN, trial, *flags]) == 2
        assert told in capsys.readouterr().err
    assert not sweep.paths.commands.exists()


def test_verb_refuses_a_clone_that_the_pruner_discards_and_writes_nothing(sweep, capsys):
    sweep.edit_plan(dataset_bits=10**8)
    assert cli.main(["trial", "clone", RUN, sweep.names[0], "--set", "lora_rank=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tenfold: UNDERCAPACITY: rank 2")
    assert not sweep.paths.commands.exists()


def test_verb_takes_the_beginning_of_a_name_and_refuses_a_trial_that_ended(sweep, capsys):
    name = sweep.names[0]
    assert cli.main(["trial", "stop", RUN, name[:-2]]) == 0
    sweep.trains(name, 2.0, status="finished")
    assert cli.main(["trial", "stop", RUN, name]) == 2
    assert "must be a trial that has not ended, it is finished" in capsys.readouterr().err


def test_verb_writes_through_no_link_that_leads_out_of_the_run(sweep, capsys, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    sweep.paths.commands.symlink_to(outside)
    assert cli.main(["trial", "stop", RUN, sweep.names[0]]) == 2
    assert "must not lead out of the run's folder" in capsys.readouterr().err
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("verb", ["stop", "clone"])
def test_verbs_refuse_a_study_and_a_folder_that_is_none(sweep, capsys, verb):
    flags = ["--set", "seed=3"] if verb == "clone" else []
    write_state(sweep.paths.resolved, {"command": "tenfold study rank --preset smoke"})
    assert cli.main(["trial", verb, RUN, "x", *flags]) == 2
    assert "is a study, whose points are fixed" in capsys.readouterr().err
    assert cli.main(["trial", verb, "runs/none", "x", *flags]) == 2
    assert "must be the folder of a sweep" in capsys.readouterr().err


# Status


def test_status_tells_where_each_trial_stands_and_by_whom_it_is_driven(sweep, capsys):
    runs = sweep.names[0]
    sweep.trains(runs, 3.0, 2.5)
    with driven(sweep):
        found = status_of(RUN)
        driver = driver_of(sweep.paths)
    assert driver is not None
    assert found["driver"] == vars(driver)
    assert (found["state"], found["goes_on_by"]) == ("running", None)
    assert found["counts"] == {"running": 1, "waiting": 1}
    assert found["best"] == {"trial": runs, "score": 2.5, "examples": 32, "base": 3.5}
    trial = found["trials"][0]
    assert (trial["evaluation"], trial["num_evaluations"]) == (2, 4)
    assert (trial["examples"], trial["num_examples"], trial["seconds"]) == (32, 64, 4.0)
    lines = status_lines(found)
    assert f"process {driver.pid} on {driver.host}" in lines[0]
    assert "0/2 trials ended (1 running, 1 waiting)" in lines[1]
    assert any(line.split()[:2] == ["2/4", "32/64"] for line in lines)


def test_status_of_a_run_without_a_driver_is_interrupted_and_then_ended(sweep, capsys):
    first, second = sweep.names
    sweep.trains(first, 3.0, status="stopped", reason="stopped by its scheduler")
    sweep.trains(second, 3.1)
    found = status_of(RUN)
    assert (found["state"], found["driver"]) == ("interrupted", None)
    assert found["counts"] == {"stopped": 1, "interrupted": 1}
    assert status_lines(found)[-1] == "  `tenfold resume runs/run` goes on"
    sweep.trains(second, 3.1, 2.0, status="finished")
    found = status_of(RUN)
    assert (found["state"], found["goes_on_by"]) == ("ended", None)
    assert found["best"]["trial"] == second


def test_status_of_an_ended_sweep_of_which_a_clone_is_asked_goes_on(sweep):
    for name in sweep.names:
        sweep.trains(name, 3.0, status="finished")
    trial_verb.clone_trial(RUN, sweep.names[0], {"seed": 3})
    found = status_of(RUN)
    assert (found["state"], len(found["commands"])) == ("interrupted", 1)
    assert any("asked for, not obeyed yet: clone" in line for line in status_lines(found))
    Driver(sweep).obeys(sweep)
    found = status_of(RUN)
    assert (found["num_trials"], found["counts"]) == (3, {"finished": 2, "waiting": 1})
    assert {trial.get("clone_of") for trial in found["trials"]} == {None, sweep.names[0]}


def test_status_never_takes_a_failed_trial_for_the_best_and_tells_damage(sweep):
    first, second = sweep.names
    sweep.trains(first, 1.0, status="diverged", reason="train_loss nan at step 3")
    sweep.trains(second, 2.0, status="finished")
    assert status_of(RUN)["best"]["trial"] == second
    flipped(sweep.paths.trial(first).status)
    found = status_of(RUN)
    assert found["counts"] == {"finished": 1, "damaged": 1}
    assert any("status.json: must end in the checksum" in line for line in status_lines(found))


def test_status_verb_prints_json_and_refuses_a_folder_that_is_none(sweep, capsys):
    assert cli.main(["status", RUN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "interrupted"
    assert cli.main(["status", RUN]) == 0
    assert cli.main(["status", "runs"]) == 2
    assert "must be the folder of a sweep" in capsys.readouterr().err


def test_status_of_a_study_names_the_command_that_goes_on(sweep):
    command = "tenfold study rank --preset smoke"
    write_state(sweep.paths.resolved, {"command": command})
    sweep.trains(sweep.names[0], 3.0, status="finished")
    found = status_of(RUN)
    assert (found["kind"], found["state"]) == ("study", "interrupted")
    assert found["goes_on_by"] == command
    assert found["counts"] == {"finished": 1, "waiting": 1}


def test_run_that_is_looked_at_is_driven_by_one_process_still(sweep):
    assert not is_locked(sweep.paths.lock)
    with driven(sweep):
        assert is_locked(sweep.paths.lock)
        with pytest.raises(ValueError, match="driven by another process"), driven(sweep):
            pass
    with sweep.paths.lock.open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with driven(sweep):
            assert is_locked(sweep.paths.lock)


# On an object store


@pytest.fixture
def url(sweep, tmp_path) -> Iterator[str]:
    """The same run on a store, where this process has a copy of it, as a driver has."""
    shutil.copytree(sweep.paths.root, tmp_path / "store" / "run")
    yield f"file://{tmp_path}/store/run"
    if mirror := mirror_of(run_at(f"file://{tmp_path}/store/run").root):
        mirror.close()


def test_commands_to_a_run_on_a_store_are_fetched_obeyed_and_answered_there(sweep, url, tmp_path):
    sweep.paths = run_at(url)
    elsewhere = RunPaths(tmp_path / "store" / "run")
    asked = post(elsewhere, "clone", sweep.names[0], {"seed": 3})
    sweep.maker.run = sweep.paths
    driver = Driver(sweep)
    with driving(sweep.paths):
        driver.control.look_now()
        found = status_of(url)
    answer = answer_of(elsewhere, asked.id)
    assert answer
    assert driver.given.added == [answer.trial]
    assert clones_of(elsewhere).keys() == {answer.trial}
    assert (found["state"], found["num_trials"]) == ("running", 3)
    assert found["driver"]["pid"] == os.getpid()
    assert status_of(url)["state"] == "interrupted"


def test_verb_writes_its_command_onto_the_store(sweep, url, tmp_path, capsys):
    assert cli.main(["trial", "stop", url, sweep.names[0]]) == 0
    assert f"`tenfold resume {url}` obeys it" in capsys.readouterr().out
    ((_, command),) = unanswered(RunPaths(tmp_path / "store" / "run"))
    assert command
    assert command.trial == sweep.names[0]


def test_lease_of_another_host_is_watched_or_believed(tmp_path):
    store = ObjectStore(f"file://{tmp_path}/store/run")
    lease = {"id": "x", "host": "elsewhere pid:[1]", "pid": 7, "renewals": 0}
    store.write(".driver.json", json.dumps(lease).encode())
    assert living_driver(store, None) == Holder("elsewhere", 7)
    assert living_driver(store, 0.0) is None
    renewed = json.dumps(lease | {"renewals": 1}).encode()
    threading.Timer(0.2, lambda: store.write(".driver.json", renewed)).start()
    assert living_driver(store, 30.0) == Holder("elsewhere", 7)
