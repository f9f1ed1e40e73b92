"""Which processes this one can see."""

import os
import socket
from pathlib import Path

NAMESPACE = Path("/proc/self/ns/pid")


def host_id() -> str:
    """What processes that know each other by number have in common: the host, and on Linux the namespace, as
    containers of one host can share its name."""
    namespace = os.readlink(NAMESPACE) if NAMESPACE.exists() else ""
    return f"{socket.gethostname()} {namespace}".rstrip()


def is_alive(pid: int) -> bool:
    """Whether a process that this one can see lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
