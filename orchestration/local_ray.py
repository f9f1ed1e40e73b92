"""A Ray of this machine's own: it listens on loopback alone, behind a token and in a folder that are its user's.

Ray binds the servers of a node (GCS, raylet, every worker) to the node's address, and to all interfaces unless
that is loopback; it turns a loopback address that it is given into another. Only where it does not
support clusters, on macOS and Windows, does it take loopback itself, and that can be asked for. Ray 2.60 turns
token authentication on by itself for such a cluster, but writes its token readable by everybody, and its sockets
and packages into folders in which everybody may put others in their place.
"""

import os
import secrets
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any

CLUSTERS_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
OFF = "0"
SESSIONS_CHOICE = "RAY_TMPDIR"
"""The variable by which a user says where Ray's sessions lie."""
API_SERVER = "RAY_API_SERVER_ADDRESS"
"""The variable by which a process knows the state API of its Ray."""
LOOPBACK = "127.0.0.1"
TOKEN_MODE = "RAY_AUTH_MODE"
TOKEN_ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables by which a user gives a token of his own."""
OTHERS_BITS = 0o077


_users: dict[str, str | None] = {}
"""What the user's environment has under a name that is ours meanwhile."""


def begin_alone() -> dict[str, str]:
    """Makes the Ray that this process is about to start one of its own, and gives what `ray.init` must be told.

    Raises:
        ValueError: no place for Ray's token or its sessions.
    """
    if os.environ.setdefault(CLUSTERS_SWITCH, OFF) == OFF:
        _allow_clusters(False)
    is_guarded = os.environ.get(TOKEN_MODE, "token").lower() == "token"
    if is_guarded and not any(os.environ.get(name) for name in TOKEN_ELSEWHERE):
        keep_token(token_file())
    if os.environ.get(SESSIONS_CHOICE):
        return {}
    own = own_folder(Path(tempfile.gettempdir()) / f"tenfold-{os.geteuid()}")
    return {
        "_temp_dir": str(own / "ray")
    }  # one within: Ray opens the folder that it is given to everybody


def tell_api_server() -> dict[str, Any]:
    """Chooses where the state API of the Ray that is about to start will be, tells it to all processes of that Ray, and
    gives what `ray.init` must be told.

    Left to itself a worker (Ray 2.60) looks for a Ray on its machine. Where there are two it fails, or asks the other
    one, which does not know who asks: Train's PlacementGroupCleaner then takes its controller for dead and removes
    the workers from under it (seen with two clusters on one machine).
    """
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port = found.getsockname()[1]
    _users.setdefault(API_SERVER, os.environ.get(API_SERVER))
    os.environ[API_SERVER] = f"http://{LOOPBACK}:{port}"
    return {"include_dashboard": True, "dashboard_host": LOOPBACK, "dashboard_port": port}


def is_api_server(url: str) -> bool:
    """Whether a dashboard is where `tell_api_server` said: another program may have been quicker to take the port, and
    Ray then takes the next."""
    return os.environ.get(API_SERVER) == f"http://{url}"


def end_alone() -> None:
    """What this process starts next may join others again."""
    for name, value in _users.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
    _users.clear()
    if os.environ.get(CLUSTERS_SWITCH) == OFF:
        del os.environ[CLUSTERS_SWITCH]
        _allow_clusters(True)


def _allow_clusters(allowed: bool) -> None:
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = allowed  # read from the environment when ray was imported


def own_folder(folder: Path) -> Path:
    """A folder that nobody else can enter, made where there is none.

    Raises:
        ValueError: what is there is another's, or open to others.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & OTHERS_BITS:
        raise ValueError(
            f"{folder}: must be a folder that you alone can enter, as the sockets of your Ray lie there, is not; "
            f"remove it, or set {SESSIONS_CHOICE} to a folder of yours"
        )
    return folder


def token_file() -> Path:
    """Where Ray looks for its token."""
    return Path.home() / ".ray" / "auth_token"


def keep_token(path: Path) -> None:
    """Makes sure that there is a token, and that nobody else can read it.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        if not path.exists():
            _write_token(path)
        found = path.stat()
        if found.st_uid == os.geteuid() and found.st_mode & OTHERS_BITS:
            path.chmod(0o600)
    except OSError as error:
        raise ValueError(
            f"{path}: must be readable and writable, as Ray keeps the token of its clusters there, is not "
            f"({error.strerror}); set HOME to a folder of yours, or RAY_AUTH_TOKEN to a token"
        ) from error


def _write_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        os.link(temporary, path)  # whole, or not at all
    except FileExistsError:
        return  # another process of this user was quicker, and its token is as good
    finally:
        os.unlink(temporary)
