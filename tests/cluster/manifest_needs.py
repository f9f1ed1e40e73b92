"""Demands for the tests of the manifests, and a machine on which their shell is run for real."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.manifests.need import GIB, ClusterNeed


def make_need(**values: Any) -> ClusterNeed:
    """8 groups of one H100 each, unless said otherwise."""
    plain = {
        "name": "run",
        "num_groups": 8,
        "workers_per_group": 1,
        "cpus_per_worker": 1,
        "gpus_per_worker": 1.0,
        "gpu_name": "H100-80GB",
        "gpus_per_node": 8,
        "worker_memory_bytes": 20 * GIB,
        "disk_bytes": 200 * GIB,
        "spot": False,
        "work_folder": "/mnt/tenfold",
        "storage": "runs",
        "config_text": "model: base\n",
        "image": "registry/tenfold:1",
        "requirements": (),
        "min_python": "3.11",
        "ray_version": "2.60.0",
    }
    return ClusterNeed(**plain | values)


NEEDS = {
    "eight GPUs": make_need(),
    "two nodes": make_need(num_groups=9, cpus_per_worker=4),
    "group over nodes": make_need(num_groups=1, workers_per_group=16),
    "shares of a GPU": make_need(num_groups=5, gpus_per_worker=0.25, gpus_per_node=1),
    "CPUs": make_need(
        num_groups=3, gpus_per_worker=0.0, gpu_name=None, gpus_per_node=0, cpus_per_worker=2
    ),
    "strange names": make_need(
        name="My_Run.v1+b", work_folder="/mnt/it's $HOME", storage="r u n s"
    ),
}

FAKE_RAY = """
import os
from pathlib import Path

def is_initialized():
    return False

def init(address, **options):
    assert address == "auto"
    assert os.environ.get("RAY_ADDRESS") in (None, "10.0.0.7:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token"
    if not Path(os.environ["NODES_FILE"]).exists():
        raise ConnectionError("nobody listens")

def nodes():
    alive = int(Path(os.environ["NODES_FILE"]).read_text())
    return [{"Alive": number < alive} for number in range(99)]
"""
FAKE_COMMAND = """#!/bin/bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
printf '%s\\n' "${RAY_AUTH_TOKEN:-}" >> "$TOKENS"
exit "${FAKE_STATUS:-0}"
"""
FAKE_TENFOLD = """#!PYTHON
import os, sys, time
with open(os.environ["CALLS"], "a") as calls:
    print("tenfold", *sys.argv[1:], file=calls)
    print("cwd", os.getcwd(), file=calls, flush=True)
    try:
        if os.environ.get("FAKE_HANGS"):
            print("hangs", file=calls, flush=True)
            time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", file=calls)
        sys.exit(130)
sys.exit(int(os.environ.get("TENFOLD_STATUS", "0")))
"""


class Machine:
    """A folder that is $HOME and PATH of the scripts: `ray`, `srun`, `scontrol` and `tenfold` write down that
    they were called; python3 is real, and finds a Ray whose nodes are counted in a file."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls_file, self.nodes_file = root, root / "calls", root / "nodes"
        self.home = root / "home"
        self.calls_file.touch()
        fake, bin_folder = root / "lib" / "ray", root / "bin"
        for folder in (fake, bin_folder, self.home):
            folder.mkdir(parents=True)
        (fake / "__init__.py").write_text(FAKE_RAY)
        (fake / "util.py").write_text("def get_node_ip_address():\n    return '10.0.0.7'\n")
        for name in ("ray", "srun", "scontrol"):
            self._command(name, FAKE_COMMAND)
        self._command("tenfold", FAKE_TENFOLD.replace("PYTHON", sys.executable))
        self._command("python3", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        self.environment = {
            "PATH": f"{bin_folder}:{os.defpath}",
            "HOME": str(self.home),
            "PYTHONPATH": str(root / "lib"),
            "NODES_FILE": str(self.nodes_file),
            "CALLS": str(self.calls_file),
            "TOKENS": str(root / "tokens"),
            "SLURM_JOB_ID": "77",
            "SLURMD_NODENAME": "node-1",
        }

    def _command(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, script: str, **environment: str) -> subprocess.Popen[str]:
        """Bash runs a script here."""
        path = self.root / "script.sh"
        path.write_text(script)
        return subprocess.Popen(
            ["bash", str(path)],
            env=self.environment | environment,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As Slurm starts it; tests that run in the background of a shell inherit an ignored SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, **environment: str) -> tuple[int, str]:
        """Exit code and stderr of a script that ends."""
        process = self.start(script, **environment)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def calls(self) -> list[str]:
        """What was called, a line each."""
        return self.calls_file.read_text().splitlines()
