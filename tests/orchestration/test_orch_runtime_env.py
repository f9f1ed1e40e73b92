"""What a joined cluster's workers are given, as data. test_orch_joined.py gives it to a real node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.runtime_env import RuntimeEnv

from orchestration.runtime_env import (
    JOB_CONFIG,
    JOB_OVERRIDE,
    OUR_PACKAGES,
    beside,
    share_cache,
    submitted_environment,
    worker_environment,
)
from orchestration.sweep import SETTINGS
from trainers.data.cache import SHARED_CACHE

ROOT = Path(__file__).resolve().parents[2]
HEAD = "head:6379"
RAY_PACKAGE_BYTES = 512 << 20
"""Ray refuses a larger package (GCS_STORAGE_MAX_SIZE)."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A driver that no job started."""
    for name in (JOB_CONFIG, JOB_OVERRIDE, SHARED_CACHE, "TENFOLD_CACHE"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)
    return monkeypatch


def test_runtime_env_modules_are_the_packages_that_this_process_imports(alone):
    modules = worker_environment(HEAD)["py_modules"]
    assert modules == [str(ROOT / name) for name in OUR_PACKAGES]
    assert (Path(modules[1]) / "assets" / "tiny-llama" / "model.safetensors").is_file()
    for folder in map(Path, modules):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < RAY_PACKAGE_BYTES


def test_runtime_env_is_one_that_ray_accepts(alone):
    assert RuntimeEnv(**worker_environment(HEAD)).py_modules()


def test_runtime_env_carries_how_workers_work_and_no_secret(alone):
    secrets = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    for name in secrets:
        alone.setenv(name, "hunter2")
    alone.setenv("TENFOLD_CACHE", "/shared/cache")
    alone.setenv("HF_HUB_OFFLINE", "1")
    env = worker_environment(HEAD)
    assert env["env_vars"]["TENFOLD_CACHE"] == "/shared/cache"
    assert env["env_vars"]["HF_HUB_OFFLINE"] == "1"
    assert "hunter2" not in json.dumps(env)


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings another OpenMP elsewhere")
def test_setting_by_which_threads_give_way_reaches_the_workers_and_the_library_that_reads_it(alone):
    alone.setenv("GOMP_SPINCOUNT", SETTINGS["GOMP_SPINCOUNT"])
    reached = worker_environment(HEAD)["env_vars"] | {"OMP_DISPLAY_ENV": "verbose"}
    loads = [sys.executable, "-c", "import torch"]
    done = subprocess.run(loads, env=reached, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{SETTINGS['GOMP_SPINCOUNT']}'" in done.stderr


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "local"])
def test_runtime_env_tells_the_workers_which_cluster_they_are_of(alone, address):
    assert worker_environment(HEAD)["env_vars"]["RAY_ADDRESS"] == HEAD
    assert "RAY_ADDRESS" not in worker_environment(address)["env_vars"]


def test_runtime_env_beside_a_jobs_keeps_the_jobs_variables_and_modules():
    ours = {"py_modules": ["/a"], "excludes": [], "env_vars": {"X": "ours", "Y": "ours"}}
    jobs = {"py_modules": ["gcs://b.zip"], "env_vars": {"X": "job"}, "pip": ["numpy"]}
    found = beside(ours, jobs)
    assert found["py_modules"] == ["/a", "gcs://b.zip"]
    assert found["env_vars"] == {"Y": "ours"}
    assert "pip" not in found  # Ray takes it from the job
    assert beside(ours, {}) == ours


@pytest.mark.parametrize(
    ("jobs", "overrides"), [({"working_dir": "gcs://a.zip"}, None), ({"py_modules": []}, "1")]
)
def test_runtime_env_overrides_a_jobs_only_where_both_name_modules(alone, jobs, overrides):
    alone.setenv(JOB_CONFIG, json.dumps({"runtime_env": jobs}))
    worker_environment(HEAD)
    assert os.environ.get(JOB_OVERRIDE) == overrides


@pytest.mark.parametrize("config", ["", "{}", '{"runtime_env": null}'])
def test_runtime_env_of_a_job_without_any_is_empty(config):
    assert submitted_environment({JOB_CONFIG: config}) == {}


def test_runtime_env_cache_of_a_joined_cluster_lies_on_the_storage(alone, tmp_path):
    alone.chdir(tmp_path)
    share_cache("head:6379", "runs")
    assert os.environ["TENFOLD_CACHE"] == str(tmp_path / "runs" / ".cache")


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_runtime_env_sets_of_a_run_at_a_url_are_shared_there_and_caches_stay_apart(alone, address):
    share_cache(address, "s3://bucket/runs")
    assert os.environ[SHARED_CACHE] == "s3://bucket/runs/.cache"
    assert "TENFOLD_CACHE" not in os.environ
    assert worker_environment(HEAD)["env_vars"][SHARED_CACHE] == "s3://bucket/runs/.cache"


def test_runtime_env_carries_no_credentials_of_a_store(alone):
    alone.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    alone.setenv("AWS_ENDPOINT_URL", "http://store")
    assert worker_environment(HEAD)["env_vars"]["AWS_ENDPOINT_URL"] == "http://store"
    assert "secret" not in str(worker_environment(HEAD))


@pytest.mark.parametrize(
    ("address", "chosen", "expected"),
    [(None, None, None), (None, "/mine", "/mine"), ("head:6379", "/mine", "/mine")],
)
def test_runtime_env_cache_elsewhere_is_left_alone(alone, address, chosen, expected):
    if chosen:
        alone.setenv("TENFOLD_CACHE", chosen)
    share_cache(address, "runs")
    assert os.environ.get("TENFOLD_CACHE") == expected
