"""Which machine of a cloud holds a worker node. Only what is certain is listed; for another GPU the user
names the machine."""

from dataclasses import dataclass

from cluster.manifests.need import GIB, ClusterNeed


@dataclass(frozen=True, kw_only=True)
class Instance:
    """A machine type. memory_gib: of the host."""

    name: str
    num_gpus: int
    num_cpus: int
    memory_gib: int

    def holds(self, need: ClusterNeed) -> bool:
        """Whether one worker node of a sweep fits."""
        return (
            self.num_gpus == need.gpus_per_node
            and self.num_cpus >= need.node_cpus
            and self.memory_gib * GIB >= need.node_memory_bytes
        )


def _sizes(family: str, rows: str) -> tuple[Instance, ...]:
    """Rows `size gpus cpus memory`, smallest first."""
    found: list[Instance] = []
    for row in rows.split(","):
        size, *numbers = row.split()
        gpus, cpus, memory = (int(number) for number in numbers)
        found.append(
            Instance(name=f"{family}{size}", num_gpus=gpus, num_cpus=cpus, memory_gib=memory)
        )
    return tuple(found)


_G5_G6 = (
    "xlarge 1 4 16, 2xlarge 1 8 32, 4xlarge 1 16 64, 8xlarge 1 32 128, 16xlarge 1 64 256, "
    "12xlarge 4 48 192, 24xlarge 4 96 384, 48xlarge 8 192 768"
)
# Source: the providers' pages of machine types (aws.amazon.com/ec2/instance-types, accelerated computing
# and M5; cloud.google.com/compute/docs/gpus and accelerator-optimized-machines, general-purpose-machines).
INSTANCES: dict[str, dict[str | None, tuple[Instance, ...]]] = {
    "aws": {
        None: _sizes(
            "m5.",
            "large 0 2 8, xlarge 0 4 16, 2xlarge 0 8 32, 4xlarge 0 16 64, 8xlarge 0 32 128, "
            "12xlarge 0 48 192, 16xlarge 0 64 256, 24xlarge 0 96 384",
        ),
        "A10G-24GB": _sizes("g5.", _G5_G6),
        "L4-24GB": _sizes("g6.", _G5_G6),
        "L40S-48GB": _sizes(
            "g6e.",
            "xlarge 1 4 32, 2xlarge 1 8 64, 4xlarge 1 16 128, 8xlarge 1 32 256, 16xlarge 1 64 512, "
            "12xlarge 4 48 384, 24xlarge 4 96 768, 48xlarge 8 192 1536",
        ),
        "A100-40GB": _sizes("p4d.", "24xlarge 8 96 1152"),
        "A100-80GB": _sizes("p4de.", "24xlarge 8 96 1152"),
        "H100-80GB": _sizes("p5.", "48xlarge 8 192 2048"),
    },
    "gcp": {
        None: _sizes(
            "n2-standard-",
            "2 0 2 8, 4 0 4 16, 8 0 8 32, 16 0 16 64, 32 0 32 128, 48 0 48 192, 64 0 64 256, "
            "80 0 80 320, 96 0 96 384, 128 0 128 512",
        ),
        "L4-24GB": _sizes(
            "g2-standard-",
            "4 1 4 16, 8 1 8 32, 12 1 12 48, 16 1 16 64, 32 1 32 128, 24 2 24 96, 48 4 48 192, "
            "96 8 96 384",
        ),
        "A100-40GB": _sizes("a2-highgpu-", "1g 1 12 85, 2g 2 24 170, 4g 4 48 340, 8g 8 96 680"),
        "A100-80GB": _sizes("a2-ultragpu-", "1g 1 12 170, 2g 2 24 340, 4g 4 48 680, 8g 8 96 1360"),
        "H100-80GB": _sizes("a3-highgpu-", "8g 8 208 1872"),
    },
}
HEADS = {"aws": "m5.2xlarge", "gcp": "n2-standard-8"}
"""ASSUMPTION: 8 CPUs and 32 GiB hold the driver, which tokenizes the data, and Ray's head."""


def worker_instance(provider: str, need: ClusterNeed) -> str:
    """The smallest listed machine that holds a worker node.

    Raises:
        ValueError: the GPU is not listed for the provider, or no listed machine is large enough.
    """
    listed = INSTANCES[provider].get(need.gpu_name)
    if listed is None:
        known = ", ".join(name for name in INSTANCES[provider] if name)
        raise ValueError(
            f"no {provider} machine is known here for {need.gpu_name} (known: {known}); name one with "
            "--instance-type"
        )
    fitting = [instance for instance in listed if instance.holds(need)]
    if fitting:
        return fitting[0].name
    offered = "; ".join(
        f"{item.name}: {item.num_gpus} GPU(s), {item.num_cpus} CPUs, {item.memory_gib} GiB"
        for item in listed
    )
    raise ValueError(
        f"a worker node must have {need.gpus_per_node} GPU(s), {need.node_cpus} CPUs and "
        f"{need.node_memory_bytes / GIB:.0f} GiB, {provider} has ({offered}); change --gpus-per-node, or "
        "name a machine with --instance-type"
    )
