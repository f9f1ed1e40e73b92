"""The Ray that Tenfold starts: who can reach it, and who can ask it for anything."""

import importlib
import ipaddress
import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from orchestration import sweep
from orchestration.local_ray import (
    API_SERVER,
    CLUSTERS_SWITCH,
    begin_alone,
    end_alone,
    keep_token,
    own_folder,
    tell_api_server,
)
from tests.orchestration.sweeps import ROOT, TIMEOUT_S

DRIVER = """
import json, os, sys
from orchestration import sweep
sweep.start_ray(None)
import ray
ray.get(ray.remote(lambda: os.getpid()).remote())  # a worker of its own, which listens, too
node = ray._private.worker._global_node
found = {"gcs": node.gcs_address, "dashboard": node.webui_url, "session": node.get_session_dir_path()}
print(json.dumps(found), flush=True)
sys.stdin.read()
sweep.stop_ray()
"""
HF_TOKEN = "hf_MARKERmarkerMARKERmarker01"
ASK_STATE = """
import json
from orchestration import sweep
sweep.start_ray(None)
import ray
class Asked:
    def id(self):
        return ray.get_runtime_context().get_actor_id()
def state(actor_id):
    from ray.util.state import get_actor
    found = get_actor(actor_id, timeout=30)
    return found and found.state
asked = ray.remote(Asked).remote()
found = ray.get(ray.remote(state).remote(ray.get(asked.id.remote())))
print(json.dumps({"state": found}))
sweep.stop_ray()
"""
ASK_GCS = """
import sys
from ray._raylet import GcsClient
print(len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
"""


@dataclass(frozen=True)
class Cluster:
    """A local cluster of ours: addresses, the folder of its session, and the home of its user."""

    driver: psutil.Process
    gcs: str
    dashboard: str
    session: Path
    home: Path

    @property
    def token_file(self) -> Path:
        return self.home / ".ray" / "auth_token"

    def processes(self) -> list[psutil.Process]:
        found = {p.pid: p for p in (self.driver, *self.driver.children(recursive=True))}
        for process in psutil.process_iter(["cmdline"]):
            if str(self.session) in " ".join(process.info["cmdline"] or []):
                found[process.pid] = process
        return list(found.values())


def environment(home: Path, **values: str) -> dict[str, str]:
    """That of a user who has set nothing of Ray's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | values


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("user")
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=environment(folder, HF_TOKEN=HF_TOKEN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        umask=0o022,  # under which Ray's own files can be read by everybody
    ) as driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        facts = json.loads(driver.stdout.readline())
        yield Cluster(
            psutil.Process(driver.pid),
            facts["gcs"],
            facts["dashboard"],
            Path(facts["session"]),
            folder,
        )
        driver.stdin.close()
        assert driver.wait(TIMEOUT_S) == 0, (folder / "stderr").read_text()


def status_of(url: str, token: str = "", body: dict | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(
        url, data, headers | {"Content-Type": "application/json"}, method="POST" if body else "GET"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.ray
def test_local_ray_listens_on_loopback_alone(cluster):
    listening = {
        (address.laddr.ip, process.name())
        for process in cluster.processes()
        for address in process.net_connections("inet")
        if address.status == psutil.CONN_LISTEN
    }
    names = {name for _, name in listening}
    assert {"gcs_server", "raylet"} <= names
    assert len(listening) >= 5  # workers, agents and the dashboard
    for ip, name in listening:
        bare = ipaddress.ip_address(ip.removeprefix("::ffff:"))
        assert bare.is_loopback, f"{name} listens on {ip}"


@pytest.mark.ray
def test_local_ray_answers_nobody_without_its_token(cluster, tmp_path):
    token = cluster.token_file.read_text()
    jobs = f"http://{cluster.dashboard}/api/jobs/"
    marker = tmp_path / "marker"
    for wrong in ("", "0" * 64):
        assert status_of(jobs, wrong) in (401, 403)
        assert status_of(jobs, wrong, {"entrypoint": f"touch {marker}"}) in (401, 403)
        assert status_of(f"http://{cluster.dashboard}/api/cluster_status", wrong) in (401, 403)
    assert status_of(jobs, token) == 200
    assert not marker.exists()
    answers = {}
    for name, user in (("stranger", tmp_path), ("owner", cluster.home)):
        mode = {"RAY_AUTH_MODE": "token"} if name == "owner" else {"RAY_AUTH_MODE": "disabled"}
        answers[name] = subprocess.run(
            [sys.executable, "-c", ASK_GCS, cluster.gcs],
            env=environment(user, **mode),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert answers["owner"].stdout.strip() == "1"
    assert answers["stranger"].returncode != 0
    assert "nauthenticated" in answers["stranger"].stderr or "token" in answers["stranger"].stderr


@pytest.mark.ray
def test_local_ray_keeps_token_and_sockets_to_its_user_and_tells_no_token_anywhere(cluster):
    token = cluster.token_file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(cluster.token_file.stat().st_mode) == 0o600
    own = cluster.session.parents[1]
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert own.stat().st_uid == os.geteuid()
    logs = [path for path in cluster.session.rglob("*") if path.is_file()]
    assert any(path.name == "raylet.out" for path in logs)
    told = [path.read_text(errors="replace") for path in [*logs, cluster.home / "stderr"]]
    told += [" ".join(process.cmdline()) for process in cluster.processes()]
    assert not [text for text in told if token in text or HF_TOKEN in text]


def test_token_of_ray_is_made_once_and_closed_to_others(tmp_path):
    path = tmp_path / "home" / ".ray" / "auth_token"
    keep_token(path)
    token = path.read_text()
    assert int(token, 16) > 0
    path.chmod(0o644)  # as Ray writes it
    keep_token(path)
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["auth_token"]


def test_token_of_ray_that_cannot_be_kept_is_refused_with_the_way_out(tmp_path):
    (tmp_path / ".ray").write_text("a file in the folder's place")
    with pytest.raises(ValueError, match="set HOME to a folder of yours, or RAY_AUTH_TOKEN"):
        keep_token(tmp_path / ".ray" / "auth_token")


def test_folder_of_rays_sessions_that_others_can_enter_is_refused(tmp_path):
    assert own_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("open", "link"):
        with pytest.raises(ValueError, match="must be a folder that you alone can enter"):
            own_folder(tmp_path / name)


def test_local_ray_leaves_the_environment_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # a user's choice
    monkeypatch.delenv(CLUSTERS_SWITCH, raising=False)
    importlib.import_module("ray")  # which sets a variable of its own
    before = dict(os.environ)
    assert begin_alone() == {}
    assert os.environ[CLUSTERS_SWITCH] == "0"
    told = tell_api_server()
    assert os.environ[API_SERVER] == f"http://127.0.0.1:{told['dashboard_port']}"
    tell_api_server()  # the first port was taken
    end_alone()
    assert dict(os.environ) == before


@pytest.mark.parametrize("users", [None, "http://elsewhere:8265"])
def test_local_ray_gives_the_users_state_api_back(monkeypatch, users):
    monkeypatch.delenv(API_SERVER, raising=False)
    if users:
        monkeypatch.setenv(API_SERVER, users)
    tell_api_server()
    assert os.environ[API_SERVER] != users
    end_alone()
    assert os.environ.get(API_SERVER) == users


def test_local_ray_whose_port_was_taken_is_started_again(monkeypatch):
    urls: list[str] = []
    ports: list[int] = []
    ended: list[bool] = []

    def init(**options):
        ports.append(options["dashboard_port"])
        return SimpleNamespace(dashboard_url=urls.pop() or f"127.0.0.1:{ports[-1]}")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    urls[:] = ["", "127.0.0.1:1"]  # the second time it is free
    sweep._start_local({})
    assert (len(ports), len(ended)) == (2, 1)
    urls[:] = ["127.0.0.1:1"] * 3
    with pytest.raises(ValueError, match="3 times another program took"):
        sweep._start_local({})
    end_alone()


def test_worker_asks_the_state_api_of_its_own_ray_beside_another(cluster, tmp_path):
    # Ray's own way fails where it finds two, and Train's cleaner would take a living controller for dead.
    done = subprocess.run(
        [sys.executable, "-c", ASK_STATE], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"state": "ALIVE"}
