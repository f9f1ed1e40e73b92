"""`tenfold cluster KIND`: from a sweep.yaml to the file, by the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

from orchestration.cli import main
from orchestration.cluster_sizing import DISK_BYTES, PROCESS_BYTES

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "trainers" / "assets" / "tiny-llama"
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
SECRETS = {"HF_TOKEN": "hf_never_written", "WANDB_API_KEY": "wandb-never-written"}
AWS = ["--provider", "aws", "--region", "us-west-2", "--machine-image", "ami-1", "--pip", "t.whl"]
GCP = ["--provider", "gcp", "--region", "r", "--zone", "r-a", "--project", "p"]
GCP += ["--machine-image", "projects/p/global/images/i", "--image", "registry/t:1"]
LOCAL = ["--provider", "local", "--head-ip", "10.0.0.1", "--worker-ips", "10.0.0.2, 10.0.0.3"]
A100 = ["--gpu", "A100-80GB", "--gpus-per-node", "8"]
KINDS = {
    "aws": ["ray", *A100, *AWS, "--nfs", "fs-1:/", "--spot", "--secrets-file", "/home/u/s.env"],
    "gcp": ["ray", *A100, *GCP, "--nfs", "10.0.0.9:/x"],
    "local": ["ray", *A100, *LOCAL, "--work-folder", "/shared"],
    "kuberay": ["kuberay", *A100, "--image", "registry/t:1", "--spot", "--provider", "gke"],
    "slurm": ["slurm", *A100, "--sbatch", "partition=gpu"],
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes sweep.yaml for the shipped base and 60 rows into the current folder."""
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    folder = tmp_path / "it's work"
    folder.mkdir()
    (folder / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def write(**values: object) -> str:
        plain = {"model": str(BASE), "data": "good.jsonl", "name": "My_Run.v1", "pack_size": 1}
        plain |= {"workers_per_trial": 1}
        plain |= {"lora_rank": 4, "learning_rate": [1e-4, 1e-3, 1e-2], "global_batch_size": 16}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(plain | values))
        return "sweep.yaml"

    return write


@pytest.fixture
def printed(write, capsys) -> Callable[..., tuple[str, str]]:
    """stdout and stderr of the verb for a sweep."""

    def run(*arguments: str, **values: object) -> tuple[str, str]:
        assert main(["cluster", *arguments, write(**values)]) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.mark.parametrize("kind", ["aws", "gcp", "local"])
def test_cluster_ray_prints_yaml_that_the_schema_of_ray_takes(printed, kind):
    out, err = printed(*KINDS[kind])
    jsonschema.validate(yaml.safe_load(out), SCHEMA)
    assert "My_Run.v1: 3 group(s) of 1 worker(s) with 1 CPU(s) and 1 A100-80GB" in err
    assert "1 worker node(s) of 8 GPU(s), 5 of them idle" in err


@pytest.mark.parametrize("kind", list(KINDS))
def test_cluster_manifest_carries_no_value_of_a_secret(printed, kind):
    out, err = printed(*KINDS[kind], tracking=["wandb"])
    assert not [value for value in SECRETS.values() if value in out + err]
    assert ("WANDB_API_KEY" in out) == (kind == "kuberay")


@pytest.mark.parametrize("kind", list(KINDS))
def test_cluster_output_goes_to_the_file_that_is_named_and_nothing_is_left_beside(printed, kind):
    out, _ = printed(*KINDS[kind], "-o", "made/cluster.yaml")
    assert out == ""
    assert [path.name for path in Path("made").iterdir()] == ["cluster.yaml"]
    again, _ = printed(*KINDS[kind])
    assert Path("made/cluster.yaml").read_text() == again.replace("FILE", "made/cluster.yaml")


def test_cluster_kuberay_carries_sweep_yaml_as_it_was_written(printed):
    out, err = printed(*KINDS["kuberay"])
    config_map, job = yaml.safe_load_all(out)
    assert config_map["data"]["sweep.yaml"] == Path("sweep.yaml").read_text()
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 1
    assert f"must find, from /mnt/tenfold: {BASE}, good.jsonl" in err


def test_cluster_kuberay_of_a_storage_at_a_url_gets_its_credentials_by_reference(printed):
    out, _ = printed(*KINDS["kuberay"], storage="s3://bucket/runs")
    _, job = yaml.safe_load_all(out)
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        found = {item["name"]: item["valueFrom"] for item in container["env"]}
        assert found["AWS_SECRET_ACCESS_KEY"]["secretKeyRef"]["optional"] is True
    assert "AWS_" not in printed(*KINDS["kuberay"])[0]


def test_cluster_ray_installs_the_client_of_its_storage(printed):
    arguments = ["ray", *A100, *AWS[:-2], "--pip", "tenfold", "--nfs", "fs-1:/"]
    (install,) = yaml.safe_load(printed(*arguments, storage="s3://bucket/runs")[0])[
        "setup_commands"
    ][1:]
    assert install.endswith(" s3fs")
    (install,) = yaml.safe_load(printed(*arguments)[0])["setup_commands"][1:]
    assert "s3fs" not in install


def test_cluster_slurm_runs_in_the_current_folder_on_the_sweep_that_is_named(printed):
    out, _ = printed(*KINDS["slurm"])
    assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0
    assert out.startswith("#!/bin/bash\n")
    quoted = str(Path.cwd()).replace("'", "'\"'\"'")
    assert f"cd -- '{quoted}'\n" in out
    assert f"exec tenfold sweep '{quoted}/sweep.yaml' --name My_Run.v1 --address auto" in out


def test_cluster_of_a_sweep_on_cpus_has_no_gpus(printed):
    out, err = printed(
        "kuberay", "--image", "i", gpus_per_worker=0, workers_per_trial=2, cpus_per_worker=3
    )
    _, job = yaml.safe_load_all(out)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == "6"
    assert group["replicas"] == 3
    assert "nvidia" not in out
    assert "3 worker node(s) without GPUs" in err


def test_cluster_group_of_more_workers_than_a_node_has_gpus_spans_nodes(printed):
    out, _ = printed("slurm", "--gpu", "H100-80GB", "--groups", "2", workers_per_trial=16)
    assert "#SBATCH --nodes=4\n" in out
    assert "#SBATCH --gpus-per-node=8\n" in out


def test_cluster_default_groups_are_those_that_the_packs_need_and_at_most_8(printed):
    def groups(**values: object) -> int:
        _, err = printed("slurm", "--gpu", "H100-80GB", learning_rate=rates, **values)
        found = re.search(r"(\d+) group\(s\)", err)
        assert found
        return int(found[1])

    rates = [1e-4 * 1.1**i for i in range(20)]
    assert groups(pack_size=1) == 8
    assert groups(pack_size=5) == 4
    assert groups(pack_size=6) == 4
    assert groups(pack_size=20) == 1
    assert groups(engine="solo", pack_size=20) == 8


def model_folder(name: str, **sizes: int) -> str:
    """The config of a Llama-3.1 beside the shipped tokenizer; a manifest needs no weights."""
    folder = Path(name)
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / file, folder)
    config = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
    config |= {"num_key_value_heads": 8, "tie_word_embeddings": False} | sizes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def test_cluster_memory_and_disk_hold_the_base_as_it_is_published(printed):
    num_bytes = 2 * 8_030_261_248  # the published parameters of Llama-3.1-8B
    large = ["--gpu", "B300-288GB", "--instance-type", "p6-b300.48xlarge"]
    out, err = printed("ray", *large, *AWS, "--nfs", "fs:/", model=model_folder("8B", **LLAMA_8B))
    assert f"{(PROCESS_BYTES + num_bytes) / 2**30:.1f} GiB of host memory" in err
    worker = yaml.safe_load(out)["available_node_types"]["tenfold.worker"]
    assert worker["node_config"]["InstanceType"] == "p6-b300.48xlarge"
    (disk,) = worker["node_config"]["BlockDeviceMappings"]
    assert disk["Ebs"]["VolumeSize"] == -(-(DISK_BYTES + num_bytes) // 2**30)


@pytest.mark.parametrize(
    # A 70B base in NF4 is 36 GB: with an adapter on one GPU of 80 GB, in two parts on 40 GB.
    ("gpu", "num_workers"),
    [("H100-80GB", 1), ("A100-40GB", 2)],
)
def test_cluster_group_of_a_70b_base_has_the_fewest_gpus_that_hold_it(printed, gpu, num_workers):
    flags = ["slurm", "--gpu", gpu, "--groups", "1"]
    out, err = printed(*flags, model=model_folder("70B", **LLAMA_70B), workers_per_trial="auto")
    assert f"1 group(s) of {num_workers} worker(s) with 1 CPU(s) and 1 {gpu} " in err
    assert f"#SBATCH --gpus-per-node={num_workers}\n" in out


def test_cluster_gpu_that_cannot_hold_the_base_is_refused_with_what_would(write, capsys):
    config = write(model=model_folder("70B", **LLAMA_70B))
    assert main(["cluster", "slurm", "--gpu", "L4-24GB", config]) == 2
    _, err = capsys.readouterr()
    assert "a GPU of 1x8xL4-24GB has 24.0 GB; what would fit: " in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        (["nomad"], {}, "KIND must be one of ray, kuberay, slurm, got 'nomad'"),
        (["slurm"], {}, "--gpu must name the GPUs of the cluster (as H100-80GB)"),
        (["slurm", "--gpu", "H100"], {}, "--gpu must be model and memory, as H100-80GB"),
        (["slurm", *A100], {"gpus_per_worker": 0}, "--gpu A100-80GB: gpus_per_worker is 0"),
        (
            ["slurm", "--gpus-per-node", "8"],
            {"gpus_per_worker": 0},
            "--gpus-per-node 8: gpus_per_w",
        ),
        (["slurm", *A100, "--nfs", "x", "--spot"], {}, "cluster slurm takes no --nfs, --spot"),
        (["kuberay", *A100, "--sbatch", "a=b"], {}, "cluster kuberay takes no --sbatch"),
        (["kuberay", *A100, "--provider", "aws"], {}, "--provider must be one of gke, eks"),
        (["kuberay", *A100], {}, "kuberay needs --image"),
        (["ray", *A100], {}, "--provider must be one of aws, gcp, local, got None"),
        (["ray", *A100, *AWS], {}, "ray needs a folder that all nodes share: --nfs"),
        (["ray", *A100, *LOCAL, "--work-folder", "x"], {}, "work_folder must be an absolute path"),
        (["slurm", *A100, "--groups", "4"], {}, "--groups must be from 1 to the trials (3), got 4"),
        (["slurm", *A100, "--groups", "0"], {}, "--groups must be from 1 to the trials (3), got 0"),
        (
            ["slurm", "--gpu", "A100-80GB", "--gpus-per-node", "0"],
            {},
            "--gpus-per-node must be at least 1",
        ),
        (["slurm", *A100], {"pack_size": 10**7}, "pack_size must be what a worker holds"),
        (["slurm", *A100], {"method": "rl"}, "method: rl needs a reward"),
        (["slurm", *A100], {"storage": "s3://k:v@bucket/runs"}, "must hold no credentials"),
    ],
)
def test_cluster_that_cannot_be_written_is_refused_in_one_line(
    write, capsys, arguments, values, message
):
    assert main(["cluster", *arguments, write(**values)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def heavy_after(arguments: list[str], status: int) -> str:
    code = (
        "import sys\nfrom orchestration.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        f"assert code == {status}, code\n"
        "heavy = {'torch', 'ray', 'transformers', 'datasets', 'deepspeed'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()[-1]


def test_cluster_help_and_a_manifest_import_neither_torch_nor_ray(write):
    assert heavy_after(["cluster", "--help"], 0) == "[]"
    assert heavy_after(["cluster", *KINDS["slurm"], write()], 0) == "[]"
