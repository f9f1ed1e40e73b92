"""`tenfold cluster KIND`: a plan turned into what starts a cluster of its size. Imports neither torch nor ray."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.cluster_sizing import MAX_GROUPS, cluster_need
from trainers.credentials import credential_in
from trainers.terminal import printable

if TYPE_CHECKING:
    from cluster.manifests.need import ClusterNeed

MARK, BEGIN_BYTES = "`tenfold cluster", 200
"""What a manifest says of itself, and where."""
COMMON_FLAGS = {"name", "gpu", "gpus_per_node", "groups", "output", "work_folder"}
CLOUD_FLAGS = {"region", "zone", "project", "machine_image", "instance_type", "head_type"}
SSH_FLAGS = {"ssh_user", "ssh_key", "head_ip", "worker_ips", "nfs", "secrets_file"}
KIND_FLAGS = {
    "ray": {"provider", "spot", "image", "pip", *CLOUD_FLAGS, *SSH_FLAGS},
    "kuberay": {"provider", "spot", "image", "claim", "secret", "node_selector"},
    "slurm": {"sbatch"},
}


def add_cluster_options(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb; which flag is whose is checked when KIND is known."""
    verb.add_argument("kind", metavar="KIND", help=", ".join(KIND_FLAGS))
    verb.add_argument("config", type=Path, help="sweep.yaml")
    verb.add_argument("--name", help="folder name under runs/")
    verb.add_argument("--gpu", metavar="G", help="model and memory of the GPUs, as H100-80GB")
    verb.add_argument("--gpus-per-node", type=int, metavar="N", help="default: those of a group")
    verb.add_argument(
        "--groups", type=int, metavar="N", help=f"at once; default: the plan's, up to {MAX_GROUPS}"
    )
    verb.add_argument(
        "--work-folder",
        metavar="DIR",
        help="shared by all nodes; where relative paths of sweep.yaml start",
    )
    verb.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: stdout")
    cloud = verb.add_argument_group("ray and kuberay")
    cloud.add_argument(
        "--provider", help="ray: aws, gcp, local; kuberay: gke, eks, karpenter, aks (for --spot)"
    )
    cloud.add_argument("--spot", action="store_true", help="worker nodes may be preempted")
    cloud.add_argument("--image", help="container image that has Tenfold")
    _add_ray_options(verb.add_argument_group("ray"))
    kuberay = verb.add_argument_group("kuberay")
    kuberay.add_argument("--claim", help="PersistentVolumeClaim, ReadWriteMany (default: tenfold)")
    kuberay.add_argument("--secret", help="Secret with HF_TOKEN ... (default: tenfold-secrets)")
    kuberay.add_argument("--node-selector", action="append", metavar="KEY=VALUE", help="of workers")
    slurm = verb.add_argument_group("slurm")
    slurm.add_argument("--sbatch", action="append", metavar="NAME=VALUE", help="as partition=gpu")


def _add_ray_options(group: Any) -> None:
    for flag, text in (
        ("region", "aws, gcp"),
        ("zone", "gcp; aws: optional"),
        ("project", "gcp"),
        ("machine-image", "AMI (aws) or source image (gcp) with the GPU's driver"),
        ("instance-type", "of worker nodes; default: the smallest known that fits"),
        ("head-type", "of the head, without GPU"),
        ("ssh-user", "default: ubuntu"),
        ("ssh-key", "private key"),
        ("head-ip", "local"),
        ("worker-ips", "local: addresses, separated by commas"),
        ("nfs", "SERVER:/EXPORT that is mounted at the work folder of every node"),
        ("secrets-file", "local file of NAME=VALUE lines, copied to every node"),
    ):
        group.add_argument(f"--{flag}", help=text)
    group.add_argument(
        "--pip", action="append", metavar="REQUIREMENT", help="installs Tenfold, without --image"
    )


def run_cluster(args: argparse.Namespace) -> int:
    """Prints or writes the manifest, and says on stderr what it was sized from.

    Raises:
        ValueError: what cannot be planned, or a manifest that lacks something.
    """
    _check_flags(args)
    _check_output(args.output)
    from cluster.manifests.need import need_sentence
    from orchestration.config import load_config, local_files, local_inputs
    from orchestration.requirements import require_supported
    from trainers.paths import write_text

    config = load_config(args.config, name=args.name)
    require_supported(config)
    need = cluster_need(config, args)
    text = _MAKERS[args.kind](need, args)
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_text(args.output, text)
    print(printable(f"tenfold: {need_sentence(need)}"), file=sys.stderr)
    if inputs := [*local_files([config.model]), *local_inputs(config)]:
        found = f"tenfold: the nodes must find, from {need.work_folder}: {', '.join(inputs)}"
        print(printable(found), file=sys.stderr)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    _check_credentials(args)
    if args.kind not in KIND_FLAGS:
        raise ValueError(f"KIND must be one of {', '.join(KIND_FLAGS)}, got {args.kind!r}")
    others = set().union(*KIND_FLAGS.values()) - KIND_FLAGS[args.kind]
    wrong = [f"--{name.replace('_', '-')}" for name in sorted(others) if getattr(args, name)]
    if wrong:
        raise ValueError(f"tenfold cluster {args.kind} takes no {', '.join(wrong)}")
    if args.kind == "ray":
        from cluster.manifests.ray_launcher import PROVIDERS as known
    elif args.kind == "kuberay":
        from cluster.manifests.kuberay import SPOT_LABELS as known
    else:
        return
    if args.provider not in known and (args.provider is not None or args.kind == "ray"):
        raise ValueError(f"--provider must be one of {', '.join(known)}, got {args.provider}")


def _check_credentials(args: argparse.Namespace) -> None:
    """A manifest is a file that people commit and send."""
    for name, given in sorted(vars(args).items()):
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and (why := credential_in(value)):
                raise ValueError(f"--{name.replace('_', '-')} {why}")


def _check_output(output: Path | None) -> None:
    """An earlier manifest may be written anew; whatever else is there stays."""
    if output is None:
        return
    if not (output.exists() or output.is_symlink()):
        from orchestration.own_folder import (
            require_place,  # modules that `tenfold --help` has no use for
        )

        return require_place(output)
    begin = output.read_bytes()[:BEGIN_BYTES] if output.is_file() else b""
    if MARK.encode() not in begin:
        raise ValueError(
            f"{output}: must be new or an earlier manifest, it holds something else; give another file (-o)"
        )


def _commented(lines: list[str], need: "ClusterNeed", kind: str) -> str:
    from cluster.manifests.need import need_sentence

    head = [f"{MARK} {kind}`, sized from the plan of", need_sentence(need), *lines]
    return "".join(f"# {line}\n" for line in head)


def _ray(need: "ClusterNeed", args: argparse.Namespace) -> str:
    from cluster.manifests.ray_launcher import LauncherOptions, launcher_manifest, run_command

    given = {name: getattr(args, name) for name in ("provider", *CLOUD_FLAGS, *SSH_FLAGS)}
    given["worker_ips"] = tuple(part.strip() for part in (args.worker_ips or "").split(",") if part)
    options = LauncherOptions(**{name: value for name, value in given.items() if value})
    file = shlex.quote(str(args.output or "FILE"))
    lines = [
        "First, once: ray get-auth-token --generate",
        f"Then: ray up {file} && ray exec {file} {shlex.quote(run_command(need))}",
    ]
    return _commented(lines, need, "ray") + as_yaml([launcher_manifest(need, options)])


def _kuberay(need: "ClusterNeed", args: argparse.Namespace) -> str:
    from cluster.manifests.kuberay import KubeRayOptions, kuberay_manifest

    given = {name: getattr(args, name) for name in ("provider", "claim", "secret")}
    given["node_selector"] = tuple(args.node_selector or ())
    options = KubeRayOptions(**{name: value for name, value in given.items() if value})
    variables = [*need.required_secrets, *(f"{name} if wanted" for name in need.optional_secrets)]
    lines = [
        "Needs KubeRay 1.5.1 or later, and in the namespace: PersistentVolumeClaim "
        f"{options.claim} (ReadWriteMany),",
        f"Secret {options.secret} ({', '.join(variables)}).",
    ]
    return _commented(lines, need, "kuberay") + as_yaml(kuberay_manifest(need, options))


def _slurm(need: "ClusterNeed", args: argparse.Namespace) -> str:
    from cluster.manifests.slurm import SlurmOptions, slurm_script

    options = SlurmOptions(config_file=str(args.config.resolve()), sbatch=tuple(args.sbatch or ()))
    first, _, rest = slurm_script(need, options).partition("\n")
    lines = ["The job's environment is that of `sbatch`: HF_TOKEN and the like go with it."]
    return f"{first}\n{_commented(lines, need, 'slurm')}{rest}"


_MAKERS = {"ray": _ray, "kuberay": _kuberay, "slurm": _slurm}


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """YAML in the order of the keys, a text of several lines as a block that people can read."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=100, allow_unicode=True)
