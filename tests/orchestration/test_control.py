"""What is asked of a sweep from elsewhere, in one process: how it is judged, and the driver's side."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration import cli
from orchestration.clones import (
    Admission,
    checked_changes,
    clone_records,
    clones_of,
    parsed_changes,
)
from orchestration.commands import Answer, answered, commands_of, post, unanswered
from orchestration.control import stop_left
from orchestration.progress import Progress
from orchestration.results import read_trial
from orchestration.saved import saved_sweep
from search_spaces.candidate import Candidate
from tests.orchestration.written_runs import Driver, WrittenRun
from tests.spoilers import flipped
from trainers.paths import read_state, write_state

RUN = "runs/run"


@pytest.fixture
def sweep(write_sweep) -> WrittenRun:
    """Two trials that wait, in the current folder."""
    return WrittenRun()


def clone_of(sweep: WrittenRun, name: str, **changes: Any) -> Candidate:
    return Admission(saved_sweep(sweep.paths, RUN), RUN).clone(name, checked_changes(changes))


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
    judge = Admission(saved_sweep(sweep.paths, RUN), RUN)
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
    assert driver.progress.state.num_trials == 3
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


# What others read


def test_results_and_report_say_whose_clone_a_trial_is(sweep):
    post(sweep.paths, "clone", sweep.names[0], {"seed": 3})
    (answer,) = Driver(sweep).obeys(sweep)
    sweep.trains(answer.trial, 2.0, status="stopped", reason="stopped by its scheduler")
    record = read_trial(sweep.paths.trial(answer.trial))
    assert record.remark == f"clone of {sweep.names[0]}; stopped by its scheduler"
    assert read_trial(sweep.paths.trial(sweep.names[0])).remark == ""
    assert cli.main(["report", RUN]) == 0
    assert f"clone of {sweep.names[0]}" in sweep.paths.report.read_text()


@pytest.mark.parametrize("given", [None, "stopped by somebody"])
def test_trial_that_tune_stops_has_the_reason_of_whoever_stopped_it(sweep, given):
    from orchestration.ledger import Ledger

    name = sweep.names[0]
    sweep.trains(name, 3.0)
    ledger = Ledger(
        sweep.paths,
        Progress(sweep.names, 0, 64),
        [],
        reasons={name: given} if given else {},
    )
    tuned = SimpleNamespace(config={"trial": {"name": name}}, last_result={}, error_file=None)
    ledger.on_trial_complete(1, [], tuned)
    record = read_trial(sweep.paths.trial(name))
    assert record.status == "stopped"
    assert record.reason == (given or "stopped by its scheduler")
