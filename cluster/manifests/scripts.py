"""The shell that every manifest runs on its head: wait for the nodes, then go on with the run or begin it."""

import shlex

from cluster.manifests.need import ClusterNeed

POLL_S = 5

INIT_GRACE_S = 30
"""Where nobody listens, ray.init itself waits for minutes; this long after the limit it is given up."""

# Counted from inside: a raylet is one of the cluster only once the head knows it.
WAIT_FOR_NODES = """\
import os, sys, threading, time
wanted, limit_s, poll_s, grace_s = int(sys.argv[1]), *map(float, sys.argv[2:])
joined, deadline = 0, time.monotonic() + limit_s

def give_up():
    print(f"tenfold: {joined} of {wanted} nodes joined the Ray cluster within {limit_s:g} s; see the logs of "
          "the nodes that are missing, or ask for fewer with --groups", file=sys.stderr, flush=True)
    os._exit(1)

watch = threading.Timer(limit_s + grace_s, give_up)
watch.daemon = True
watch.start()
import ray
while joined < wanted:
    try:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, logging_level="error")
        joined = sum(bool(node["Alive"]) for node in ray.nodes())
    except ConnectionError as error:
        print(f"tenfold: no Ray cluster yet: {error}", file=sys.stderr, flush=True)
    if joined < wanted:
        if time.monotonic() >= deadline:
            give_up()
        time.sleep(poll_s)
"""


def wait_for_nodes(num_nodes: int, limit_s: int) -> str:
    """Shell that returns once so many nodes (the head is one) are alive, and fails after a limit."""
    return f"python3 - {num_nodes} {limit_s} {POLL_S} {INIT_GRACE_S} <<'PYTHON'\n{WAIT_FOR_NODES}PYTHON"


def restore_or_start(need: ClusterNeed, config: str) -> str:
    """Shell that goes on with the run where it is on the storage, a folder or a URL, else begins it.

    It replaces the shell by `tenfold`, so that a signal to the one reaches the other.

    Args:
        config: path of sweep.yaml as a word of the shell, quoted where it must be.
    """
    return "\n".join(
        (
            f"cd -- {shlex.quote(need.work_folder)}",
            f"exec tenfold sweep {config} --name {shlex.quote(need.name)} --address auto --resume",
        )
    )


def head_script(need: ClusterNeed, config: str, *, limit_s: int, prelude: str = "") -> str:
    """A whole script for the head of a cluster that somebody else starts.

    Args:
        limit_s: how long it waits for the worker nodes.
        prelude: lines before everything else.
    """
    return "\n".join(
        (
            "#!/usr/bin/env bash",
            "set -euo pipefail",
            *([prelude] if prelude else []),
            wait_for_nodes(need.num_nodes + 1, limit_s),
            restore_or_start(need, config),
            "",
        )
    )
