"""A KubeRay RayJob and the ConfigMap that it reads: a head without GPUs and worker pods, one a node.

Field names: ray.io/v1, KubeRay 1.5.1 or later (authOptions came with it). Source: ray-operator/apis/ray/v1
of ray-project/kuberay, and its API reference at docs.ray.io/en/master/cluster/kubernetes/references/api.html.
"""

import posixpath
import re
from dataclasses import dataclass
from typing import Any

from cluster.manifests.need import OBJECT_STORE_BYTES, ClusterNeed, resource_name
from cluster.manifests.scripts import head_script

CONFIG_FOLDER = "/etc/tenfold"
HEAD_CPUS, HEAD_MEMORY = 4, "16Gi"
"""ASSUMPTION: enough for the driver, which tokenizes the data, and Ray's head."""
RAY_POD_CPUS = 1
"""ASSUMPTION: of a worker pod, for the raylet and its agents, beside what the workers take."""
NODES_LIMIT_S = 900
"""KubeRay submits the job once the pods are ready; their raylets join within seconds of that."""
MAX_RETRIES = 2
"""New clusters after a lost head or a failed driver; each goes on where the last one was."""
KEEP_S = 300
GPU_RESOURCE = "nvidia.com/gpu"
MIN_RAY = (2, 52)
"""Older Ray has no token authentication."""
DNS_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
LABEL = re.compile(r"^(?P<key>[\w.-]+(/[\w.-]+)?)=(?P<value>[\w.-]*)$")

SPOT_LABELS = {
    "gke": ("cloud.google.com/gke-spot", "true"),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT"),
    "karpenter": ("karpenter.sh/capacity-type", "spot"),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot"),
}
"""What marks a spot node. Source: the documentation of GKE, EKS managed node groups, Karpenter and AKS."""


@dataclass(frozen=True, kw_only=True)
class KubeRayOptions:
    """What of the Kubernetes cluster is used.

    Args:
        provider: who marks its spot nodes how, one of SPOT_LABELS; needed with spot.
        claim: a PersistentVolumeClaim (ReadWriteMany) that is mounted at the work folder.
        secret: the Secret that holds the variables, under their names.
        node_selector: KEY=VALUE labels of the worker nodes.
    """

    provider: str | None = None
    claim: str = "tenfold"
    secret: str = "tenfold-secrets"
    node_selector: tuple[str, ...] = ()


def kuberay_manifest(need: ClusterNeed, options: KubeRayOptions) -> list[dict[str, Any]]:
    """The documents for `kubectl apply`: a ConfigMap and a RayJob.

    Raises:
        ValueError: what the pods cannot be written without is missing, or is no name for Kubernetes.
    """
    _check(need, options)
    name = resource_name(need.name)
    script = head_script(need, f"{CONFIG_FOLDER}/sweep.yaml", limit_s=NODES_LIMIT_S)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"sweep.yaml": need.config_text, "run.sh": script},
    }
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            # No shell of its own: KubeRay pastes this line into the submitter's script.
            "entrypoint": f"bash {CONFIG_FOLDER}/run.sh",
            "submissionMode": "K8sJobMode",
            "backoffLimit": MAX_RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_S,
            "rayClusterSpec": _cluster(need, options),
        },
    }
    return [config_map, job]


def _check(need: ClusterNeed, options: KubeRayOptions) -> None:
    if not need.image:
        raise ValueError("kuberay needs --image: a container image that has Tenfold and Ray")
    if tuple(int(part) for part in need.ray_version.split(".")[:2]) < MIN_RAY:
        raise ValueError(f"kuberay needs Ray 2.52 or later for its token, got {need.ray_version}")
    for flag, value in (("--claim", options.claim), ("--secret", options.secret)):
        if not DNS_NAME.fullmatch(value):
            raise ValueError(f"{flag} must be the name of a Kubernetes object, got {value!r}")
    for label in options.node_selector:
        if not LABEL.fullmatch(label):
            raise ValueError(f"--node-selector must be KEY=VALUE, got {label!r}")
    if need.spot and options.provider is None:
        raise ValueError(
            f"--spot needs --provider ({', '.join(SPOT_LABELS)}), which says how its spot nodes are "
            "marked; for another cluster leave --spot out and give --node-selector"
        )
    folder = posixpath.normpath(need.work_folder)
    if "://" in need.storage:
        return
    storage = posixpath.normpath(posixpath.join(folder, need.storage))
    if storage != folder and not storage.startswith(f"{folder}/"):
        raise ValueError(
            f"storage must lie in the work folder ({folder}), where the volume is mounted, got "
            f"{need.storage}; a pod's own disk is gone with it (or be a URL, s3://BUCKET/runs)"
        )


def _cluster(need: ClusterNeed, options: KubeRayOptions) -> dict[str, Any]:
    return {
        "rayVersion": need.ray_version,
        # The operator makes the token's Secret and gives every Ray container and the submitter
        # RAY_AUTH_MODE, and RAY_AUTH_TOKEN by secretKeyRef.
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {
                "num-cpus": "0",
                "num-gpus": "0",
                "object-store-memory": str(OBJECT_STORE_BYTES),
                # The operator and the submitter reach it through a Service; the token guards it.
                "dashboard-host": "0.0.0.0",
            },
            "template": {"spec": _head_pod(need, options)},
        },
        "workerGroupSpecs": [_workers(need, options)],
    }


def _head_pod(need: ClusterNeed, options: KubeRayOptions) -> dict[str, Any]:
    config = {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}
    container = _container(need, options, "ray-head", [config]) | {
        "resources": _resources({"cpu": str(HEAD_CPUS), "memory": HEAD_MEMORY}),
        "ports": [
            {"containerPort": 6379, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
        ],
    }
    pod: dict[str, Any] = {
        "containers": [container],
        "volumes": [
            _storage_volume(options),
            {"name": "config", "configMap": {"name": resource_name(need.name)}},
        ],
    }
    if options.provider is None:
        return pod
    key, value = SPOT_LABELS[options.provider]
    terms = [{"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return pod | {"affinity": {"nodeAffinity": required}}


def _workers(need: ClusterNeed, options: KubeRayOptions) -> dict[str, Any]:
    container = _container(need, options, "ray-worker", [])
    amounts = {
        "cpu": str(need.node_cpus + RAY_POD_CPUS),
        "memory": f"{-(-need.node_memory_bytes // (1 << 20))}Mi",
    }
    if need.gpus_per_node:
        amounts[GPU_RESOURCE] = str(need.gpus_per_node)
    pod: dict[str, Any] = {
        "containers": [container | {"resources": _resources(amounts)}],
        "volumes": [_storage_volume(options)],
    }
    if selector := _node_selector(need, options):
        pod["nodeSelector"] = selector
    if tolerations := _tolerations(need, options):
        pod["tolerations"] = tolerations
    return {
        "groupName": "workers",
        "replicas": need.num_nodes,
        "minReplicas": need.num_nodes,
        "maxReplicas": need.num_nodes,
        "rayStartParams": {
            "num-cpus": str(need.node_cpus),
            "num-gpus": str(need.gpus_per_node),
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": {"spec": pod},
    }


def _container(
    need: ClusterNeed, options: KubeRayOptions, name: str, mounts: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": name,
        "image": need.image,
        "env": [
            *(_secret(options, variable, optional=False) for variable in need.required_secrets),
            *(_secret(options, variable, optional=True) for variable in need.optional_secrets),
        ],
        "volumeMounts": [{"name": "storage", "mountPath": need.work_folder}, *mounts],
    }


def _secret(options: KubeRayOptions, variable: str, *, optional: bool) -> dict[str, Any]:
    reference = {"name": options.secret, "key": variable, "optional": optional}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _resources(amounts: dict[str, str]) -> dict[str, dict[str, str]]:
    """Requests equal limits: Ray counts what it is given, whatever else runs on the node."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _storage_volume(options: KubeRayOptions) -> dict[str, Any]:
    return {"name": "storage", "persistentVolumeClaim": {"claimName": options.claim}}


def _node_selector(need: ClusterNeed, options: KubeRayOptions) -> dict[str, str]:
    selector: dict[str, str] = {}
    for label in options.node_selector:
        key, _, value = label.partition("=")
        selector[key] = value
    if need.spot and options.provider:
        key, value = SPOT_LABELS[options.provider]
        selector[key] = value
    return selector


def _tolerations(need: ClusterNeed, options: KubeRayOptions) -> list[dict[str, str]]:
    """Taints that GPU nodes and spot nodes usually have."""
    found: list[dict[str, str]] = []
    if need.gpus_per_node:
        found.append({"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    if need.spot and options.provider:
        key, value = SPOT_LABELS[options.provider]
        found.append({"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    return found
