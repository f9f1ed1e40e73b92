"""From `data:` to tokenized sets: what trains, what is held out, and the audit of both.

prepare_data(spec)         -> PreparedData(train, eval, audit), cached by content
audit_data(spec)           -> Audit, also of data that cannot be trained on
prepare_whole(spec, data)  -> TokenizedSet and Audit of another file, nothing held out
cached_audit(spec)         -> Audit or None, in milliseconds, without numpy
count_tokens(path)         -> loss-bearing tokens of one epoch of a whole file
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.data.audit import Audit, renamed_place
from trainers.data.cache import (
    CODE_VERSION,
    cache_root,
    digest_of,
    file_digest,
    find_folder,
    read_json,
    tokenizer_key,
    write_folder,
    write_json,
)
from trainers.data.parts import Part, file_names, parts_of
from trainers.data.records import BadRows, DataError
from trainers.data.source_keys import source_key
from trainers.data.sources import Source, resolve_source
from trainers.data.spec import DataSpec
from trainers.data.tokenizer import (
    SHIPPED_MODEL,
    LoadedTokenizer,
    as_tokenizer,
    load_tokenizer,
    local_folder,
    tokenizer_folder,
)

if TYPE_CHECKING:
    from trainers.data.sequence_packing import PackedSet
    from trainers.data.token_set import TokenizedSet


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Train and held-out rows with their audit; under `packing` the train rows are sequences."""

    train: "TokenizedSet | PackedSet"
    eval: "TokenizedSet"
    audit: Audit


def prepare_data(spec: DataSpec) -> PreparedData:
    """Tokenizes the data once; from then on the cached sets are mapped from disk.

    Raises:
        DataError: data that cannot be read, bad rows (the first few and their number), nothing left
            within seq_len, or nothing on one side of the split.
    """
    from trainers.data.sequence_packing import PackedSet
    from trainers.data.token_set import TokenizedSet

    folder, audit = _prepared(spec, parts_of(spec))
    _refuse(spec, audit)
    train = (PackedSet if spec.packing else TokenizedSet).load(folder / "train")
    return PreparedData(train=train, eval=TokenizedSet.load(folder / "eval"), audit=audit)


def audit_data(spec: DataSpec) -> Audit:
    """The data's audit, also where it has bad rows or cannot be trained on.

    Raises: DataError: data that cannot be read as a whole.
    """
    return _prepared(spec, parts_of(spec))[1]


def near_duplicates_of(spec: DataSpec) -> dict[str, Any]:
    """Examples that nearly equal an earlier one, found once: {"num_train", "num_eval", "train",
    "eval"}, the last two as "place ~ place" of the first few (see near_duplicates.py).

    Raises: DataError: as `audit_data`.
    """
    parts = parts_of(spec)
    folder, audit = _prepared(spec, parts)
    known = read_json(folder / "near.json")
    if known is None:
        from trainers.data.near_duplicates import found_in

        known = found_in(folder)
        write_json(folder / "near.json", known)
    names = dict(zip(_kept_audit(folder)["files"], audit.files, strict=True))
    return known | {
        side: [renamed_place(line, names) for line in known[side]] for side in ("train", "eval")
    }


def prepare_whole(spec: DataSpec, data: str) -> "tuple[TokenizedSet, Audit]":
    """All rows of another file (folder, hub id), tokenized as the spec's are, nothing held out.

    Raises: DataError: as `prepare_data`.
    """
    from trainers.data.token_set import TokenizedSet

    spec, parts = _whole(spec, data)
    folder, audit = _prepared(spec, parts, has_split=False)
    _refuse(spec, audit)
    return TokenizedSet.load(folder / "train"), audit


def whole_folder(spec: DataSpec, data: str) -> Path:
    """Where in the cache `prepare_whole` keeps what it returns.

    Raises: DataError: no such data.
    """
    spec, parts = _whole(spec, data)
    return set_folder(spec, parts, tokenizer_folder(spec.model, spec.revision))


def _whole(spec: DataSpec, data: str) -> tuple[DataSpec, list[Part]]:
    spec = replace(spec, data=data, columns=None, format=None, data_revision=None)
    return spec, [Part(data=data, source=resolve_source(data))]


def cached_audit(spec: DataSpec) -> Audit | None:
    """The audit of data that was prepared before; None where it was not, or where only the hub
    knows whether it was.

    Raises: DataError: no such data, or data that is known to be unusable.
    """
    parts, model = parts_of(spec), local_folder(spec.model)
    if model is None or any(part.source.hub_id is not None for part in parts):
        return None
    values = read_json(set_folder(spec, parts, model) / "audit.json")
    if not values:
        return None
    audit = Audit.from_dict(values).renamed(_names_of(parts))
    _refuse(spec, audit)
    return audit


def _prepared(
    spec: DataSpec, parts: Sequence[Part], *, has_split: bool = True
) -> tuple[Path, Audit]:
    """The folder with the sets of some parts, and their audit."""
    tokenizer_files = tokenizer_folder(spec.model, spec.revision)
    folder = set_folder(spec, parts, tokenizer_files)
    if not find_folder(folder):
        tokenizer = load_tokenizer(tokenizer_files, chat_template=spec.chat_template)

        def fill(temporary: Path) -> None:
            from trainers.data.preparation import Preparation

            preparation = Preparation(spec, tokenizer, parts, temporary, has_split=has_split)
            write_json(temporary / "audit.json", preparation.run().to_dict())

        write_folder(folder, fill)
    return folder, Audit.from_dict(_kept_audit(folder)).renamed(_names_of(parts))


def _kept_audit(folder: Path) -> dict[str, Any]:
    kept = read_json(folder / "audit.json")
    assert kept is not None, "a set has its audit"
    return kept


def _names_of(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(name for part in parts for name in file_names(part.source))


def _refuse(spec: DataSpec, audit: Audit) -> None:
    """Raises: DataError: the audit found what cannot be trained on."""
    if spec.bad_rows == "error" or not audit.num_rows:
        BadRows(audit.num_bad_rows, list(audit.bad_rows)).raise_if_any()
    if audit.problems:
        raise DataError(audit.problems[0])


def set_folder(spec: DataSpec, parts: Sequence[Part], tokenizer_files: Path) -> Path:
    """Where in the cache the sets of some parts are, or will be."""
    key = [
        [[source_key(part.source), part.weight, part.held_out_frac] for part in parts],
        tokenizer_key(tokenizer_files),
        _template_key(spec.chat_template),
        _reading_key(spec),
        [spec.seq_len, spec.truncation],
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
    options = [dict(spec.columns or {}), spec.format, spec.completion_only, spec.system_role]
    return [CODE_VERSION, *options]


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
    source = resolve_source(path)
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
    from trainers.data.examples import RowEncoder
    from trainers.data.row_reader import RowReader

    bad = BadRows()
    reader = RowReader(spec, bad)
    encoder = RowEncoder.of(spec, tokenizer)
    rows = encoder.encode(reader.rows(source), bad)
    count = sum(tokens.num_loss_tokens for _, _, tokens in rows)
    bad.raise_if_any()
    if not reader.tally.shapes:
        raise DataError(f"{spec.data}: must hold rows, holds none that can be used")
    return count


@cache
def _say_shipped() -> None:
    print(f"count_tokens: with the shipped tokenizer ({SHIPPED_MODEL.name})", file=sys.stderr)
