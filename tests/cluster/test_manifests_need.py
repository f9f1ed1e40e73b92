"""The demand of a sweep, and the nodes that hold it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.manifests.instances import INSTANCES, Instance, worker_instance
from cluster.manifests.need import (
    GIB,
    MAX_NAME,
    RAY_NODE_BYTES,
    need_sentence,
    resource_name,
)
from tests.cluster.manifest_needs import make_need

DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


# groups, workers of one, GPUs of a worker, GPUs of a node -> nodes, most workers of a node; by hand.
SIZES = [
    (1, 1, 1.0, 1, 1, 1),
    (8, 1, 1.0, 8, 1, 8),
    (9, 1, 1.0, 8, 2, 8),
    (3, 3, 1.0, 8, 2, 6),  # two whole groups on the first node, 2 of its GPUs idle
    (1, 8, 1.0, 8, 1, 8),
    (1, 9, 1.0, 8, 2, 8),  # does not fit one node
    (2, 12, 1.0, 8, 3, 8),  # 24 workers fill three nodes
    (1, 16, 1.0, 4, 4, 4),
    (5, 1, 0.25, 1, 2, 4),
    (10, 1, 0.1, 1, 1, 10),  # 1 // 0.1 is 9
    (3, 2, 2.0, 8, 2, 4),  # 4 workers of 2 GPUs on a node: two groups
    (4, 3, 0.0, 0, 4, 3),  # CPUs: a group a node
]


@pytest.mark.parametrize(("groups", "workers", "gpus", "node", "nodes", "most"), SIZES)
def test_need_nodes_of_known_demands_are_counted_by_hand(groups, workers, gpus, node, nodes, most):
    need = make_need(
        num_groups=groups,
        workers_per_group=workers,
        gpus_per_worker=gpus,
        gpus_per_node=node,
        gpu_name="H100-80GB" if gpus else None,
        cpus_per_worker=3,
    )
    assert (need.num_nodes, need.node_workers) == (nodes, most)
    assert need.node_cpus == 3 * most
    assert need.node_memory_bytes == most * 20 * GIB + RAY_NODE_BYTES


def nodes_by_filling(groups: int, workers: int, per_node: int) -> int:
    """Nodes that are opened one by one, as they are needed: whole groups where a group fits a node."""
    nodes, left = 0, 0
    for _ in range(groups):
        if workers <= per_node:
            if left < workers:
                nodes, left = nodes + 1, per_node
            left -= workers
            continue
        missing = workers
        while missing:
            if not left:
                nodes, left = nodes + 1, per_node
            taken = min(left, missing)
            missing, left = missing - taken, left - taken
    return nodes


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 8))
def test_need_nodes_equal_those_of_filling_them_one_by_one(groups, workers, per_node):
    need = make_need(num_groups=groups, workers_per_group=workers, gpus_per_node=per_node)
    assert need.num_nodes == nodes_by_filling(groups, workers, per_node)
    assert need.num_idle_gpus == need.num_nodes * per_node - groups * workers >= 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"gpu_name": None}, "gpu_name and gpus_per_node must be given exactly"),
        ({"gpus_per_node": 0}, "gpu_name and gpus_per_node must be given exactly"),
        ({"gpus_per_worker": 0.0}, "gpu_name and gpus_per_node must be given exactly"),
        ({"gpus_per_worker": 1.5}, "must be 0, a share below 1, or whole, got 1.5"),
        ({"gpus_per_worker": 4.0, "gpus_per_node": 2}, "a node must hold a worker"),
        ({"work_folder": "here"}, "work_folder must be an absolute path, got 'here'"),
        ({"optional_secrets": ("A B",)}, "a secret must be the name of a variable, got 'A B'"),
    ],
)
def test_need_that_no_cluster_can_have_is_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_need(**values)


def test_need_sentence_names_idle_gpus_where_there_are_some():
    assert "2 worker node(s) of 8 GPU(s), 7 of them idle" in need_sentence(make_need(num_groups=9))
    assert "idle" not in need_sentence(make_need(num_groups=8))


NAMES = [
    "run",
    "Run",
    "my_run.v1",
    "my-run-v1",
    "a" * 200,
    "é",
    "3.1-8B-x",
    "x-",
    "a" * 32,
    "a" * 33,
]


@pytest.mark.parametrize("name", NAMES)
def test_resource_name_of_any_run_is_a_dns_label_of_allowed_length(name):
    assert DNS_1035.match(resource_name(name))
    assert len(resource_name(name)) <= MAX_NAME


def test_resource_name_of_two_runs_is_never_the_same():
    assert len({resource_name(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("provider", "values", "expected"),
    [
        ("aws", {}, "p5.48xlarge"),
        ("aws", {"gpu_name": "L4-24GB", "gpus_per_node": 1, "num_groups": 1}, "g6.2xlarge"),
        ("aws", {"gpu_name": "L4-24GB", "gpus_per_node": 4, "num_groups": 4}, "g6.12xlarge"),
        ("gcp", {"gpu_name": "A100-80GB", "gpus_per_node": 2, "num_groups": 2}, "a2-ultragpu-2g"),
        ("gcp", {}, "a3-highgpu-8g"),
    ],
)
def test_worker_instance_is_the_smallest_that_holds_a_node(provider, values, expected):
    assert worker_instance(provider, make_need(**values)) == expected


def test_worker_instance_holds_memory_to_the_last_byte():
    # g6.2xlarge has 32 GiB: 26 for the worker and 6 for Ray.
    def chosen(num_bytes: int) -> str:
        small = {"gpu_name": "L4-24GB", "gpus_per_node": 1, "num_groups": 1}
        return worker_instance("aws", make_need(worker_memory_bytes=num_bytes, **small))

    assert RAY_NODE_BYTES == 6 * GIB
    assert chosen(26 * GIB) == "g6.2xlarge"
    assert chosen(26 * GIB + 1) == "g6.4xlarge"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_name": "B300-288GB"}, "no aws machine is known here for B300-288GB"),
        ({"gpus_per_node": 4, "num_groups": 4}, "p5.48xlarge: 8 GPU(s), 192 CPUs, 2048 GiB"),
        ({"cpus_per_worker": 25}, "must have 8 GPU(s), 200 CPUs"),
        ({"worker_memory_bytes": 300 * GIB}, "2406 GiB, aws has"),
    ],
)
def test_worker_instance_that_is_not_known_is_refused_with_the_flag_that_helps(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        worker_instance("aws", make_need(**values))
    assert "--instance-type" in str(error.value)


def test_instances_of_a_gpu_are_listed_smallest_first_with_gpus_that_the_name_says():
    for listed in (rows for table in INSTANCES.values() for rows in table.items()):
        gpu, machines = listed
        keys = [(item.num_gpus, item.num_cpus, item.memory_gib) for item in machines]
        assert keys == sorted(keys)
        assert all(
            isinstance(item, Instance) and bool(item.num_gpus) == bool(gpu) for item in machines
        )
