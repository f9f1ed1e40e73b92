"""A pack whose worker dies at any forward: each of its trials ends in the bits of an undisturbed one."""

import pytest

from tests.trainers.deaths import Deaths, Pack, shared
from tests.trainers.links import Killed
from trainers.paths import TrialPaths


@pytest.fixture
def make(data_file, tmp_path, tiny_folder):
    return lambda name: Pack(data_file, tmp_path, tiny_folder, name)


def test_pack_killed_before_any_forward_ends_in_the_bits_of_an_undisturbed_one(make, monkeypatch):
    whole = Deaths(monkeypatch).assert_same_after_any(make, least=11)
    assert shared(whole.log) > 4


def test_pack_killed_again_while_it_does_its_forwards_again(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    whole, pack = make("whole"), make("killed")
    whole.serve()
    for killed_at in (9, 2, 4, 7):
        deaths.count, deaths.killed_at = 0, killed_at
        with pytest.raises(Killed):
            pack.serve()
    deaths.killed_at = 0
    pack.serve()
    assert pack.results() == whole.results()


def test_pack_without_its_log_ends_in_numbers_that_differ_by_rounding_alone(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    whole, pack = make("whole"), make("killed")
    whole.serve()
    deaths.count, deaths.killed_at = 0, 9
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    pack.serve(remember=False)
    found, expected = pack.results(), whole.results()
    assert found != expected  # or the log would not be needed, and the test above not show anything
    for key, rows in expected.items():
        assert [row["eval_loss"] for row in found[key]] == pytest.approx(
            [row["eval_loss"] for row in rows], abs=1e-5
        )


def test_pack_whose_log_is_damaged_trains_on_without_it(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    pack = make("killed")
    deaths.killed_at = 9
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    lines = pack.log.read_text().splitlines(keepends=True)
    pack.log.write_text("".join([*lines[:5], lines[5][:-3] + '0"}\n', *lines[6:]]))
    pack.serve()
    assert all(TrialPaths(spec.folder).status.exists() for spec in pack.specs.values())
    assert shared(pack.log) > 0


def test_ghosts_leave_the_pack_when_all_is_done_again(make, monkeypatch):
    deaths = Deaths(monkeypatch)
    pack = make("killed")
    deaths.killed_at = 10
    with pytest.raises(Killed):
        pack.serve()
    deaths.killed_at = 0
    server = pack.serve()
    assert server.station is not None
    assert not server.station.pack.slots
    assert server.replay is None
