"""What is asked of a sweep from elsewhere, in one process: commands, clones judged, the driver's side and the verbs."""

import fcntl
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestration import cli, trial_verb
from orchestration.clones import Judge, checked_changes, clone_records, clones_of, parsed_changes
from orchestration.commands import Answer, answer_of, answered, commands_of, post, unanswered
from orchestration.control import Control, stop_left
from orchestration.progress import Progress
from orchestration.results import read_trial
from orchestration.run_folder import driver_of, driving
from orchestration.saved import saved_sweep
from orchestration.status import status_lines, status_of
from search_spaces.candidate import Candidate
from tests.orchestration.written_runs import WrittenRun
from tests.spoilers import flipped
from trainers.paths import read_state, write_state
from trainers.run_lock import is_locked

RUN = "runs/run"


@pytest.fixture
def sweep(write_sweep) -> WrittenRun:
    """Two trials that wait, in the current folder."""
    return WrittenRun()


class Given:
    """A searcher that holds some trials still, and takes clones."""

    def __init__(self, *waiting: str) -> None:
        self.waiting, self.added = list(waiting), []

    def add(self, clone: dict[str, Any]) -> None:
        self.added.append(clone["name"])

    def drop(self, name: str) -> bool:
        return name in self.waiting


class Driver:
    """A driver's control of a written run, and what it did."""

    def __init__(self, sweep: WrittenRun, *waiting: str) -> None:
        self.cancelled: list[tuple[str, str]] = []
        self.ended: list[str] = []
        self.given = Given(*waiting)
        self.progress = Progress(sweep.names, 0, 64)
        self.control = Control(
            sweep.paths, sweep.maker, self.progress, lambda *told: self.cancelled.append(told)
        )
        self.control.attach(self.given, lambda name, reason: self.ended.append(name))

    def obeys(self, sweep: WrittenRun) -> list[Answer]:
        """What it answers to all that was asked since the last time."""
        names = [name for name, _ in unanswered(sweep.paths)]
        self.control.look_now()
        answers = [answer_of(sweep.paths, name) for name in names]
        assert None not in answers
        return [answer for answer in answers if answer]


def clone_of(sweep: WrittenRun, name: str, **changes: Any) -> Candidate:
    return Judge(saved_sweep(sweep.paths, RUN), RUN).clone(name, checked_changes(changes))


# What is changed


def test_set_reads_values_as_sweep_yaml_does():
    given = ["learning_rate=3e-4", "lora_rank=8", "target=[mlp, attn]", "lora_alpha=2*rank"]
    assert checked_changes(parsed_changes(given)) == {
        "learning_rate": 3e-4,
        "lora_rank": 8,
        "target": ["mlp", "attn"],
        "lora_alpha": "2*rank",
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--set must be given"),
        (["learning_rate"], "--set must be KEY=VALUE, got 'learning_rate'"),
        (["seed=1", "seed=2"], "--set seed: must be given once"),
        (["seed={"], "--set seed: "),
        (["learning_rat=1"], "did you mean 'learning_rate'?"),
        (["examples=64"], "examples: must be a key of a candidate, is one for the whole sweep"),
        (["full_finetune=true"], "full_finetune: must be a key of a candidate, is none"),
        (["learning_rate=-1"], "learning_rate must be a finite number > 0, got -1"),
        (["lora_rank=2.5"], "lora_rank must be an integer >= 1, got 2.5"),
        (["target=[[mlp], [attn]]"], "target of a clone must be one target"),
        (["variant=hf_abcdefghijklmnopqrstuvwxyz0123456789"], "--set variant: "),
    ],
)
def test_set_of_what_cannot_be_changed_is_refused_in_a_line(given, told):
    with pytest.raises(ValueError, match=r"--set|must") as error:
        checked_changes(parsed_changes(given))
    assert told in str(error.value)
    assert "hf_abc" not in str(error.value)
    assert "\n" not in str(error.value)


# Judged as the plan judged


def test_clone_is_the_candidate_with_its_keys_changed(sweep):
    first = sweep.plan.pruned.admitted[0]
    found = clone_of(sweep, sweep.names[0], learning_rate=2e-3, seed=7)
    assert found.to_dict() == first.to_dict() | {"learning_rate": 2e-3, "seed": 7}
    ruled = clone_of(sweep, sweep.names[0], lora_rank=8, lora_alpha="2*rank", target="mlp+attn")
    assert (ruled.lora_alpha, ruled.target) == (16.0, ("attn", "mlp"))


def test_clone_that_the_sweep_has_is_refused(sweep):
    rates = [candidate.learning_rate for candidate in sweep.plan.pruned.admitted]
    with pytest.raises(ValueError, match=re.escape(f"this is {sweep.names[1]}, which the sweep")):
        clone_of(sweep, sweep.names[0], learning_rate=rates[1])


def test_clone_of_too_low_a_rank_is_refused_with_the_pruners_numbers_unless_advisory(sweep):
    sweep.edit_plan(dataset_bits=10**8)
    with pytest.raises(ValueError, match=r"^UNDERCAPACITY: rank 2 on .* < 100,000,000 data bits"):
        clone_of(sweep, sweep.names[0], lora_rank=2)
    sweep.edit_plan(dataset_bits=10**8, capacity_policy="advisory")
    assert clone_of(sweep, sweep.names[0], lora_rank=2).lora_rank == 2


def test_clone_without_room_on_a_worker_is_refused_with_the_bytes(sweep):
    sweep.edit_plan(inventory=vars(sweep.plan.inventory) | {"memory_bytes": 1 << 26})
    with pytest.raises(ValueError, match=r"^OUT OF MEMORY: .* needs .* GB .* has 0\.1 GB"):
        clone_of(sweep, sweep.names[0], lora_rank=64)


def test_clone_too_large_for_the_running_packs_is_refused_and_one_like_theirs_is_not(sweep):
    facts = vars(sweep.packs) | {"places": 8, "room_bytes": sweep.packs.needed_bytes * 2}
    write_state(sweep.paths.packs, facts | {"groups": {}})
    with pytest.raises(ValueError, match="8 adapters of rank 1024 in a pack need"):
        clone_of(sweep, sweep.names[0], lora_rank=1024)
    assert clone_of(sweep, sweep.names[0], seed=3).seed == 3


def test_clone_whose_batch_the_workers_of_a_pack_cannot_share_is_refused(sweep):
    write_state(sweep.paths.packs, vars(sweep.packs) | {"workers_per_group": 2})
    with pytest.raises(ValueError, match="global_batch_size must be a multiple"):
        clone_of(sweep, sweep.names[0], global_batch_size=9)


def test_clone_with_a_layer_that_the_model_lacks_is_refused(sweep):
    with pytest.raises(ValueError, match="experts"):
        clone_of(sweep, sweep.names[0], target="experts")


def test_clone_is_told_of_pitfalls_that_its_trial_did_not_have(sweep):
    judge = Judge(saved_sweep(sweep.paths, RUN), RUN)
    found = judge.clone(sweep.names[0], {"target": "attn"})
    told = judge.warnings(found, sweep.names[0])
    assert any("reaches attention alone" in line for line in told)
    assert judge.warnings(judge.clone(sweep.names[0], {"seed": 3}), sweep.names[0]) == []


# Commands on disk


def test_commands_are_read_in_their_order_until_each_is_answered(sweep):
    first = post(sweep.paths, "stop", sweep.names[0])
    second = post(sweep.paths, "clone", sweep.names[1], {"seed": 3})
    assert [command for _, command in commands_of(sweep.paths)] == [first, second]
    answered(sweep.paths, first.id, Answer(ok=True, line="done"))
    assert unanswered(sweep.paths) == [(second.id, second)]


def test_command_that_is_damaged_is_answered_and_not_obeyed(sweep):
    command = post(sweep.paths, "stop", sweep.names[0])
    flipped(sweep.paths.commands / f"{command.id}.json")
    driver = Driver(sweep)
    (answer,) = driver.obeys(sweep)
    assert not answer.ok
    assert "must be a command as `tenfold trial` writes it" in answer.line
    assert driver.cancelled == []
    assert driver.obeys(sweep) == []


def test_answer_that_is_damaged_is_given_again_and_changes_nothing(sweep):
    command = post(sweep.paths, "clone", sweep.names[0], {"seed": 3})
    driver = Driver(sweep)
    (before,) = driver.obeys(sweep)
    flipped(sweep.paths.answers / f"{command.id}.json")
    assert driver.obeys(sweep) == [before]
    assert driver.given.added == [before.trial]


# The driver


def test_stop_of_a_trial_that_runs_frees_its_place_and_of_one_that_waits_ends_it(sweep):
    runs, waits = sweep.names
    sweep.trains(runs, 3.0)
    for name in sweep.names:
        post(sweep.paths, "stop", name)
    driver = Driver(sweep, waits)
    first, second = driver.obeys(sweep)
    assert first.line.startswith(f"{runs}: stops at its next evaluation at the latest")
    assert second.line.startswith(f"{waits}: stopped")
    assert [name for name, _ in driver.cancelled] == sweep.names
    assert driver.ended == [waits]
    assert driver.control.stopped.keys() == set(sweep.names)


def test_stop_of_a_trial_that_ended_meanwhile_is_refused(sweep):
    name = sweep.names[0]
    post(sweep.paths, "stop", name)
    sweep.trains(name, 3.0, 2.5, status="diverged", reason="loss nan")
    driver = Driver(sweep)
    (answer,) = driver.obeys(sweep)
    assert (answer.ok, driver.cancelled) == (False, [])
    assert answer.line == f"{name}: must be a trial that has not ended, it is diverged"


@pytest.mark.parametrize("name", ["r4-nobody", "../../run", ""])
def test_command_about_no_trial_of_the_sweep_is_refused(sweep, name):
    post(sweep.paths, "stop", name)
    (answer,) = Driver(sweep).obeys(sweep)
    assert "has no trial" in answer.line


def test_stop_all_ends_what_has_no_end_yet(sweep):
    sweep.trains(sweep.names[0], 3.0, status="finished")
    driver = Driver(sweep)
    driver.control.stop_all(sweep.names, "time_budget: 1 h is over")
    assert driver.cancelled == [(sweep.names[1], "time_budget: 1 h is over")]


def test_clone_is_taken_up_counted_and_kept(sweep):
    of = sweep.names[0]
    command = post(sweep.paths, "clone", of, {"learning_rate": 2e-3})
    driver = Driver(sweep)
    (answer,) = driver.obeys(sweep)
    assert driver.given.added == [answer.trial]
    assert driver.progress.num_trials == 3
    record = clone_records(sweep.paths)[answer.trial]
    assert (record["of"], record["command"]) == (of, command.id)
    config = read_state(sweep.paths.trial(answer.trial).config)
    known = read_state(sweep.paths.trial(of).config)
    assert config["candidate"]["learning_rate"] == 2e-3
    assert config | {"name": 0, "folder": 0, "candidate": 0} == known | {
        "name": 0,
        "folder": 0,
        "candidate": 0,
    }


def test_two_equal_clones_at_once_are_one_trial(sweep):
    for _ in range(2):
        post(sweep.paths, "clone", sweep.names[0], {"seed": 3})
    driver = Driver(sweep)
    first, second = driver.obeys(sweep)
    assert first.ok
    assert not second.ok
    assert f"this is {first.trial}, which the sweep has already" in second.line
    assert driver.given.added == [first.trial]


def test_clone_whose_driver_died_before_it_answered_is_no_second_one(sweep):
    post(sweep.paths, "clone", sweep.names[0], {"seed": 3})
    (answer,) = Driver(sweep).obeys(sweep)
    for path in sweep.paths.answers.iterdir():
        path.unlink()
    sweep.paths.trial(answer.trial).config.unlink()  # it had written the record alone
    again = Driver(sweep)
    assert again.obeys(sweep) == [answer]
    assert again.given.added == []
    assert clones_of(sweep.paths).keys() == {answer.trial}


def test_record_of_a_clone_that_is_damaged_is_known_by_its_config(sweep):
    post(sweep.paths, "clone", sweep.names[0], {"seed": 3})
    (answer,) = Driver(sweep).obeys(sweep)
    before = clones_of(sweep.paths)
    flipped(sweep.paths.trial(answer.trial).clone)
    assert clones_of(sweep.paths) == before
    sweep.paths.trial(answer.trial).config.unlink()
    with pytest.raises(ValueError, match="nothing else describes this trial"):
        clones_of(sweep.paths)


# A driver that died


def test_stop_that_no_driver_lived_to_obey_is_obeyed_by_the_next(sweep):
    first, second = sweep.names
    sweep.trains(first, 3.0, 2.5)
    command = post(sweep.paths, "stop", first)
    refused = post(sweep.paths, "stop", second)
    answered(sweep.paths, refused.id, Answer(ok=False, line="no"))
    stop_left(sweep.paths)
    record = read_trial(sweep.paths.trial(first))
    assert record.status == "stopped"
    assert record.reason == f"stopped by {command.by} (tenfold trial stop)"
    assert read_trial(sweep.paths.trial(second)).status == "unfinished"
    assert [answer.ok for answer in Driver(sweep).obeys(sweep)] == [True]


def test_stop_that_was_accepted_but_not_written_is_written_by_the_next_driver(sweep):
    sweep.trains(sweep.names[0], 3.0)
    post(sweep.paths, "stop", sweep.names[0])
    Driver(sweep).obeys(sweep)
    assert read_trial(sweep.paths.trial(sweep.names[0])).status == "unfinished"
    stop_left(sweep.paths)
    assert read_trial(sweep.paths.trial(sweep.names[0])).status == "stopped"


def test_trial_that_came_to_its_end_before_its_stop_was_written_has_finished(sweep):
    sweep.trains(sweep.names[0], 3.0, 2.5, 2.0, 1.5)
    post(sweep.paths, "stop", sweep.names[0])
    stop_left(sweep.paths)
    assert read_trial(sweep.paths.trial(sweep.names[0])).status == "finished"


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
