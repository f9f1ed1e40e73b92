"""GPUs as people name them: `8xH100-80GB` is an inventory; what a model of GPU can multiply."""

import re

from cluster.inventory import Inventory

GB = 10**9
"""What a seller's GB is at least: drivers report 1.0 to 1.07 times it (24 GB: 24.1e9 of an A10G, 25.8e9 of
an RTX 4090; 80 GB: 85.5e9 of an H100)."""
CPUS_PER_GPU = 8
"""ASSUMPTION: CPU cores beside a GPU where only GPUs are named; clouds give 6 to 26."""
HOST_BYTES_PER_GPU_BYTE = 2
"""ASSUMPTION: host memory beside a GPU's where only GPUs are named; clouds give 2 to 4 times as much."""

PEAK_BF16_FLOPS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX4090": 165e12,
    "RTX3090": 71e12,
}
"""Dense bf16 multiply-adds, two FLOPs each, a second. Source: NVIDIA's data sheets (SXM where there are two;
tensor cores with fp32 accumulation, without sparsity)."""

MAX_GPUS = 100_000
"""ASSUMPTION: more than the largest clusters for one training have; every count of workers up to it is tried."""
PATTERN = re.compile(
    r"(?:([0-9]{1,6})x)?([0-9]{1,6})x(?:([A-Za-z][A-Za-z0-9]*)-)?([0-9]{1,6}(?:\.[0-9]{1,6})?)GB"
)


def parse_inventory(text: str) -> Inventory:
    """The GPUs that a text names: [NODESx]GPUSx[NAME-]SIZEGB, such as 8xH100-80GB, 2x8xA100-40GB, 1x24GB.

    Raises:
        ValueError: another form, a count of 0, or more GPUs than any cluster has.
    """
    found = PATTERN.fullmatch(text.strip().replace(" ", ""))
    counts = [int(n) for n in found.groups(default="1")[:2]] if found else [0]
    if found is None or not all(counts) or float(found[4]) <= 0:
        raise ValueError(
            f"inventory must be [NODESx]GPUSx[NAME-]SIZEGB, e.g. 8xH100-80GB, 2x8xA100-40GB or 1x24GB, "
            f"got {text!r}"
        )
    nodes, per_node = counts
    if nodes * per_node > MAX_GPUS:
        raise ValueError(f"inventory must be of at most {MAX_GPUS:,} GPUs, got {text!r}")
    gpu_bytes = int(float(found[4]) * GB)
    return Inventory(
        num_cpus=nodes * per_node * CPUS_PER_GPU,
        num_gpus=nodes * per_node,
        where=text.strip(),
        memory_bytes=nodes * per_node * gpu_bytes * HOST_BYTES_PER_GPU_BYTE,
        gpu_bytes=gpu_bytes,
        gpu_name=found[3],
        num_nodes=nodes,
    )


def peak_flops(gpu_name: str | None) -> float | None:
    """Dense bf16 FLOPs a second of a GPU model; None where it is not known."""
    plain = re.sub(r"[^A-Z0-9]", "", (gpu_name or "").upper())
    known = sorted(PEAK_BF16_FLOPS, key=len, reverse=True)  # L40S before L4
    return next((PEAK_BF16_FLOPS[name] for name in known if name in plain), None)
