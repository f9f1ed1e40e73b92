"""What a driver gives the workers of a cluster that it joins: our packages as the driver imported them, and
the few variables that say how a worker works.

The cluster's image needs our dependencies, not Tenfold. Ray hands a job's runtime environment down to every
actor and task; what Train and Tune set for theirs are variables alone, which are merged into it. Secrets
do not travel: a runtime environment is shown by Ray's dashboard and state API.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.credentials import credential_in
from trainers.data.cache import SHARED_CACHE
from trainers.object_store import is_url

OUR_PACKAGES = ("orchestration", "trainers", "search_spaces", "cluster")
EXCLUDES = ("__pycache__", "*.pyc")
PASSED_ON = (
    "GOMP_SPINCOUNT",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    SHARED_CACHE,
    "TENFOLD_CACHE",
    "TOKENIZERS_PARALLELISM",
)
"""Variables that reach the workers where the driver has them. HF_TOKEN is the cluster's own to set."""
ADDRESS = "RAY_ADDRESS"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What `ray job submit` tells an entrypoint of its job, as JSON."""
JOB_OVERRIDE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"


def worker_environment(address: str) -> dict[str, Any]:
    """The runtime environment of a job on a joined cluster, for `ray.init`.

    Where the driver is the entrypoint of a submitted job, Ray refuses two environments that name the same
    thing. Ours leaves the job's variables alone and names the job's modules after ours, so that it may
    say "the driver's wins" without anything of the job's being lost.

    Args:
        address: of the cluster. A host and port is told to the workers: those of Train's that ask the state API
            would else look for a Ray on their machine, where there may be two.

    Raises:
        ValueError: a variable that would be shown holds a secret.
    """
    passed_on = {name: _shown(name) for name in PASSED_ON if name in os.environ}
    ours = {
        "py_modules": [package_folder(name) for name in OUR_PACKAGES],
        "excludes": list(EXCLUDES),
        "env_vars": passed_on | ({ADDRESS: address} if host_and_port(address) else {}),
    }
    jobs = submitted_environment(os.environ)
    if jobs.keys() & {"py_modules", "excludes"}:
        os.environ[JOB_OVERRIDE] = "1"
    return beside(ours, jobs)


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of an address that is not a word or a URL."""
    host, _, port = address.rpartition(":")
    return (host, int(port)) if host and port.isdigit() and "://" not in address else None


def _shown(name: str) -> str:
    """The value of a variable that everybody who sees the cluster's dashboard will see."""
    if why := credential_in(os.environ[name]):
        raise ValueError(
            f"{name} in the environment {why} (Ray shows it to everybody on the cluster)"
        )
    return os.environ[name]


def package_folder(name: str) -> str:
    """The folder of a package of ours, assets included, wherever this process imports it from."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is a package of ours"
    assert spec.submodule_search_locations, f"{name} is a folder"
    return str(Path(spec.submodule_search_locations[0]).resolve())


def submitted_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of the submitted job whose entrypoint this process is; {} where it is none."""
    return json.loads(environ.get(JOB_CONFIG) or "{}").get("runtime_env") or {}


def beside(ours: Mapping[str, Any], jobs: Mapping[str, Any]) -> dict[str, Any]:
    """Our environment as it goes beside a job's: its modules behind ours, no variable that it has."""
    own = jobs.get("env_vars") or {}
    return {
        **ours,
        "py_modules": [*ours["py_modules"], *(jobs.get("py_modules") or [])],
        "env_vars": {name: value for name, value in ours["env_vars"].items() if name not in own},
    }


def share_cache(address: str | None, storage: str) -> None:
    """Puts the cache of tokenized data on the storage of a run on a joined cluster, where every node finds
    what the first one wrote; a folder that the user chose (TENFOLD_CACHE) stays. On an object store lies a copy
    of what each machine has in a cache of its own."""
    if is_url(storage):
        os.environ[SHARED_CACHE] = f"{storage}/.cache"
    elif address is not None and not os.environ.get("TENFOLD_CACHE"):
        os.environ["TENFOLD_CACHE"] = str(Path(storage).expanduser().resolve() / ".cache")
