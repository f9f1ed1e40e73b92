"""What a machine has, and whether a trial can ever run on it."""

import os

import pytest

from cluster.inventory import (
    Inventory,
    TrialDemand,
    local_inventory,
    max_concurrent_trials,
    room_per_worker,
)


def demand(num_workers: int, cpus: int, gpus: float = 0) -> TrialDemand:
    return TrialDemand(num_workers=num_workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


def cluster(num_cpus: int, num_gpus: int = 0) -> Inventory:
    return Inventory(num_cpus=num_cpus, num_gpus=num_gpus, where="the Ray cluster")


@pytest.mark.parametrize(
    ("asked", "present", "expected"),
    [
        (demand(1, 1), cluster(2), 2),
        (demand(2, 1), cluster(2), 1),
        (demand(2, 2), cluster(15), 3),  # 15 // 4
        (demand(1, 1, 1), cluster(16, 8), 8),
        (demand(2, 1, 1), cluster(16, 7), 3),  # 7 // 2
        (demand(1, 4, 1), cluster(16, 8), 4),  # the CPUs end first
        (demand(8, 1, 1), cluster(8, 8), 1),  # just fits
        (demand(1, 1, 0.25), cluster(16, 1), 4),  # four share a GPU
        (demand(1, 1, 0.1), cluster(16, 1), 10),  # 1 // 0.1 is 9
        (demand(1, 1, 0.7), cluster(16, 2), 2),  # nobody takes the rests together
        (demand(1, 1, 0), cluster(4, 8), 4),  # GPUs that nobody asks for do not count
    ],
)
def test_max_concurrent_trials_table_gives_the_scarcest(asked, present, expected):
    assert max_concurrent_trials(asked, present) == expected


@pytest.mark.parametrize(
    ("asked", "present", "needed", "kind", "has"),
    [
        (demand(8, 1, 1), cluster(16, 0), 8, "GPU", 0),
        (demand(8, 1, 1), cluster(16, 7), 8, "GPU", 7),
        (demand(3, 2), cluster(5), 6, "CPU", 5),
        (demand(1, 1), cluster(0), 1, "CPU", 0),
    ],
)
def test_max_concurrent_trials_that_never_fit_are_refused_with_both_numbers(
    asked, present, needed, kind, has
):
    with pytest.raises(ValueError, match=f"a trial needs {needed} {kind}s") as error:
        max_concurrent_trials(asked, present)
    message = str(error.value)
    assert f"the Ray cluster has {has};" in message
    assert f"workers_per_trial {asked.num_workers} x" in message
    assert "\n" not in message


def test_room_per_worker_of_a_shared_gpu_is_its_share():
    gpu = Inventory(num_cpus=8, num_gpus=1, where="here", memory_bytes=1 << 40, gpu_bytes=80 << 30)
    assert room_per_worker(demand(1, 1, 0.25), 4, gpu) == 20 << 30
    assert room_per_worker(demand(1, 1, 1), 1, gpu) == 80 << 30


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a stand-in for nvidia-smi that lists some GPUs before the real one."""

    def install(num_gpus: int) -> None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(num_gpus))
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{lines}exit 0\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 4),
        ("0,1", 2),
        ("3", 1),
        ("GPU-0, GPU-2", 2),
        ("", 0),
        ("-1", 0),
        ("0,1,2,3,4,5", 4),  # no more than there are
    ],
)
def test_local_inventory_gpus_are_those_listed_and_visible(
    nvidia_smi, monkeypatch, visible, expected
):
    nvidia_smi(4)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_inventory().num_gpus == expected


@pytest.mark.parametrize(
    ("lines", "name", "size"),
    [
        (["NVIDIA H100 80GB HBM3, 81559"] * 2, "NVIDIA H100 80GB HBM3", 81559 << 20),
        (["NVIDIA L4, 23034", "Tesla T4, 15360"], None, 15360 << 20),
        (["NVIDIA GB10, [N/A]"], None, None),  # memory that is shared with the CPU
    ],
)
def test_local_inventory_names_the_gpus_and_the_smallest(tmp_path, monkeypatch, lines, name, size):
    script = tmp_path / "nvidia-smi"
    listed = "".join(f"echo 'GPU {i}: x'\n" for i in range(len(lines)))
    queried = "".join(f"echo '{line}'\n" for line in lines)
    script.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n{listed}else\n{queried}fi\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = local_inventory()
    assert (found.num_gpus, found.gpu_name, found.gpu_bytes) == (len(lines), name, size)


@pytest.mark.parametrize("visible", [None, "0,1"])
def test_local_inventory_without_a_driver_has_no_gpu(tmp_path, monkeypatch, visible):
    monkeypatch.setenv("PATH", str(tmp_path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_inventory().num_gpus == 0


def test_local_inventory_cpus_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = os.sched_getaffinity(0)
    one = {min(before)}
    os.sched_setaffinity(0, one)
    try:
        found = local_inventory()
    finally:
        os.sched_setaffinity(0, before)
    assert (found.num_cpus, found.where) == (1, "this machine")
