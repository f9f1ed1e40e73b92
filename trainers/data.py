"""From `data:` to tokenized sets: what trains, what is held out, and the audit of both.

    prepare_data(spec)  -> PreparedData(train, eval, audit), cached by content
    cached_audit(spec)  -> Audit or None, in milliseconds, without numpy
    count_tokens(path)  -> loss-bearing tokens of one epoch of a whole file

The rows are read in trainers/sources.py, shaped in rows.py and messages.py, rendered in
chat_template.py, encoded and masked in examples.py. The mask that trains is the mask that counts.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.audit import Audit, Tally
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
from trainers.examples import RowEncoder, fitted_rows
from trainers.records import BadRows, DataError, Origin, RowError
from trainers.rows import (
    Row,
    RowShape,
    check_columns,
    detect_shape,
    normalised_row,
    row_digest,
    wanted_columns,
)
from trainers.sources import Source, read_records, resolve_source
from trainers.tokenizer import (
    SHIPPED_MODEL,
    LoadedTokenizer,
    as_tokenizer,
    load_tokenizer,
    local_folder,
    tokenizer_folder,
)

if TYPE_CHECKING:
    from trainers.token_set import Example, SetBuilder, TokenizedSet, pad_batch

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
    "pad_batch",
    "prepare_data",
]
TRUNCATIONS = ("drop", "cut")
BAD_ROW_POLICIES = ("error", "drop")
DIGEST_RANGE = 2**64


def __getattr__(name: str) -> Any:
    # numpy costs 0.1 s, which `tenfold plan` with a known count must not pay.
    if name in ("Example", "TokenizedSet", "pad_batch"):
        from trainers import token_set

        return getattr(token_set, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything that decides which tokens are trained and which are held out.

    Args:
        data: file, folder or hub id (`owner/name`, `owner/name:subset`).
        model: whose tokenizer: folder or hub id; None is the base that Tenfold ships.
        columns: role -> column, e.g. {"prompt": "question", "completion": "answer"}.
        format: row shape (rows.FORMATS), where the first row does not tell.
        seq_len: longest row in tokens (max_length), >= 2.
        truncation: a longer row is left out (drop) or loses its end (cut); long plain text is
            split into windows either way. All of it is counted in the audit.
        eval: held-out fraction within 0..1, by content hash, or a file of the same kinds.
        chat_template: Jinja file instead of the model's own.
        revision, data_revision: hub revisions of the model and of the data.
        completion_only: loss on completions and assistant turns; else on every token.
        bad_rows: rows that cannot be used are an error, or are left out and counted (drop).
    Raises:
        DataError: a value outside these.
    """

    data: str
    model: str | None = None
    columns: Mapping[str, str] | None = None
    format: str | None = None
    seq_len: int = 1024
    truncation: str = "drop"
    eval: float | str = 0.05
    chat_template: str | None = None
    revision: str | None = None
    data_revision: str | None = None
    completion_only: bool = True
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise DataError(f"seq_len (max_length) must be >= 2, got {self.seq_len}")
        if self.truncation not in TRUNCATIONS:
            raise DataError(
                f"truncation must be one of {', '.join(TRUNCATIONS)}, got {self.truncation!r}"
            )
        if self.bad_rows not in BAD_ROW_POLICIES:
            raise DataError(
                f"bad_rows must be one of {', '.join(BAD_ROW_POLICIES)}, got {self.bad_rows!r}"
            )
        if not isinstance(self.eval, str) and not 0 < self.eval < 1:
            raise DataError(f"eval must be a fraction between 0 and 1, or a file, got {self.eval}")
        check_columns(self.columns or {}, self.format)


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """Train and held-out rows with their audit."""

    train: "TokenizedSet"
    eval: "TokenizedSet"
    audit: Audit


def prepare_data(spec: DataSpec) -> PreparedData:
    """Tokenizes the data once; from then on the cached sets are mapped from disk.

    Raises: DataError: data that cannot be read, bad rows (the first few and their number), nothing
        left within seq_len, or nothing on one side of the split.
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
    model, source = local_folder(spec.model), resolve_source(spec.data)
    if model is None or source.hub_id is not None:
        return None
    values = read_json(_set_folder(spec, model) / "audit.json")
    return Audit.from_dict(values) if values else None


def _set_folder(spec: DataSpec, tokenizer_files: Path) -> Path:
    eval_key = spec.eval
    if isinstance(spec.eval, str):
        eval_key = source_key(resolve_source(spec.eval))
    options = [spec.seq_len, spec.truncation, spec.bad_rows, eval_key]
    data_key = source_key(resolve_source(spec.data, spec.data_revision))
    key = [
        data_key,
        tokenizer_key(tokenizer_files),
        _template_key(spec.chat_template),
        _reading_key(spec),
        options,
    ]
    return cache_root() / "sets" / digest_of(key)


def _template_key(chat_template: str | Path | None) -> str | None:
    return file_digest(Path(chat_template).expanduser()) if chat_template else None


def _reading_key(spec: DataSpec) -> Any:
    return [CODE_VERSION, dict(spec.columns or {}), spec.format, spec.completion_only]


def _write_sets(spec: DataSpec, tokenizer: LoadedTokenizer, folder: Path) -> None:
    train, held_out, audit = _Preparation(spec, tokenizer).run()

    def fill(temporary: Path) -> None:
        train.built().save(temporary / "train")
        held_out.built().save(temporary / "eval")
        write_json(temporary / "audit.json", audit.to_dict())

    write_folder(folder, fill)


@dataclass
class _RowReader:
    """Normalised rows of one source."""

    spec: DataSpec
    bad: BadRows
    tally: Tally = field(default_factory=Tally)
    _shapes: dict[str, RowShape] = field(default_factory=dict)

    def rows(self, source: Source) -> Iterator[tuple[Row, Origin]]:
        column_map = self.spec.columns or {}
        if source.ignored:
            names = ", ".join(path.name for path in source.ignored)
            self.tally.note(f"not read, as they belong to other splits: {names}")
        for record in read_records(source, wanted_columns(column_map), self.bad):
            shape = self._shapes.get(record.origin.path)
            if shape is None:
                shape = detect_shape(
                    record.columns,
                    record.origin,
                    column_map=column_map,
                    format_name=self.spec.format,
                )
                self._shapes[record.origin.path] = shape
            try:
                row = normalised_row(record.columns, shape)
            except RowError as error:
                self.bad.add(record.origin, str(error))
                continue
            self.tally.saw_shape(shape)
            if not self.tally.is_blank(row):
                yield row, record.origin


class _Preparation:
    """One pass over the data, into the two sides."""

    def __init__(self, spec: DataSpec, tokenizer: LoadedTokenizer) -> None:
        from trainers.token_set import SetBuilder

        self.spec, self.tokenizer, self.bad, self.tally = spec, tokenizer, BadRows(), Tally()
        self.encoder = RowEncoder(tokenizer, completion_only=spec.completion_only)
        self.train, self.held_out = SetBuilder(), SetBuilder()
        self.lowest_position = 1.0

    def run(self) -> "tuple[SetBuilder, SetBuilder, Audit]":
        spec = self.spec
        self._read(resolve_source(spec.data, spec.data_revision), spec.eval)
        if isinstance(spec.eval, str):
            self._read(resolve_source(spec.eval), 1.0)
        if spec.bad_rows == "error":
            self.bad.raise_if_any()
        for note in self.encoder.notes():
            self.tally.note(note)
        audit = self.tally.audit(self.bad)
        self._check_sides(audit)
        return self.train, self.held_out, audit

    def _read(self, source: Source, held_out: float | str) -> None:
        """Reads a source; a row whose hash falls into the held-out fraction goes to eval."""
        fraction = 0.0 if isinstance(held_out, str) else held_out
        spec, reader = self.spec, _RowReader(self.spec, self.bad, self.tally)
        for row, tokens in self.encoder.encode(reader.rows(source), self.bad):
            digest = row_digest(row)
            fitted = fitted_rows(tokens, spec.seq_len, spec.truncation, self.tokenizer.special_ids)
            position = int.from_bytes(digest[:8]) / DIGEST_RANGE
            is_held_out = position < fraction
            if fitted and not is_held_out:
                self.lowest_position = min(self.lowest_position, position)
            side = self.tally.eval if is_held_out else self.tally.train
            self.tally.add(row, digest, tokens, fitted, side, spec.seq_len)
            for window in fitted:
                (self.held_out if is_held_out else self.train).add(window)

    def _check_sides(self, audit: Audit) -> None:
        spec = self.spec
        if audit.num_rows == 0:
            raise DataError(f"{spec.data}: must hold rows, holds none that can be used")
        if not len(self.train) and not len(self.held_out):
            raise _nothing_left(spec.data, audit, spec.seq_len)
        if isinstance(spec.eval, str):
            if not len(self.train) or not len(self.held_out):
                raise _nothing_left(
                    spec.eval if len(self.train) else spec.data, audit, spec.seq_len
                )
        elif not len(self.held_out):
            raise DataError(
                f"{spec.data}: eval {spec.eval} of {audit.num_rows} rows holds none out (by"
                " content hash);"
                f" set eval to {self.lowest_position + 0.001:.3f} or more, or give an eval file"
            )
        elif not len(self.train):
            raise DataError(
                f"{spec.data}: eval {spec.eval} of {audit.num_rows} rows leaves none to train;"
                " lower it"
            )


def _nothing_left(data: str, audit: Audit, seq_len: int) -> DataError:
    return DataError(
        f"{data}: no row with a loss-bearing token is left: {audit.num_too_long} of"
        f" {audit.num_rows} rows are"
        f" longer than seq_len (max_length) {seq_len} tokens (the longest has"
        f" {audit.max_row_tokens});"
        " raise seq_len or shorten the rows"
    )


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
        count = {
            "loss_tokens": _counted(
                spec, source, loaded or as_tokenizer(tokenizer, chat_template=template)
            )
        }
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
    bad = BadRows()
    reader, encoder = (
        _RowReader(spec, bad),
        RowEncoder(tokenizer, completion_only=spec.completion_only),
    )
    count = sum(tokens.num_loss_tokens for _, tokens in encoder.encode(reader.rows(source), bad))
    bad.raise_if_any()
    if not reader.tally.shapes:
        raise DataError(f"{spec.data}: must hold rows, holds none that can be used")
    return count


@cache
def _say_shipped() -> None:
    print(
        f"count_tokens: counting with the shipped tokenizer ({SHIPPED_MODEL.name})", file=sys.stderr
    )
