"""An sbatch script: a Ray cluster on the job's nodes, the sweep on the first of them.

Slurm's nodes are alike, so that the first is head and worker. Preemption and the end of the time limit come
as a signal two minutes before; the sweep is then told to stop, and the job is queued again and goes on.
"""

import re
import shlex
from dataclasses import dataclass

from cluster.manifests.need import GIB, OBJECT_STORE_BYTES, ClusterNeed, resource_name
from cluster.manifests.scripts import restore_or_start, wait_for_nodes

NODES_LIMIT_S = 600
SIGNAL_S = 120
STOP_LIMIT_S = 90
"""What is left of the two minutes is for queueing the job again."""
DRIVER_BYTES = 8 * GIB
"""ASSUMPTION: of the driver, which tokenizes the data beside the workers of the first node."""
SBATCH_OPTION = re.compile(r"^(?P<name>[a-z][a-z0-9-]*)(=[\w@%+=:,./\[\]-]+)?$")
OURS = {
    "job-name",
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "gpus-per-node",
    "mem",
    "exclusive",
    "signal",
    "requeue",
    "no-kill",
    "open-mode",
}

_START = """\
unset RAY_ADDRESS  # of a cluster that the submitting shell knew
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN

workers=
joining=
cleanup() {
  trap - EXIT
  for process in $workers $joining; do
    kill "$process" 2>/dev/null || true
  done
  ray stop --force >/dev/null 2>&1 || true
}
trap cleanup EXIT
trap 'cleanup; scontrol requeue "$SLURM_JOB_ID"; exit 1' USR1

head_ip="$(python3 -c 'from ray.util import get_node_ip_address; print(get_node_ip_address())')"
ray start --head --node-ip-address="$head_ip" --port=6379 --dashboard-host=127.0.0.1 "${resources[@]}"
if [ "$num_nodes" -gt 1 ]; then
  # The batch script runs on the first node of the allocation.
  srun --nodes=$((num_nodes - 1)) --ntasks=$((num_nodes - 1)) --exclude="$SLURMD_NODENAME" \\
    --no-kill --kill-on-bad-exit=0 "${step[@]}" \\
    ray start --address="$head_ip:6379" --block "${resources[@]}" &
  workers=$!
fi
export RAY_ADDRESS="$head_ip:6379"  # what `auto` means below
# Not in the foreground, where a signal would wait for it to end.
all_joined &
joining=$!
wait "$joining"
joining=
"""

_RUN = """\
# Job control: else a process in the background ignores the interrupt that it is sent below.
set -m
run_sweep &
driver=$!
set +m

signalled=
stop_driver() {
  signalled="$1"
  kill -INT "$driver" 2>/dev/null || return 0
  for _ in $(seq "$stop_limit_s"); do
    kill -0 "$driver" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL -- "-$driver" 2>/dev/null || true
}
trap 'stop_driver USR1' USR1
trap 'stop_driver TERM' TERM

while :; do
  told="$signalled"
  status=0
  wait "$driver" || status=$?
  # A wait that a signal interrupts has not seen how the driver ended.
  [ "$told" != "$signalled" ] || break
done
cleanup
if [ "$signalled" = USR1 ] && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What the site asks for.

    Args:
        config_file: absolute path of sweep.yaml on the shared file system.
        sbatch: further options, `NAME` or `NAME=VALUE` (partition=gpu, time=24:00:00).
        stop_limit_s: how long the driver may take to stop.
    """

    config_file: str
    sbatch: tuple[str, ...] = ()
    stop_limit_s: int = STOP_LIMIT_S


def slurm_script(need: ClusterNeed, options: SlurmOptions) -> str:
    """The script for `sbatch`.

    Raises:
        ValueError: an option that sbatch cannot have, or that is set here.
    """
    _check(need, options)
    lines = [
        "#!/bin/bash",
        *_directives(need, options),
        "set -euo pipefail",
        "",
        f"num_nodes={need.num_nodes}",
        f"stop_limit_s={options.stop_limit_s}",
        f"resources=({shlex.join(_ray_resources(need))})",
        f"step=({shlex.join(_step(need))})",
        "run_sweep() {",
        restore_or_start(need, shlex.quote(options.config_file)),
        "}",
        "all_joined() {",
        f"exec {wait_for_nodes(need.num_nodes, NODES_LIMIT_S)}",
        "}",
        "",
        _START,
        _RUN,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _check(need: ClusterNeed, options: SlurmOptions) -> None:
    if need.image:
        raise ValueError("slurm takes no --image: the job runs in the environment that submits it")
    if need.spot:
        raise ValueError(
            "slurm takes no --spot: name a partition or QOS that may be preempted with --sbatch"
        )
    for option in options.sbatch:
        found = SBATCH_OPTION.fullmatch(option)
        if not found:
            raise ValueError(f"--sbatch must be NAME or NAME=VALUE without spaces, got {option!r}")
        if found["name"] in OURS:
            raise ValueError(f"--sbatch {found['name']} is set from the plan; leave it out")


def _directives(need: ClusterNeed, options: SlurmOptions) -> list[str]:
    name = resource_name(need.name)
    memory_mib = -(-(need.node_memory_bytes + DRIVER_BYTES) // (1 << 20))
    found = [
        f"job-name={name}",
        f"nodes={need.num_nodes}",
        "ntasks-per-node=1",
        f"cpus-per-task={need.node_cpus}",
        *([f"gpus-per-node={need.gpus_per_node}"] if need.gpus_per_node else []),
        f"mem={memory_mib}M",
        "exclusive",
        f"signal=B:USR1@{SIGNAL_S}",
        "requeue",
        "no-kill",  # the other nodes go on when one dies
        "open-mode=append",
    ]
    if not any(option.startswith("output=") for option in options.sbatch):
        found.append(f"output={name}-%j.log")
    return [f"#SBATCH --{option}" for option in (*found, *options.sbatch)]


def _step(need: ClusterNeed) -> list[str]:
    # Since Slurm 22.05 a step does not inherit its job's CPUs per task.
    gpus = [f"--gpus-per-node={need.gpus_per_node}"] if need.gpus_per_node else []
    return ["--ntasks-per-node=1", f"--cpus-per-task={need.node_cpus}", *gpus]


def _ray_resources(need: ClusterNeed) -> list[str]:
    return [
        f"--num-cpus={need.node_cpus}",
        f"--num-gpus={need.gpus_per_node}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]
