"""A group that hears that its node will be taken away: what it saves, when it gives its trials back, and that
whoever goes on from there ends in the numbers of the same trial trained alone without a disturbance."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainers.links import LOOK, FakeLink, Killed, allow, enter, serve
from tests.trainers.trials import CANDIDATE, numbers, trial
from trainers.base_model import BaseSpec
from trainers.checkpoint_folder import checkpoint_examples
from trainers.paths import TrialPaths, read_json, read_json_lines, write_json
from trainers.preemption import LEAVE_MARGIN_S, Notice
from trainers.sft_trainer import TrialSpec, train_trial

FAR_S = 1000.0


@pytest.fixture
def make(data_file, tmp_path, tiny_folder):
    """make(name, ...): a trial with evaluations after 12 and 24 examples, three steps of two forwards each."""

    def made(name: str, *, dtype: str = "fp32", **changes) -> TrialSpec:
        base = BaseSpec(model=tiny_folder, quantization="none", dtype=dtype)
        candidate = replace(CANDIDATE, **({"global_batch_size": 4} | changes))
        own = {"num_examples": 24, "eval_every": 12, "micro_batch_size": 2, "base": base}
        return trial(data_file, tmp_path / "served" / name, candidate=candidate, **own)

    return made


@pytest.fixture
def alone(alone):
    """alone(spec): its rows after training by itself, without that of the base."""
    return lambda spec: alone(spec)[1:]


def die() -> bool:
    raise Killed


def saved_examples(spec: TrialSpec) -> int:
    return checkpoint_examples(TrialPaths(spec.folder).checkpoint)


def rows_on_disk(spec: TrialSpec) -> list[int]:
    return [row["examples"] for row in read_json_lines(TrialPaths(spec.folder).metrics)]


def noticed(link: FakeLink, *, left_s: float) -> FakeLink:
    link.goes_at = time.time() + left_s
    return link


def kinds(link: FakeLink) -> list[str]:
    return [told.event["kind"] for told in link.told]


@pytest.mark.parametrize("changes", [{}, {"full_finetune": True, "lora_rank": 0, "dropout": 0.0}])
@pytest.mark.parametrize(
    ("heard_at", "saved", "rows"),
    # Two commands a step, the first comes with the trial: the notice is heard in the middle of a step or between two.
    [(2, 4, [0]), (3, 8, [0]), (5, 12, [0, 12]), (8, 16, [0, 12]), (9, 20, [0, 12])],
)
def test_preemption_saves_at_the_next_step_and_a_restart_ends_in_bit_equal_rows(
    make, alone, heard_at, saved, rows, changes
):
    spec = make("a", **changes)
    link = FakeLink(
        [enter(spec)],
        (lambda: link.polls == heard_at, [LOOK]),
        (lambda: saved_examples(spec) == saved and die(), []),
    )
    with pytest.raises(Killed):
        serve(noticed(link, left_s=FAR_S))
    assert rows_on_disk(spec) == rows
    again = FakeLink([enter(spec)])
    serve(again)
    assert numbers(again.rows(spec)) == alone(spec)
    assert again.end(spec)["status"] == "finished"


def test_preemption_saves_once_and_trains_on(make, alone):
    spec = make("a")
    link = FakeLink([enter(spec)], (lambda: link.polls == 2, [LOOK, LOOK]))
    serve(noticed(link, left_s=FAR_S))
    assert kinds(link) == ["preempted", "row", "row", "end"]
    assert numbers(link.rows(spec)) == alone(spec)
    assert link.told[0].event["deadline"] == link.goes_at


@pytest.mark.parametrize("asked", [0, 1])
def test_preemption_of_a_trial_that_waits_saves_it_and_it_waits_again_after_a_restart(
    make, alone, asked
):
    spec = make("a")
    # It stands at the evaluation `asked`, which nobody asks for: the last of all where asked is 1.
    link = FakeLink([enter(spec, asked - 1)], [LOOK], (die, []))
    with pytest.raises(Killed):
        serve(noticed(link, left_s=FAR_S))
    assert saved_examples(spec) == 12 * (asked + 1)
    assert rows_on_disk(spec) == [0, 12][: asked + 1]
    assert not TrialPaths(spec.folder).status.exists()
    again = FakeLink([enter(spec, asked - 1)], *([allow(spec, n)] for n in range(asked, 2)))
    serve(again)
    assert again.told_when_idle[1] == asked  # rows told before anything was asked for
    assert numbers(again.rows(spec)) == alone(spec)
    assert again.end(spec)["status"] == "finished"


def test_preemption_near_its_deadline_gives_the_trial_back_saved(make, alone):
    spec = make("a")
    link = FakeLink([enter(spec)], (lambda: link.polls == 3, [LOOK]))
    server = serve(noticed(link, left_s=LEAVE_MARGIN_S / 2))
    assert kinds(link) == ["preempted", "back"]
    assert not server.members
    assert saved_examples(spec) == 8
    assert not TrialPaths(spec.folder).status.exists()
    elsewhere = FakeLink([enter(spec)])
    serve(elsewhere)
    assert numbers(elsewhere.rows(spec)) == alone(spec)


def test_preemption_whose_deadline_comes_nearer_saves_a_second_time_and_gives_back(make, alone):
    spec = make("a")

    def nearer() -> bool:
        if link.polls == 7:
            noticed(link, left_s=1.0)
        return link.polls == 7

    link = FakeLink([enter(spec)], (lambda: link.polls == 2, [LOOK]), (nearer, [LOOK]))
    serve(noticed(link, left_s=FAR_S))
    assert kinds(link) == ["preempted", "row", "back"]
    assert saved_examples(spec) == 16
    assert numbers(train_trial(spec, lambda row: True).rows)[1:] == alone(spec)  # engine solo


def test_preemption_gives_each_member_of_a_pack_back_at_its_own_step(make, alone):
    specs = [
        make(name, dtype="fp64", seed=n, global_batch_size=4 + 2 * n) for n, name in enumerate("ab")
    ]
    link = FakeLink([enter(spec) for spec in specs], (lambda: link.polls == 2, [LOOK]))
    serve(noticed(link, left_s=1.0))
    assert sorted(kinds(link)) == ["back", "back", "preempted"]
    assert [saved_examples(spec) for spec in specs] == [4, 6]
    elsewhere = FakeLink([enter(spec) for spec in specs])
    serve(elsewhere)
    for spec in specs:
        for row, other in zip(elsewhere.rows(spec), alone(spec), strict=True):
            assert row["examples"] == other["examples"]
            for key in ("eval_loss", "train_loss", "grad_norm"):
                assert row[key] == pytest.approx(other[key], abs=1e-9)


def test_preemption_trial_that_was_on_its_way_is_given_back_untouched(make):
    spec, late = make("a"), make("late")
    link = FakeLink([enter(spec)], (lambda: link.polls == 2, [LOOK, enter(late)]))
    serve(noticed(link, left_s=FAR_S))
    assert [told.event.get("trial") for told in link.told if told.event["kind"] == "back"] == [
        "late"
    ]
    assert not Path(late.folder).exists()


def test_preemption_that_nobody_announced_changes_nothing(make, alone):
    spec = make("a")
    link = FakeLink([enter(spec)], (lambda: link.polls == 2, [LOOK]))
    serve(link)
    assert kinds(link) == ["row", "row", "end"]
    assert numbers(link.rows(spec)) == alone(spec)


def test_checkpoint_of_before_there_were_saves_between_evaluations_goes_on(make, alone):
    spec = make("a")
    link = FakeLink([enter(spec)])
    link.kill = lambda event: True
    with pytest.raises(Killed):
        serve(link)
    path = TrialPaths(spec.folder).checkpoint / "trainer_state.json"
    old = {"examples", "steps", "tokens", "loss_tokens", "seconds"}
    write_json(path, {key: value for key, value in read_json(path).items() if key in old})
    again = FakeLink([enter(spec)])
    serve(again)
    assert numbers(again.rows(spec)) == alone(spec)


def test_notice_begins_its_last_round_when_as_much_time_is_left_as_two_rounds_take():
    now = time.time()
    notice = Notice(now + LEAVE_MARGIN_S + 60, ["a"])
    assert not notice.must_leave()
    notice.heard_at = now - 40  # the first round took 40 s
    notice.saved("a", 3)
    assert notice.is_saved("a", 3)
    assert not notice.is_saved("a", 4)
    assert notice.must_leave()
    notice.leave(["a"])
    assert not notice.must_leave()
