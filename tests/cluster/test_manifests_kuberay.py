"""The RayJob and its ConfigMap, read back as Kubernetes would."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.manifests.kuberay import SPOT_LABELS, KubeRayOptions, kuberay_manifest
from cluster.manifests.need import ClusterNeed
from orchestration.cluster_verb import as_yaml
from tests.cluster.manifest_needs import NEEDS, Machine, make_need

LABEL_NAME = re.compile(r"^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$")  # KubeRay: a RayJob has up to 47
JOB_KEYS = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}


def parsed(need: ClusterNeed, **options) -> tuple[dict, dict]:
    """ConfigMap and RayJob as they are read from the file."""
    text = as_yaml(kuberay_manifest(need, KubeRayOptions(**options)))
    config_map, job = yaml.safe_load_all(text)
    return config_map, job


def pods(job: dict) -> tuple[dict, dict]:
    """Specs of the head's and of a worker's pod."""
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    return cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]


def mebibytes(quantity: str) -> int:
    assert quantity.endswith("Mi"), quantity
    return int(quantity.removesuffix("Mi"))


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
def test_kuberay_numbers_equal_the_need(need):
    _, job = parsed(need)
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert {group[f"{key}eplicas"] for key in ("r", "minR", "maxR")} == {need.num_nodes}
    assert group["rayStartParams"]["num-cpus"] == str(need.node_cpus)
    assert group["rayStartParams"]["num-gpus"] == str(need.gpus_per_node)
    (container,) = pods(job)[1]["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    assert int(limits["cpu"]) == need.node_cpus + 1
    assert mebibytes(limits["memory"]) == -(-need.node_memory_bytes // 2**20)
    gpus = str(need.gpus_per_node) if need.gpu_name else None
    assert limits.get("nvidia.com/gpu") == gpus


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
def test_kuberay_names_are_valid_and_the_same_in_both_documents(need):
    config_map, job = parsed(need)
    name = job["metadata"]["name"]
    assert LABEL_NAME.match(name)
    assert config_map["metadata"]["name"] == name
    volumes = {volume["name"]: volume for volume in pods(job)[0]["volumes"]}
    assert volumes["config"]["configMap"] == {"name": name}


def test_kuberay_job_is_a_ray_v1_job_that_ends_its_cluster_and_is_tried_again():
    _, job = parsed(make_need())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec.keys() == JOB_KEYS
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 2
    # A line that the operator may paste into a shell script or split into words.
    assert re.fullmatch(r"bash [\w/.]+", spec["entrypoint"])


def test_kuberay_cluster_has_a_token_and_a_head_without_cpus_and_gpus():
    _, job = parsed(make_need())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == "2.60.0"
    params = cluster["headGroupSpec"]["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("0", "0")
    assert all(isinstance(value, str) for value in params.values())
    assert "nvidia.com/gpu" not in str(pods(job)[0])


def test_kuberay_pods_share_the_claim_at_the_work_folder():
    _, job = parsed(make_need(work_folder="/work"), claim="shared-fs")
    for pod in pods(job):
        (container,) = pod["containers"]
        assert {"name": "storage", "mountPath": "/work"} in container["volumeMounts"]
        claim = {"name": "storage", "persistentVolumeClaim": {"claimName": "shared-fs"}}
        assert claim in pod["volumes"]


@pytest.mark.parametrize("provider", list(SPOT_LABELS))
def test_kuberay_spot_nodes_take_workers_and_never_the_head(provider):
    key, value = SPOT_LABELS[provider]
    _, job = parsed(make_need(spot=True), provider=provider)
    head, worker = pods(job)
    assert worker["nodeSelector"] == {key: value}
    toleration = {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
    assert toleration in worker["tolerations"]
    required = head["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": key, "operator": "NotIn", "values": [value]}]
    assert "tolerations" not in head


def test_kuberay_on_demand_workers_ask_for_no_spot_node():
    _, job = parsed(make_need(), provider="gke", node_selector=("pool=a100", "zone="))
    assert pods(job)[1]["nodeSelector"] == {"pool": "a100", "zone": ""}
    assert "gke-spot" not in str(pods(job)[1])


def test_kuberay_secrets_are_references():
    need = make_need(required_secrets=("WANDB_API_KEY",), optional_secrets=("HF_TOKEN",))
    _, job = parsed(need, secret="keys")
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["env"] == [
            {"name": name, "valueFrom": {"secretKeyRef": reference}}
            for name, reference in (
                ("WANDB_API_KEY", {"name": "keys", "key": "WANDB_API_KEY", "optional": False}),
                ("HF_TOKEN", {"name": "keys", "key": "HF_TOKEN", "optional": True}),
            )
        ]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"image": None}, {}, "kuberay needs --image"),
        ({"spot": True}, {}, "--spot needs --provider (gke, eks, karpenter, aks)"),
        ({"ray_version": "2.51.9"}, {}, "kuberay needs Ray 2.52 or later"),
        ({"storage": "../runs"}, {}, "storage must lie in the work folder (/mnt/tenfold)"),
        ({"storage": "/mnt/tenfold-2"}, {}, "storage must lie in the work folder"),
        ({}, {"claim": "Not_A_Name"}, "--claim must be the name of a Kubernetes object"),
        ({}, {"node_selector": ("pool",)}, "--node-selector must be KEY=VALUE, got 'pool'"),
    ],
)
def test_kuberay_of_what_cannot_run_is_refused(values, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kuberay_manifest(make_need(**values), KubeRayOptions(**options))


@pytest.mark.parametrize(
    "storage", ["runs", ".", "/mnt/tenfold/runs", "/mnt/tenfold", "s3://b/runs"]
)
def test_kuberay_storage_on_the_volume_or_a_url_is_taken(storage):
    assert len(kuberay_manifest(make_need(storage=storage), KubeRayOptions())) == 2


def test_kuberay_script_starts_the_run_or_goes_on_with_it(tmp_path: Path):
    machine = Machine(tmp_path)
    machine.nodes_file.write_text("2")  # the head and one worker
    work = tmp_path / "work"
    work.mkdir()
    config_map, _ = parsed(make_need(name="My_Run.v1", work_folder=str(work), config_text="a: 1\n"))
    assert config_map["data"]["sweep.yaml"] == "a: 1\n"
    script = config_map["data"]["run.sh"]
    assert machine.run(script, RAY_AUTH_MODE="token") == (0, "")
    started = "tenfold sweep /etc/tenfold/sweep.yaml --name My_Run.v1 --address auto --resume"
    assert machine.calls() == [started, f"cwd {work}"]
