"""Groups that fall silent: who is ended, when, and what their trials are told."""

import asyncio

from orchestration.broker import Broker
from orchestration.silence import Silence
from tests.orchestration.boards import ask_all, trial

HANG_S = 60.0


def silence_of(*names: str, now: float = 0.0) -> Silence:
    silence = Silence(HANG_S)
    for number, name in enumerate(names):
        silence.here(name, "first", "node", number)
        silence.heard(name, now)
    return silence


def test_silence_of_a_group_that_speaks_in_time_ends_nobody():
    silence = silence_of("g")
    for now in (59.0, 118.0, 177.0):
        assert silence.hung(now) == []
        silence.heard("g", now)
    assert silence.hung(177.0 + HANG_S) == []


def test_silence_ends_all_workers_of_the_silent_group_and_of_no_other():
    silence = silence_of("g", "h")
    silence.here("g", "first", "another node", 7)
    silence.heard("h", 30.0)
    assert silence.hung(HANG_S + 0.1) == [("node", 0), ("another node", 7)]
    assert silence.hung(HANG_S + 0.2) == []  # told of once
    assert silence.gone("g") == "it was silent for 60 s and was ended"
    assert silence.gone("h") == ""


def test_silence_tells_the_workers_that_load():
    silence = silence_of("g", "h")
    silence.ready("h", 1.0)
    assert silence.loading() == [("node", 0)]
    silence.gone("g")
    assert silence.loading() == []


def test_silence_of_workers_that_are_gone_is_no_silence():
    silence = silence_of("g")
    silence.gone("g")
    assert silence.hung(10 * HANG_S) == []


def test_silence_knows_the_workers_of_the_last_start_alone():
    silence = silence_of("g")
    silence.here("g", "second", "node", 8)
    assert silence.hung(10 * HANG_S) == []  # they load, and have said nothing yet
    silence.heard("g", 0.0)
    assert silence.hung(10 * HANG_S) == [("node", 8)]


def test_broker_tells_a_trial_that_hangs_alone_again_and_again_what_it_failed_of():
    async def hang(times: int) -> dict:
        broker = Broker(1, one_run=False, hang_s=-1.0)
        ask_all(broker.board, "a")
        await broker.open(1)
        for number in range(times):
            await broker.here("g", str(number), "node", 100 + number)
            assert await broker.begin("g", str(number))
            await broker.hello("g", str(number), {})
            assert await broker.hung() == [("node", 100 + number)]
            await broker.gone(["g"], deaths={"g": "SIGKILL"})
        answer = await broker.row(trial("a"), 0, 0.0)
        assert answer is not None
        return answer["ended"]

    ended = asyncio.run(hang(4))
    assert ended["status"] == "failed"
    assert ended["reason"].endswith("the last time: it was silent for -1 s and was ended")


def test_group_that_starts_when_the_sweep_ends_may_not_load():
    async def begun() -> tuple[bool, bool]:
        broker = Broker(1, False)
        before = await broker.begin("group-0", "first")
        await broker.stop()
        return before, await broker.begin("group-0", "second")

    assert asyncio.run(begun()) == (True, False)
