"""The sbatch script: checked by bash, and run with stand-ins for Slurm's, Ray's and our commands."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.manifests import scripts, slurm
from cluster.manifests.need import ClusterNeed
from cluster.manifests.slurm import DRIVER_BYTES, SlurmOptions, slurm_script
from tests.cluster.manifest_needs import NEEDS, Machine, make_need

DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", re.MULTILINE)
SLURM_NEEDS = {key: make_need(**vars(need) | {"image": None}) for key, need in NEEDS.items()}


def directives(script: str) -> dict[str, str]:
    """What sbatch reads: the comments before the first command."""
    return dict(DIRECTIVE.findall(script.partition("\nset -euo pipefail\n")[0]))


def here(machine: Machine, **values) -> tuple[ClusterNeed, SlurmOptions]:
    """A need whose shared folder is on this machine."""
    work = machine.root / "it's work"
    work.mkdir(exist_ok=True)
    need = make_need(work_folder=str(work), image=None, **values)
    return need, SlurmOptions(config_file=str(work / "my sweep.yaml"))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    found = Machine(tmp_path)
    found.nodes_file.write_text("1")
    return found


def wait_for(machine: Machine, call: str) -> None:
    """Returns when a command was called."""
    for _ in range(600):
        if any(line.startswith(call) for line in machine.calls()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{call!r} was not called within 30 s: {machine.calls()}")


@pytest.mark.parametrize("need", SLURM_NEEDS.values(), ids=SLURM_NEEDS)
def test_slurm_script_is_valid_bash_and_its_numbers_equal_the_need(need):
    script = slurm_script(need, SlurmOptions(config_file="/it's/sweep.yaml"))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    found = directives(script)
    assert int(found["nodes"]) == need.num_nodes
    assert int(found["cpus-per-task"]) == need.node_cpus
    assert found.get("gpus-per-node") == (str(need.gpus_per_node) if need.gpu_name else None)
    mebibytes = int(found["mem"].removesuffix("M"))
    assert mebibytes == -(-(need.node_memory_bytes + DRIVER_BYTES) // 2**20)
    assert found["signal"] == "B:USR1@120"
    assert {"exclusive", "requeue", "no-kill"} <= found.keys()
    assert f"--num-cpus={need.node_cpus} --num-gpus={need.gpus_per_node}" in script


def test_slurm_script_takes_the_options_of_the_site():
    options = SlurmOptions(config_file="/s", sbatch=("partition=gpu", "output=x-%j.log", "hold"))
    found = directives(slurm_script(make_need(image=None), options))
    assert (found["partition"], found["output"], found["hold"]) == ("gpu", "x-%j.log", "")


@pytest.mark.parametrize(
    ("values", "sbatch", "message"),
    [
        ({}, ("partition=a b",), "--sbatch must be NAME or NAME=VALUE without spaces"),
        ({}, ("x=1\n#SBATCH --y",), "--sbatch must be NAME or NAME=VALUE"),
        ({}, ("nodes=4",), "--sbatch nodes is set from the plan"),
        ({"image": "i"}, (), "slurm takes no --image"),
        ({"spot": True}, (), "slurm takes no --spot"),
    ],
)
def test_slurm_option_that_cannot_be_had_is_refused(values, sbatch, message):
    need = make_need(**{"image": None} | values)
    with pytest.raises(ValueError, match=re.escape(message)):
        slurm_script(need, SlurmOptions(config_file="/s", sbatch=sbatch))


def test_slurm_run_starts_the_run_or_goes_on_with_it(machine):
    need, options = here(machine, name="My_Run.v1", storage="r u n s")
    script = slurm_script(need, options)
    assert machine.run(script, TENFOLD_STATUS="1") == (1, "")
    sweep = f"tenfold sweep {options.config_file} --name My_Run.v1 --address auto --resume"
    calls = machine.calls()
    assert calls[0].startswith("ray start --head --node-ip-address=10.0.0.7 --port=6379")
    assert calls[1:] == [sweep, f"cwd {need.work_folder}", "ray stop --force"]


def test_slurm_run_of_many_nodes_joins_them_with_a_token_that_is_made_for_the_job(machine):
    need, options = here(machine, num_groups=17)
    machine.nodes_file.write_text("3")
    script = slurm_script(need, options)
    for _ in range(2):
        assert machine.run(script, RAY_ADDRESS="another:6379")[0] == 0
    head, join = machine.calls()[0], next(c for c in machine.calls() if c.startswith("srun"))
    assert "--dashboard-host=127.0.0.1" in head
    assert join.startswith("srun --nodes=2 --ntasks=2 --exclude=node-1 ")
    assert "ray start --address=10.0.0.7:6379 --block --num-cpus=8 --num-gpus=8" in join
    tokens = set((machine.root / "tokens").read_text().split())
    assert len(tokens) == 2
    assert all(len(token) == 64 and token not in script for token in tokens)


def test_slurm_run_whose_nodes_do_not_join_fails_with_one_line_and_trains_nothing(
    machine, monkeypatch
):
    monkeypatch.setattr(slurm, "NODES_LIMIT_S", 0)
    need, options = here(machine, num_groups=17)
    status, errors = machine.run(slurm_script(need, options))
    assert status == 1
    assert errors.strip() == (
        "tenfold: 1 of 3 nodes joined the Ray cluster within 0 s; see the logs of the nodes that are "
        "missing, or ask for fewer with --groups"
    )
    assert not any(line.startswith("tenfold") for line in machine.calls())
    assert machine.calls()[-1] == "ray stop --force"


def test_slurm_run_whose_head_is_not_there_says_so(machine, monkeypatch):
    monkeypatch.setattr(slurm, "NODES_LIMIT_S", 0)
    machine.nodes_file.unlink()
    status, errors = machine.run(slurm_script(*here(machine)))
    assert status == 1
    assert "no Ray cluster yet: nobody listens" in errors
    assert "0 of 1 nodes joined the Ray cluster within 0 s" in errors


def test_slurm_run_whose_head_never_answers_is_given_up(machine, monkeypatch):
    monkeypatch.setattr(slurm, "NODES_LIMIT_S", 0)
    monkeypatch.setattr(scripts, "INIT_GRACE_S", 1)
    hangs = (
        "import time\ndef is_initialized():\n    return False\ndef init(**_):\n    time.sleep(60)\n"
    )
    (machine.root / "lib" / "ray" / "__init__.py").write_text(hangs)
    started = time.monotonic()
    status, errors = machine.run(slurm_script(*here(machine)))
    assert status == 1
    assert "0 of 1 nodes joined the Ray cluster within 0 s" in errors
    assert time.monotonic() - started < 45


def test_slurm_run_that_is_told_of_preemption_interrupts_the_sweep_and_is_queued_again(machine):
    process = machine.start(slurm_script(*here(machine)), FAKE_HANGS="1")
    wait_for(machine, "hangs")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert machine.calls()[-3:] == ["interrupted", "ray stop --force", "scontrol requeue 77"]


def test_slurm_run_that_is_terminated_interrupts_the_sweep_and_leaves_the_queue_to_slurm(machine):
    process = machine.start(slurm_script(*here(machine)), FAKE_HANGS="1")
    wait_for(machine, "hangs")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert machine.calls()[-2:] == ["interrupted", "ray stop --force"]


def test_slurm_run_that_does_not_heed_the_interrupt_is_ended_in_time(machine):
    need, options = here(machine)
    deaf = f"#!/bin/bash\ntrap '' INT\necho hangs >> {machine.calls_file}\nsleep 60\nsleep 60\n"
    (machine.root / "bin" / "tenfold").write_text(deaf)
    options = SlurmOptions(config_file=options.config_file, stop_limit_s=1)
    process = machine.start(slurm_script(need, options))
    wait_for(machine, "hangs")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert machine.calls()[-1] == "scontrol requeue 77"


def test_slurm_run_preempted_before_its_nodes_are_there_is_queued_again(machine):
    need, options = here(machine, num_groups=17)
    process = machine.start(slurm_script(need, options))
    wait_for(machine, "srun")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert machine.calls()[-2:] == ["ray stop --force", "scontrol requeue 77"]
    assert not any(line.startswith("tenfold") for line in machine.calls())
