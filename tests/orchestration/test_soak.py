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
    sizes = ["--candidates", "60", "--fault-frac", "0.3", "--driver-kills", "1"]
    args = arguments([*sizes, "--actor-kills", "3", "--seed", "2"])
    found = soak(RunPaths(tmp_path / "run"), args)
    assert set(found["faults"]) == set(FAULTS)  # of this seed
    assert found["kills"]["driver"] == 1
    assert sum(found["kills"].values()) > 1
    assert (found["lost"], found["unexpected"], found["decided_twice"]) == ([], {}, 0)
    ends = Counter(found["ends"])
    assert ends.total() == 60
    assert ends["failed"] == found["faults"]["kill"] + found["faults"]["fail"]
    assert ends["diverged"] == found["faults"]["diverge"]
    assert found["damaged_files_mended"] >= found["faults"]["damage"]
