"""A node without Tenfold, and what tests ask of the nodes of a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from cluster.inventory import TrialDemand
from orchestration.preflight import Needs
from tests.orchestration.sweeps import BASE, FUNCTIONS

CPU = TrialDemand(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)


def start_node(address: str, private: Path, log: Path) -> subprocess.Popen[bytes]:
    """A raylet that finds neither our packages nor what the driver writes into `private`."""
    site = Path(yaml.__file__).parents[1]
    (tenfold,) = site.glob("__editable__*tenfold*.pth")
    ray = Path(sys.executable).with_name("ray")
    script = (
        f"mount -t tmpfs tmpfs {private} && mount --bind /dev/null {tenfold} && "
        f"exec {ray} start --address={address} --num-cpus=1 --block --disable-usage-stats"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with log.open("wb") as file:
        return subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
            cwd="/",
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def needs_on(storage: Path, model: Path = BASE, storage_bytes: int = 1) -> Needs:
    return Needs(
        model=str(model),
        revision=None,
        inputs=(str(FUNCTIONS),),
        storage=str(storage),
        demand=CPU,
        storage_bytes=storage_bytes,
    )


def on_node(node: str, function: object, *arguments: object, **options: object) -> object:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=strategy, **options)
    return ray.get(task.remote(*arguments))
