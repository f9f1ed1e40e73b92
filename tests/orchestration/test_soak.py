"""A small soak: what benchmarks/soak.py does with 1,000 candidates."""

from collections import Counter

import pytest

from benchmarks.soak import arguments, soak
from benchmarks.soak_worker import FAULTS
from trainers.paths import RunPaths


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.faults
def test_soak_accounts_for_every_candidate(tmp_path):
    sizes = ["--candidates", "24", "--fault-frac", "0.25", "--driver-kills", "1"]
    args = arguments([*sizes, "--actor-kills", "1", "--seed", "162"])
    found = soak(RunPaths(tmp_path / "run"), args)
    assert found["faults"] == dict.fromkeys(FAULTS, 1)  # of this seed
    assert found["kills"]["driver"] == 1
    assert sum(found["kills"].values()) > 1
    assert (found["lost"], found["unexpected"], found["decided_twice"]) == ([], {}, 0)
    ends = Counter(found["ends"])
    assert ends.total() == 24
    assert ends["failed"] == 2  # killed whenever it enters, and told to fail
    assert ends["diverged"] == 1
    assert found["damaged_files_mended"] >= 2 * found["trials_damaged"]
