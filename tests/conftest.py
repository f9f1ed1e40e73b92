import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest

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
