"""Hub datasets by their own files, so that their text stays text.

`datasets` says which files a dataset's train split is, and fetches them; they are read as any file
is. Its own readers would retype text (an answer "1" becomes a number; field case A21) and lose the
line. Only kinds that are not read here (arrow, text, webdataset, images) go through them.

    CACHE/hub/KEY.json   the files a hub id stood for when it was last reached, for machines without
                         a network
"""

import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from trainers.credentials import mask_logs, masked
from trainers.data.cache import cache_root, digest_of, read_json, write_json
from trainers.data.records import DataError, DataFile
from trainers.data.suffixes import file_suffix

BUILDERS = ("csv", "json", "parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Options of a dataset's card that do not change how its files are read here; `sep` is looked at.
HARMLESS_OPTIONS = frozenset(
    {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
)


def train_files(hub_id: str, revision: str | None = None) -> tuple[DataFile, ...] | None:
    """The files of a train split, fetched to this machine; None where only `datasets` reads them.

    Args: hub_id: `owner/name` or `owner/name:subset`, or a local folder laid out like one.
    Raises: DataError: not reached, not allowed, no such dataset or subset, or no train split.
    """
    local = Path(hub_id).is_dir()
    return _fetched_files(hub_id, revision) if local else remote_files(hub_id, revision)


@cache
def remote_files(hub_id: str, revision: str | None) -> tuple[DataFile, ...] | None:
    """Looked up once a process: the rows read are of the commit that the cache's key was made of."""
    memo = cache_root() / "hub" / f"{digest_of([hub_id, revision])[:32]}.json"
    try:
        files = _fetched_files(hub_id, revision)
    except Unreachable as error:
        known = read_json(memo)
        pairs = known["files"] if known else ()
        files = tuple(DataFile(Path(path), name) for path, name in pairs)
        if known is None or not all(file.path.is_file() for file in files):
            raise DataError(str(error)) from error
        if not files:
            return None
        print(
            f"{hub_id}: the hub is not reached; reading the files fetched before", file=sys.stderr
        )
        return files
    write_json(memo, {"files": [[str(file.path), file.name] for file in files or ()]})
    return files


class Unreachable(DataError):
    """The hub cannot be reached; files fetched before may stand in."""


def _fetched_files(hub_id: str, revision: str | None) -> tuple[DataFile, ...] | None:
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        return _files_of(_builder(hub_id, revision), hub_id)
    except (ConnectionError, httpx.TransportError) as error:
        raise Unreachable(not_loaded(hub_id, error)) from error
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(not_loaded(hub_id, error)) from error


def not_loaded(hub_id: str, error: BaseException) -> str:
    """Why a hub id cannot be read, on one line."""
    reason = " ".join((masked(str(error)) or type(error).__name__).split())
    advice = "; name it as owner/name:subset" if "Config name is missing" in reason else ""
    return (
        f"data must be a file, a folder or a hub id; {hub_id} is neither file nor folder here, and"
        f" as a hub id it cannot be loaded: {reason}{advice}"
    )


def _builder(hub_id: str, revision: str | None) -> Any:
    import datasets

    mask_logs()
    name, _, subset = hub_id.partition(":")
    builder = datasets.load_dataset_builder(name, subset or None, revision=revision)
    if builder.name == "cache":  # what `datasets` falls back to without a network: retyped rows
        raise ConnectionError(f"the hub is not reached for {hub_id}")
    return builder


def _files_of(builder: Any, hub_id: str) -> tuple[DataFile, ...] | None:
    import datasets

    splits = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
    if splits and "train" not in splits:
        raise DataError(
            f"hub dataset {hub_id} must have a train split, has {', '.join(splits)}; fetch the"
            " files you want and give them as data"
        )
    urls = splits.get("train", [])
    if not urls or not _is_read_here(builder, urls):
        return None
    config = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    manager = datasets.DownloadManager(
        dataset_name=builder.dataset_name, base_path=builder.base_path, download_config=config
    )
    paths = manager.download(urls)
    base = f"{builder.base_path}/"
    return tuple(
        DataFile(Path(path), f"{hub_id}: {url.removeprefix(base)}")
        for path, url in zip(paths, urls, strict=True)
    )


def _is_read_here(builder: Any, urls: list[str]) -> bool:
    """Whether all files are of kinds that are read here, and their card asks for nothing that is
    not done here (another quote character, a field of the JSON)."""
    config, suffixes = builder.config, {file_suffix(url) for url in urls}
    default = type(config)()
    changed = {
        option.name
        for option in fields(config)
        if getattr(config, option.name) != getattr(default, option.name)
    }
    is_plain = builder.name in BUILDERS and changed <= HARMLESS_OPTIONS and "" not in suffixes
    return is_plain and all(
        suffix not in DELIMITERS or config.sep == DELIMITERS[suffix] for suffix in suffixes
    )
