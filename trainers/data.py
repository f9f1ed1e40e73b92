"""From `data:` to tokenized sets: what trains, what is held out, and the audit of both.

    prepare_data(spec)  -> PreparedData(train, eval, audit), cached by content
    cached_audit(spec)  -> Audit or None, in milliseconds, without numpy
    count_tokens(path)  -> loss-bearing tokens of one epoch of a whole file

Rows are read in sources.py and json_rows.py, shaped in rows.py and messages.py, rendered in
chat_template.py, encoded and masked in examples.py. The mask that trains is the mask that counts.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.audit import Audit
from trainers.data_cache import (
    CODE_VERSION,
    cache_root,
    digest_of,
    file_digest,
    read_json,
    source_key,
    tokenizer_key,
    write_folder,
    write_json,
)
from trainers.data_spec import DataSpec
from trainers.records import BadRows, DataError
from trainers.sources import Source, resolve_source
from trainers.tokenizer import (
    SHIPPED_MODEL,
    LoadedTokenizer,
    as_tokenizer,
    load_tokenizer,
    local_folder,
    tokenizer_folder,
)

if TYPE_CHECKING:
    from trainers.token_set import Example, TokenizedSet

__all__ = [
    "Audit",
    "DataError",
    "DataSpec",
    "Example",
    "PreparedData",
    "TokenizedSet",
    "cached_audit",
    "count_tokens",
    "load_tokenizer",
    "prepare_data",
]


def __getattr__(name: str) -> Any:
    # numpy costs 0.1 s, which `tenfold plan` with a known count must not pay.
    if name in ("Example", "TokenizedSet"):
        from trainers import token_set

        return getattr(token_set, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Train and held-out rows with their audit."""

    train: "TokenizedSet"
    eval: "TokenizedSet"
    audit: Audit


def prepare_data(spec: DataSpec) -> PreparedData:
    """Tokenizes the data once; from then on the cached sets are mapped from disk.

    Raises:
        DataError: data that cannot be read, bad rows (the first few and their number), nothing left
            within seq_len, or nothing on one side of the split.
    """
    from trainers.token_set import TokenizedSet

    tokenizer_files = tokenizer_folder(spec.model, spec.revision)
    folder = _set_folder(spec, tokenizer_files)
    if not folder.is_dir():
        tokenizer = load_tokenizer(tokenizer_files, chat_template=spec.chat_template)
        _write_sets(spec, tokenizer, folder)
    return PreparedData(
        train=TokenizedSet.load(folder / "train"),
        eval=TokenizedSet.load(folder / "eval"),
        audit=Audit.from_dict(read_json(folder / "audit.json")),
    )


def cached_audit(spec: DataSpec) -> Audit | None:
    """The audit of data that was prepared before; None where it was not, or where only the hub
    knows whether it was.

    Raises: DataError: no such data.
    """
    sources = [resolve_source(data) for data in (spec.data, spec.eval) if isinstance(data, str)]
    model = local_folder(spec.model)
    if model is None or any(source.hub_id is not None for source in sources):
        return None
    values = read_json(_set_folder(spec, model) / "audit.json")
    return Audit.from_dict(values) if values else None


def _set_folder(spec: DataSpec, tokenizer_files: Path) -> Path:
    eval_key = spec.eval
    if isinstance(spec.eval, str):
        eval_key = source_key(resolve_source(spec.eval))
    key = [
        source_key(resolve_source(spec.data, spec.data_revision)),
        tokenizer_key(tokenizer_files),
        _template_key(spec.chat_template),
        _reading_key(spec),
        [spec.seq_len, spec.truncation, spec.bad_rows, eval_key],
    ]
    return cache_root() / "sets" / digest_of(key)


def _template_key(chat_template: str | None) -> str | None:
    if chat_template is None:
        return None
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise DataError(f"chat_template must be a readable Jinja file, found none at {path}")
    return file_digest(path)


def _reading_key(spec: DataSpec) -> Any:
    return [CODE_VERSION, dict(spec.columns or {}), spec.format, spec.completion_only]


def _write_sets(spec: DataSpec, tokenizer: LoadedTokenizer, folder: Path) -> None:
    from trainers.preparation import Preparation

    preparation = Preparation(spec, tokenizer)
    audit = preparation.run()

    def fill(temporary: Path) -> None:
        preparation.train.built().save(temporary / "train")
        preparation.held_out.built().save(temporary / "eval")
        write_json(temporary / "audit.json", audit.to_dict())

    write_folder(folder, fill)


def count_tokens(
    path: str | Path,
    tokenizer: Any = None,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    chat_template: str | Path | None = None,
    completion_only: bool = True,
) -> int:
    """Loss-bearing tokens of one epoch of a whole file, nothing truncated and nothing held out.

    Args:
        path: file, folder or hub id.
        tokenizer: model folder or hub id, tokenizers.Tokenizer or transformers tokenizer; None is
            the shipped base's, which is said once on stderr.
    Raises:
        DataError: data that cannot be read, or bad rows.
    """
    template = str(chat_template) if chat_template else None
    spec = DataSpec(
        data=str(path),
        columns=columns,
        format=format,
        chat_template=template,
        completion_only=completion_only,
    )
    if tokenizer is None:
        _say_shipped()
    source = resolve_source(spec.data)
    loaded, model_key = _identified(tokenizer, template)
    key = digest_of([source_key(source), model_key, _template_key(template), _reading_key(spec)])
    known = cache_root() / "counts" / f"{key}.json"
    count = read_json(known)
    if count is None:
        loaded = loaded or as_tokenizer(tokenizer, chat_template=template)
        count = {"loss_tokens": _counted(spec, source, loaded)}
        write_json(known, count)
    return count["loss_tokens"]


def _identified(tokenizer: Any, chat_template: str | None) -> tuple[LoadedTokenizer | None, Any]:
    """A tokenizer's cache key; from its files alone, unloaded, where it has files."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        folder = local_folder(tokenizer)
        if folder is not None:
            return None, tokenizer_key(folder)
    loaded = as_tokenizer(tokenizer, chat_template=chat_template)
    return loaded, loaded.fingerprint


def _counted(spec: DataSpec, source: Source, tokenizer: LoadedTokenizer) -> int:
    # Reading and encoding is 40 ms of imports, which a plan with a known count does not pay.
    from trainers.examples import RowEncoder
    from trainers.row_reader import RowReader

    bad = BadRows()
    reader = RowReader(spec, bad)
    encoder = RowEncoder(tokenizer, completion_only=spec.completion_only)
    rows = encoder.encode(reader.rows(source), bad)
    count = sum(tokens.num_loss_tokens for _, tokens in rows)
    bad.raise_if_any()
    if not reader.tally.shapes:
        raise DataError(f"{spec.data}: must hold rows, holds none that can be used")
    return count


@cache
def _say_shipped() -> None:
    print(f"count_tokens: with the shipped tokenizer ({SHIPPED_MODEL.name})", file=sys.stderr)
