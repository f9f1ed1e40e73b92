"""What a sweep asks of a cluster, and the nodes that hold it. Every manifest is written from this alone."""

import hashlib
import math
import re
from dataclasses import dataclass

from cluster.inventory import workers_per_gpu

GIB = 1 << 30
RAY_NODE_BYTES = 6 * GIB
"""ASSUMPTION: host memory of Ray's own processes and its object store on a node. Tenfold's tensors do not
pass through the store; see OBJECT_STORE_BYTES."""
OBJECT_STORE_BYTES = 2 * GIB
"""Of Ray's object store on a node. Ray would take 30% of the node's memory, which loading the base needs."""
MAX_NAME = 40
"""Characters of a name: KubeRay refuses a RayJob above 47, and Ray's launcher a Google Cloud node name
above 55, to which it adds `ray-` and `-worker`."""
ENVIRONMENT_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


@dataclass(frozen=True, kw_only=True)
class ClusterNeed:
    """A sweep's demand.

    Args:
        name: folder name of the run.
        num_groups: worker groups at once, >= 1.
        workers_per_group: >= 1.
        cpus_per_worker: >= 1.
        gpus_per_worker: 0 on CPUs; a share of one below 1; else whole.
        gpu_name: model and memory, as H100-80GB; None on CPUs.
        gpus_per_node: of a worker node; 0 on CPUs.
        worker_memory_bytes: host memory of one worker at its peak, which is while it loads the base.
        disk_bytes: of a node, for the image, the libraries and the base.
        spot: worker nodes may be taken away; the head never.
        work_folder: absolute; shared by all nodes; where the relative paths of sweep.yaml start.
        storage: folder of the runs, as the nodes see it; relative to work_folder or absolute.
        config_text: sweep.yaml.
        image: container image of every node; None: the nodes' own Python.
        requirements: what pip installs on a node that has no image.
        min_python: oldest Python that a node may have.
        ray_version: Ray's, as the sweep was planned with.
        required_secrets, optional_secrets: environment variables that must, and that may, be there;
            they are passed on by reference, never by value.
    """

    name: str
    num_groups: int
    workers_per_group: int
    cpus_per_worker: int
    gpus_per_worker: float
    gpu_name: str | None
    gpus_per_node: int
    worker_memory_bytes: int
    disk_bytes: int
    spot: bool
    work_folder: str
    storage: str
    config_text: str
    image: str | None
    requirements: tuple[str, ...]
    min_python: str
    ray_version: str
    required_secrets: tuple[str, ...] = ()
    optional_secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = ("num_groups", "workers_per_group", "cpus_per_worker", "worker_memory_bytes")
        for name in (*counts, "disk_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_gpus(self)
        if not self.work_folder.startswith("/"):
            raise ValueError(f"work_folder must be an absolute path, got {self.work_folder!r}")
        for name in self.secrets:
            if not ENVIRONMENT_NAME.fullmatch(name):
                raise ValueError(f"a secret must be the name of a variable, got {name!r}")

    @property
    def secrets(self) -> tuple[str, ...]:
        """All variables that are passed on by reference."""
        return self.required_secrets + self.optional_secrets

    @property
    def node_capacity(self) -> int:
        """Workers that a node's GPUs hold. Without GPUs a node holds one group."""
        if not self.gpus_per_worker:
            return self.workers_per_group
        if self.gpus_per_worker < 1:
            return self.gpus_per_node * workers_per_gpu(self.gpus_per_worker)
        return int(self.gpus_per_node // self.gpus_per_worker)

    @property
    def node_workers(self) -> int:
        """Most workers that one node is given. A group that fits a node is not divided."""
        groups = self.node_capacity // self.workers_per_group
        if groups == 0:
            return self.node_capacity
        return min(groups, self.num_groups) * self.workers_per_group

    @property
    def num_nodes(self) -> int:
        """Worker nodes. Groups that do not fit one node fill theirs one after the other."""
        return math.ceil(self.num_groups * self.workers_per_group / self.node_workers)

    @property
    def node_cpus(self) -> int:
        """CPUs that a worker node gives Ray. No more than its workers take: that is what keeps a group
        from being divided."""
        return self.node_workers * self.cpus_per_worker

    @property
    def node_memory_bytes(self) -> int:
        """Host memory of a worker node."""
        return self.node_workers * self.worker_memory_bytes + RAY_NODE_BYTES

    @property
    def num_idle_gpus(self) -> int:
        """GPUs of the worker nodes that no worker asks for."""
        asked = self.num_groups * self.workers_per_group * self.gpus_per_worker
        return self.num_nodes * self.gpus_per_node - math.ceil(round(asked, 6))


def _check_gpus(need: ClusterNeed) -> None:
    share = need.gpus_per_worker
    if share < 0 or (share > 1 and share != int(share)):
        raise ValueError(f"gpus_per_worker must be 0, a share below 1, or whole, got {share:g}")
    if bool(share) != bool(need.gpu_name) or bool(share) != bool(need.gpus_per_node):
        raise ValueError(
            "gpu_name and gpus_per_node must be given exactly where gpus_per_worker is above 0, got "
            f"{need.gpu_name!r}, {need.gpus_per_node} and {share:g}"
        )
    if share and need.node_capacity < 1:
        raise ValueError(
            f"a node must hold a worker, which takes {share:g} GPUs, got gpus_per_node {need.gpus_per_node}"
        )


def resource_name(run_name: str) -> str:
    """A name that Kubernetes and the clouds take (DNS-1035) for a run of any name.

    What had to be changed is told apart by a hash, so that two runs never share a name.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    name = f"tenfold-{plain}" if plain else "tenfold"
    if plain == run_name and len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:6]
    return f"{name[: MAX_NAME - len(digest) - 1].rstrip('-')}-{digest}"


def need_sentence(need: ClusterNeed) -> str:
    """The demand and the nodes that hold it, in one line."""
    gpus = f" and {need.gpus_per_worker:g} {need.gpu_name}" if need.gpu_name else ""
    nodes = f"{need.num_nodes} worker node(s)"
    nodes += f" of {need.gpus_per_node} GPU(s)" if need.gpu_name else " without GPUs"
    idle = f", {need.num_idle_gpus} of them idle" if need.num_idle_gpus else ""
    return (
        f"{need.name}: {need.num_groups} group(s) of {need.workers_per_group} worker(s) with "
        f"{need.cpus_per_worker} CPU(s){gpus} and {need.worker_memory_bytes / GIB:.1f} GiB of host memory "
        f"each: {nodes}{idle}"
    )
