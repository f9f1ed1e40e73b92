"""A hub model is fetched once for a cache, whoever asks and whoever dies: real processes, the real hub
client against a hub of our own."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainers.base_fetch import base_folder, commit_of, is_hub_id, missing_bytes

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TIMEOUT_S = 120
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 1000,
    "model-00002-of-00002.safetensors": b"b" * 500,
    "model.safetensors.index.json": b"{}",
}
OTHERS = {
    "pytorch_model.bin": b"c" * 2000,
    "consolidated.safetensors": b"d" * 1500,
    "original/consolidated.00.safetensors": b"e" * 1500,
    "README.md": b"read me",
}
FETCH = """
import sys, time
from pathlib import Path
from trainers.base_fetch import base_folder

folder, log, go = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
weights = folder / "model.safetensors"

def download(model, revision):
    if not weights.exists():
        with log.open("a") as file:
            file.write("download\\n")
        while not go.exists():
            time.sleep(0.02)
        folder.mkdir(exist_ok=True)
        weights.write_bytes(b"whole")
    return str(folder)

found = base_folder("owner/model", None, download)
assert (Path(found) / "model.safetensors").read_bytes() == b"whole"
"""
ASK = """
import json, sys
from trainers import base_fetch
print(json.dumps(getattr(base_fetch, sys.argv[1])("owner/model", sys.argv[2] or None)))
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the awaited state never came"
        time.sleep(0.02)


class Place:
    """A node: its hub cache, and processes that fetch into it by a downloader that waits for `go`."""

    def __init__(self, root: Path) -> None:
        self.root, self.log, self.go = root, root / "log", root / "go"
        self.folder, self.home = root / "snapshot", root / "home"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        arguments = [str(path) for path in (self.folder, self.log, self.go)]
        env = os.environ | {"HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", FETCH, *arguments], env=env)
        self.started.append(process)
        return process

    def num_downloads(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def num_waiting(self) -> int:
        """Processes that wait for the lock, as the kernel has it."""
        inodes = {str(path.stat().st_ino) for path in self.home.rglob("tenfold-*.lock")}
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        waiting = [line for line in lines if line[1] == "->"]
        return sum(line[6].rsplit(":", 1)[1] in inodes for line in waiting)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for process in place.started:
        process.kill()
        process.wait()


def test_base_fetch_four_processes_at_once_download_one_time(place):
    processes = [place.start() for _ in range(4)]
    wait_until(lambda: place.num_waiting() == 3)
    assert place.num_downloads() == 1
    place.go.touch()
    assert [process.wait(TIMEOUT_S) for process in processes] == [0, 0, 0, 0]
    assert place.num_downloads() == 1


def test_base_fetch_holder_killed_while_it_downloads_the_next_goes_on(place):
    holder = place.start()
    wait_until(lambda: place.num_downloads() == 1)
    others = [place.start() for _ in range(2)]
    wait_until(lambda: place.num_waiting() == 2)
    holder.send_signal(signal.SIGKILL)
    wait_until(lambda: place.num_downloads() == 2)
    place.go.touch()
    assert [process.wait(TIMEOUT_S) for process in others] == [0, 0]
    assert place.num_downloads() == 2


def test_base_fetch_local_folder_is_given_back_and_nothing_is_downloaded(tmp_path):
    def download(model: str, revision: str | None) -> str:
        raise AssertionError(f"{model} was downloaded")

    assert base_folder(str(tmp_path), None, download) == str(tmp_path)
    assert missing_bytes(str(tmp_path), None) == 0
    assert commit_of(str(tmp_path), None) is None


def test_base_fetch_local_path_that_is_missing_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    paths = (str(tmp_path / "gone"), "./gone", "~/gone", "here", "gone.json")
    assert [is_hub_id(path) for path in paths] == [False] * 5
    assert is_hub_id("owner/model")


def test_base_fetch_commit_needs_no_hub(monkeypatch):
    assert commit_of("owner/model", COMMIT) == COMMIT


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as its client asks of it for one model; `server.files` is what it holds."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files: dict[str, bytes] = self.server.files
        name = path.removeprefix(f"/owner/model/resolve/{COMMIT}/").removeprefix(
            "/owner/model/resolve/main/"
        )
        if path.startswith("/api/models/owner/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": f"{len(body):040x}"}
                for name, body in files.items()
            ]
            self._send(json.dumps(tree).encode(), with_body)
        elif path.startswith("/api/models/owner/model"):
            self._send(json.dumps({"id": "owner/model", "sha": COMMIT}).encode(), with_body)
        elif name in files:
            if with_body:
                self.server.fetched.append(name)
            self._send(files[name], with_body, etag=f"{name}-{len(files[name])}")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, body: bytes, with_body: bool, etag: str = "x") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag.replace("/", "-")}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.fetched = FILES | OTHERS, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def start_asking(
    hub: http.server.ThreadingHTTPServer, home: Path, function: str, revision: str = "", **env: str
) -> subprocess.Popen[str]:
    """A process with its hub cache that calls a function of base_fetch."""
    own = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", ASK, function, revision],
        env=os.environ | own | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asked(process: subprocess.Popen[str]) -> object:
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


def test_base_fetch_from_a_hub_takes_weights_config_and_tokenizer_alone(hub, tmp_path):
    needed = asked(start_asking(hub, tmp_path, "missing_bytes"))
    assert needed == sum(len(body) for body in FILES.values())
    folder = Path(str(asked(start_asking(hub, tmp_path, "base_folder"))))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert sorted(hub.fetched) == sorted(FILES)
    assert asked(start_asking(hub, tmp_path, "missing_bytes")) == 0


def test_base_fetch_from_a_hub_by_three_processes_fetches_every_file_once(hub, tmp_path):
    processes = [start_asking(hub, tmp_path, "base_folder") for _ in range(3)]
    folders = {asked(process) for process in processes}
    assert len(folders) == 1
    assert sorted(hub.fetched) == sorted(FILES)


def test_base_fetch_commit_of_a_branch_is_what_the_hub_says(hub, tmp_path):
    assert asked(start_asking(hub, tmp_path, "commit_of", "main")) == COMMIT


def test_base_fetch_without_a_network_uses_what_is_complete(hub, tmp_path):
    folder = asked(start_asking(hub, tmp_path, "base_folder", COMMIT))
    offline = {"HF_HUB_OFFLINE": "1"}
    assert asked(start_asking(hub, tmp_path, "base_folder", COMMIT, **offline)) == folder
    assert asked(start_asking(hub, tmp_path, "missing_bytes", COMMIT, **offline)) == 0


def test_base_fetch_without_a_network_and_incomplete_is_refused(hub, tmp_path):
    asking = start_asking(hub, tmp_path, "missing_bytes", COMMIT, HF_HUB_OFFLINE="1")
    _, stderr = asking.communicate(timeout=TIMEOUT_S)
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: model owner/model: no folder here, and as a hub id")


def test_base_fetch_from_a_hub_without_safetensors_is_refused(hub, tmp_path):
    hub.files = {name: body for name, body in hub.files.items() if "safetensors" not in name}
    _, stderr = start_asking(hub, tmp_path, "base_folder").communicate(timeout=TIMEOUT_S)
    assert "model owner/model: must have *.safetensors weights on the hub, has none" in stderr
