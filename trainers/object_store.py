"""Files at a URL (s3://bucket/runs, gs://..., whatever fsspec has a client for).

An object store has no rename, no append and no lock. It has objects that appear whole or not at all, and writes
on the condition that there is no such object yet. Credentials are the environment's, never the URL's.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trainers.credentials import credential_in, mask_logs, masked

URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
PATIENCE_S = 300.0
"""How long a store that does not answer is asked again, beyond what its client does on its own."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
ANSWERS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
)
"""What asking again does not change."""
CLIENTS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
"""Protocol -> the package that fsspec needs for it."""
SECRETS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
    ),
    "abfs": ("AZURE_STORAGE_CONNECTION_STRING",),
}
"""Protocol -> variables that its client reads, where a machine has no identity of its own at the store."""
ONE_PROCESS = ("memory",)
"""Protocols whose files no other process sees."""

Result = TypeVar("Result")


class StoreError(ValueError):
    """A store that cannot be used, in one line."""


def is_url(text: str) -> bool:
    """Whether a storage is a URL, and not a folder."""
    return bool(URL.match(text))


def protocol_of(url: str) -> str:
    """s3 of s3://bucket; "" of a folder."""
    return url.partition("://")[0] if is_url(url) else ""


def checked_url(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ValueError: it holds credentials, which would be written into reports, or no bucket.
    """
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    if "@" in host and scheme not in ("abfs", "abfss"):  # there it is container@account
        raise ValueError(
            f"storage {scheme}://...@...: must be a URL without credentials; set them in the environment "
            "of the driver and of every node"
        )
    if why := credential_in(url):
        raise ValueError(f"storage {scheme}://{host}/...: {why}")
    if scheme in ONE_PROCESS or not (host or path.strip("/")):
        raise ValueError(
            f"storage must be a folder, or a URL with a bucket that every node reaches "
            f"(s3://BUCKET/runs), got {url}"
        )
    return url.rstrip("/")


class ObjectStore:
    """The objects under a URL, by names relative to it.

    Args:
        url: see `checked_url`.
        patience_s: see PATIENCE_S.

    Raises:
        StoreError: fsspec has no client for it, or it is not installed.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        from fsspec.core import url_to_fs  # a plan without a URL need not pay

        mask_logs()
        self.url, self.patience_s = url, patience_s
        try:
            # What another machine wrote must be seen: no listing is remembered.
            self.fs, self.root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            client = CLIENTS.get(protocol_of(url), "it")
            raise StoreError(
                f"{url}: needs a client that fsspec can load ({masked(str(error))}); install {client} "
                "on the driver and on every node"
            ) from error
        self.has_folders = "file" in self._protocols()
        if self.has_folders:
            self.fs.auto_mkdir = True

    def _protocols(self) -> tuple[str, ...]:
        protocol: Any = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def read(self, name: str) -> bytes | None:
        """An object; None where there is none."""
        try:
            return self._asked(lambda: self.fs.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def read_all(self, names: list[str]) -> dict[str, bytes]:
        """Many small objects at once, those that there are."""
        if not names:
            return {}
        wanted = {self._path(name): name for name in names}

        def read() -> dict[str, bytes]:
            found = self.fs.cat(list(wanted), on_error="return")
            for answer in found.values():
                if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                    raise answer  # one that is left out would be taken for one that is not there
            return {path: answer for path, answer in found.items() if isinstance(answer, bytes)}

        return {wanted[path]: content for path, content in self._asked(read).items()}

    def write(self, name: str, content: bytes, *, new: bool = False) -> bool:
        """Puts an object.

        Args:
            new: only if there is none of that name. False is returned where there is.
        """
        mode = "create" if new else "overwrite"
        try:
            self._asked(lambda: self.fs.pipe_file(self._path(name), content, mode=mode))
        except FileExistsError:
            return False
        return True

    def upload(self, files: Mapping[Path, str]) -> None:
        """Puts files of any size, at once where the client can: file -> name."""
        here, there = [str(file) for file in files], [self._path(name) for name in files.values()]
        self._asked(lambda: self.fs.put(here, there))

    def download(self, name: str, file: Path) -> None:
        """Writes an object into a file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        self._asked(lambda: self.fs.get_file(self._path(name), str(file)))

    def listing(self, under: str = "") -> dict[str, str]:
        """Name -> what changes with the object's content, of everything under a name."""
        path = self._path(under)

        def find() -> Any:
            return self.fs.find(path, detail=True)

        try:
            found = self._asked(find)
        except FileNotFoundError:
            return {}
        # A store gives back its own form of a path: what lies behind the root is the name.
        start = len(self.root) + 1
        return {str(key)[start:]: _signature(info) for key, info in found.items()}

    def remove(self, names: list[str]) -> None:
        """Removes objects, in their order, those that there are; of a file system also the folders that they
        leave empty, as an object store has none."""
        for name in names:
            try:
                self._asked(lambda name=name: self.fs.rm_file(self._path(name)))
            except FileNotFoundError:
                continue
        if self.has_folders:
            for name in names:
                self._remove_empty(Path(self._path(name)).parent)

    def _remove_empty(self, folder: Path) -> None:
        while folder.is_relative_to(self.root):
            try:
                folder.rmdir()
            except OSError:  # something is there, or another process was quicker
                return
            folder = folder.parent

    def require_writable(self) -> None:
        """Writes an object, reads it back and removes it, without patience.

        Raises:
            StoreError: it cannot be done.
        """
        name, patience_s = f".tenfold-write-{time.time_ns()}", self.patience_s
        self.patience_s = 0.0
        try:
            self.write(name, b"x")
            if self.read(name) != b"x":
                raise StoreError(f"storage {self.url}: what is written there is not read back")
            self.remove([name])
        except ANSWERS as error:
            raise self._unusable(error) from error
        finally:
            self.patience_s = patience_s

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _unusable(self, error: Exception) -> StoreError:
        text = " ".join(masked(str(error)).split()) or type(error).__name__
        return StoreError(
            f"storage {self.url}: must be readable and writable from here, is not ({text[:300]}); create the "
            "bucket, or set the store's credentials and endpoint in the environment"
        )

    def _asked(self, call: Callable[[], Result]) -> Result:
        """Calls until the store answers, or patience ends.

        Raises:
            StoreError: it did not answer.
        """
        deadline, pause = time.monotonic() + self.patience_s, FIRST_PAUSE_S
        while True:
            try:
                return call()
            except ANSWERS:
                raise
            except Exception as error:  # the clients' errors have no base in common
                if time.monotonic() + pause > deadline:
                    raise self._unusable(error) from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)


def _signature(info: dict[str, Any]) -> str:
    tag = next((info[key] for key in ("ETag", "etag", "md5Hash", "content_md5") if key in info), "")
    changed = next((info[key] for key in ("LastModified", "mtime", "updated") if key in info), "")
    return f"{tag} {info['size']} {changed}"
