import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

import pytest

from orchestration.sweep import SETTINGS

# As a sweep has it for its workers: the processes that share the tests share two CPUs. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", SETTINGS["GOMP_SPINCOUNT"])
OWN_PROCESS = "TENFOLD_TEST_OWN_PROCESS"
ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs modules marked `own_process` in one of their own: they limit memory and set alarms, which threads that
    other tests left behind do not survive."""
    if pyfuncitem.get_closest_marker("own_process") is None or OWN_PROCESS in os.environ:
        return None
    outcomes, output = outcomes_of(pyfuncitem.path)
    problem = outcomes.get(pyfuncitem.name, f"it did not come to its end:\n{output[-6000:]}")
    if problem:
        pytest.fail(problem, pytrace=False)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most whole sweeps first: xdist hands files out in this order, and at the end of the suite no
    process should be left with minutes of them while the others have nothing to do."""
    marked = {
        mark: Counter(item.path for item in items if item.get_closest_marker(mark))
        for mark in ("faults", "slow", "ray")
    }
    items.sort(key=lambda item: [-marked[mark][item.path] for mark in marked])


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Long bytes go by their argument's name: those made while tests are collected may differ by process (gzip's hold
    the time), and processes that share the tests must collect the same."""
    return argname if isinstance(val, bytes) and len(val) > 16 else None


@cache
def outcomes_of(module: Path) -> tuple[dict[str, str], str]:
    """Test -> why it failed, or nothing; and what the module's process printed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(module), f"--junitxml={report}"]
        # From the root: its packages are those of this checkout, wherever a fixture has gone meanwhile.
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {OWN_PROCESS: "1"}, capture_output=True, text=True
        )
        found: dict[str, str] = {}
        if report.is_file():
            for case in ElementTree.parse(report).iter("testcase"):
                bad = [child.text or "" for child in case if child.tag in ("failure", "error")]
                found[str(case.get("name"))] = "\n".join(bad)
        return found, done.stdout + done.stderr


SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
"""An S3 server of moto's that lives as long as its standard input."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 server on this machine.

    Attributes:
        url: s3://BUCKET.
    """

    url: str


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = next(line for line in server.stdout if line.strip().isdigit())
        yield int(port)
        server.terminate()


def s3_environment(port: int) -> dict[str, str]:
    """Variables by which a client finds the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }


@pytest.fixture
def bucket(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new, empty bucket."""
    for name, value in s3_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    import fsspec

    name = f"bucket-{uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return Bucket(f"s3://{name}")
