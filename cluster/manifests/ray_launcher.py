"""The YAML of Ray's cluster launcher (`ray up`): a head without GPUs, on demand, and worker nodes.

Its form is Ray's own schema, ray/autoscaler/ray-schema.json in Ray's wheel.
"""

import shlex
from dataclasses import dataclass
from typing import Any

from cluster.manifests.instances import HEADS, worker_instance
from cluster.manifests.need import GIB, OBJECT_STORE_BYTES, ClusterNeed, resource_name
from cluster.manifests.scripts import head_script

PROVIDERS = ("aws", "gcp", "local")
HEAD_TYPE, WORKER_TYPE = "tenfold.head", "tenfold.worker"
HEAD_DISK_GIB = 200
NODES_LIMIT_S = 1800
"""Machines with 8 GPUs take minutes to start; after half an hour they are not to be had."""
TOKEN_FILE = "~/.ray/auth_token"
SECRETS_FILE = "~/.tenfold/secrets.env"
# Of the providers' clients that Ray's launcher imports on the head (ray/autoscaler/_private/aws, gcp).
LAUNCHER_REQUIREMENTS = {
    "aws": ("boto3",),
    "gcp": ("google-api-python-client", "google-auth", "google-auth-httplib2", "cryptography"),
    "local": (),
}


@dataclass(frozen=True, kw_only=True)
class LauncherOptions:
    """Where and as whom.

    Args:
        provider: aws, gcp or local (machines that are there already).
        machine_image: AMI of aws, source image of gcp.
        nfs: SERVER:/EXPORT that is mounted at the work folder of every node.
        secrets_file: local file of NAME=VALUE lines that is copied to every node.
        ray_token_file: local file with the token of the cluster.
    """

    provider: str
    region: str | None = None
    zone: str | None = None
    project: str | None = None
    machine_image: str | None = None
    instance_type: str | None = None
    head_type: str | None = None
    ssh_user: str = "ubuntu"
    ssh_key: str | None = None
    head_ip: str | None = None
    worker_ips: tuple[str, ...] = ()
    nfs: str | None = None
    secrets_file: str | None = None
    ray_token_file: str = TOKEN_FILE


REQUIRED = {
    "aws": ("region", "machine_image"),
    "gcp": ("project", "region", "zone", "machine_image"),
    "local": ("head_ip", "worker_ips"),
}
ALLOWED = {
    "aws": {"region", "zone", "machine_image", "instance_type", "head_type"},
    "gcp": {"project", "region", "zone", "machine_image", "instance_type", "head_type"},
    "local": {"head_ip", "worker_ips"},
}


def launcher_manifest(need: ClusterNeed, options: LauncherOptions) -> dict[str, Any]:
    """The document for `ray up`.

    Raises:
        ValueError: what the provider must have is missing, or it has no such machine.
    """
    _check(need, options)
    manifest: dict[str, Any] = {
        "cluster_name": resource_name(need.name),
        # All nodes from the start: Tenfold counts its groups by what is there, and asks for no more.
        "max_workers": need.num_nodes,
        "idle_timeout_minutes": 60,
        "provider": _provider(need, options),
        "auth": _auth(options),
    }
    if need.image:
        manifest["docker"] = _docker(need)
    if options.provider != "local":
        manifest["available_node_types"] = _node_types(need, options)
        manifest["head_node_type"] = HEAD_TYPE
    return (
        manifest
        | {"file_mounts": _file_mounts(options)}
        | _setup(need, options)
        | _start(need, options)
    )


def run_command(need: ClusterNeed) -> str:
    """What `ray exec` is told to run on the head."""
    return f'bash "$HOME"/{shlex.quote(_run_folder(need))}/run.sh'


def _check(need: ClusterNeed, options: LauncherOptions) -> None:
    provider = options.provider
    missing = [name for name in REQUIRED[provider] if not getattr(options, name)]
    if missing:
        flags = ", ".join(_flag(name) for name in missing)
        raise ValueError(f"--provider {provider} needs {flags}")
    known = {name for names in ALLOWED.values() for name in names}
    wrong = [name for name in sorted(known - ALLOWED[provider]) if getattr(options, name)]
    if wrong:
        raise ValueError(f"--provider {provider} takes no {', '.join(map(_flag, wrong))}")
    if provider == "local":
        if need.spot:
            raise ValueError("--provider local takes no --spot: its machines are there already")
        if len(options.worker_ips) < need.num_nodes:
            raise ValueError(
                f"--worker-ips must name {need.num_nodes} machines, got {len(options.worker_ips)}; give "
                "more, or ask for fewer groups with --groups"
            )
    elif not need.image and not need.requirements:
        raise ValueError(
            f"--provider {provider} needs --image (a container image that has Tenfold) or --pip (what "
            "pip installs Tenfold from on every node)"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _provider(need: ClusterNeed, options: LauncherOptions) -> dict[str, Any]:
    if options.provider == "local":
        workers = list(options.worker_ips[: need.num_nodes])
        return {"type": "local", "head_ip": options.head_ip, "worker_ips": workers}
    place: dict[str, Any] = {"type": options.provider, "region": options.region}
    if options.zone:
        place["availability_zone"] = options.zone
    if options.provider == "gcp":
        return place | {"project_id": options.project}
    return place | {"cache_stopped_nodes": False}  # else a node's disk is paid for after the sweep


def _auth(options: LauncherOptions) -> dict[str, Any]:
    key = {"ssh_private_key": options.ssh_key} if options.ssh_key else {}
    return {"ssh_user": options.ssh_user} | key


def _docker(need: ClusterNeed) -> dict[str, Any]:
    folder = shlex.quote(need.work_folder)
    return {
        "image": need.image,
        "container_name": "tenfold",
        "pull_before_run": True,
        "run_options": ["--ulimit nofile=65536:65536", f"-v {folder}:{folder}"],
    }


def _node_types(need: ClusterNeed, options: LauncherOptions) -> dict[str, Any]:
    head = options.head_type or HEADS[options.provider]
    worker = options.instance_type or worker_instance(options.provider, need)
    disk_gib = -(-need.disk_bytes // GIB)
    gpus = {"GPU": need.gpus_per_node} if need.gpus_per_node else {}
    if options.provider == "aws":
        head_config = _aws_node(head, HEAD_DISK_GIB, options, spot=False)
        worker_config = _aws_node(worker, disk_gib, options, spot=need.spot)
    else:
        head_config = _gcp_node(head, HEAD_DISK_GIB, options, gpus=False, spot=False)
        worker_config = _gcp_node(worker, disk_gib, options, gpus=bool(gpus), spot=need.spot)
    return {
        HEAD_TYPE: {
            # 0: workers, which ask for CPUs, are not put beside the driver.
            "resources": {"CPU": 0},
            "min_workers": 0,
            "max_workers": 0,
            "node_config": head_config,
        },
        WORKER_TYPE: {
            "resources": {"CPU": need.node_cpus} | gpus,
            "min_workers": need.num_nodes,
            "max_workers": need.num_nodes,
            "node_config": worker_config,
        },
    }


def _aws_node(
    instance: str, disk_gib: int, options: LauncherOptions, *, spot: bool
) -> dict[str, Any]:
    disk = {"VolumeSize": disk_gib, "VolumeType": "gp3"}
    node: dict[str, Any] = {
        "InstanceType": instance,
        "ImageId": options.machine_image,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }
    return node | ({"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {})


def _gcp_node(
    instance: str, disk_gib: int, options: LauncherOptions, *, gpus: bool, spot: bool
) -> dict[str, Any]:
    disk = {"diskSizeGb": disk_gib, "sourceImage": options.machine_image}
    boot = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}
    # A machine with GPUs, or a spot one, is not moved to another host: it ends.
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"} if gpus or spot else {}
    if spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        scheduling |= {"automaticRestart": False}
    node: dict[str, Any] = {"machineType": instance, "disks": [boot]}
    return node | ({"scheduling": scheduling} if scheduling else {})


def _file_mounts(options: LauncherOptions) -> dict[str, str]:
    """Secrets go from file to file: their values are in no manifest."""
    mounts = {TOKEN_FILE: options.ray_token_file}
    return mounts | ({SECRETS_FILE: options.secrets_file} if options.secrets_file else {})


def _run_folder(need: ClusterNeed) -> str:
    return f".tenfold/{need.name}"


def _setup(need: ClusterNeed, options: LauncherOptions) -> dict[str, Any]:
    setup: list[str] = []
    version = tuple(int(part) for part in need.min_python.split("."))
    setup.append(
        f"python3 -c 'import sys; sys.exit(sys.version_info[:2] < {version} and "
        f'"tenfold: Python {version[0]}.{version[1]} or later is needed here")\''
    )
    if not need.image and need.requirements:
        setup.append(f"python3 -m pip install {shlex.join(need.requirements)}")
    clients = LAUNCHER_REQUIREMENTS[options.provider]
    return {
        "initialization_commands": _mount(need, options),
        "setup_commands": setup,
        "head_setup_commands": [
            *([f"python3 -m pip install {shlex.join(clients)}"] if clients else []),
            *_write_run_files(need, options),
        ],
        "worker_setup_commands": [],
    }


def _mount(need: ClusterNeed, options: LauncherOptions) -> list[str]:
    if not options.nfs:
        return []
    folder = shlex.quote(need.work_folder)
    return [
        f"sudo mkdir -p {folder}",
        f"mountpoint -q {folder} || sudo mount -t nfs {shlex.quote(options.nfs)} {folder}",
    ]


def _write_run_files(need: ClusterNeed, options: LauncherOptions) -> list[str]:
    """The manifest carries sweep.yaml and the script, so that it is complete wherever it is used."""
    folder = f'"$HOME"/{shlex.quote(_run_folder(need))}'
    script = head_script(
        need, f"{folder}/sweep.yaml", limit_s=NODES_LIMIT_S, prelude=_environment(options)
    )
    return [
        f"mkdir -p {folder}",
        f"printf %s {shlex.quote(need.config_text)} > {folder}/sweep.yaml",
        f"printf %s {shlex.quote(script)} > {folder}/run.sh",
    ]


def _environment(options: LauncherOptions) -> str:
    """What Ray's processes and the driver must have in their environment."""
    lines = ["export RAY_AUTH_MODE=token"]
    if options.secrets_file:
        lines.append(f"set -a; . {SECRETS_FILE}; set +a")
    return "; ".join(lines)


def _start(need: ClusterNeed, options: LauncherOptions) -> dict[str, Any]:
    before = f"ulimit -n 65536; {_environment(options)}; ray start"
    store = f"--object-store-memory={OBJECT_STORE_BYTES}"
    return {
        "head_start_ray_commands": [
            "ray stop",
            # Tenfold pins its trials' drivers to the resource that Ray gives every head by itself.
            f"{before} --head --port=6379 --num-cpus=0 --num-gpus=0 {store} "
            "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{before} --address=$RAY_HEAD_IP:6379 --num-cpus={need.node_cpus} "
            f"--num-gpus={need.gpus_per_node} {store}",
        ],
    }
