"""Data: from files, folders and hub ids to tokenized sets, with the one mask that counts and trains.

    sources, suffixes, hub    which files there are
    text_files, json_rows, json_arrays, csv_rows, arrow_rows
                              their rows, with the place of each (records)
    rows, messages, tool_calls, row_reader, reading_progress
                              the rows in one of three shapes
    chat_template (chat_*)    conversations as text, and where in it the assistant speaks
    tokenizer, examples, token_rows
                              ids and masks
    preparation, parts, tally, audit, lengths, row_digests, near_duplicates
                              one pass over all of it, and what was counted
    token_set, sequence_packing, sampling, retention
                              the sets on disk, and ways to read them
    prepared, cache, source_keys, spec
                              what others call
    preview                   the first rows, for people

Nothing here imports torch. What is named below is loaded when it is used: `tenfold plan` with a known
count must not pay for numpy or tokenizers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.data.audit import Audit
    from trainers.data.prepared import (
        PreparedData,
        audit_data,
        cached_audit,
        count_tokens,
        near_duplicates_of,
        prepare_data,
        prepare_whole,
    )
    from trainers.data.records import DataError
    from trainers.data.spec import DataSpec
    from trainers.data.token_set import Example, TokenizedSet
    from trainers.data.tokenizer import load_tokenizer

__all__ = [
    "Audit",
    "DataError",
    "DataSpec",
    "Example",
    "PreparedData",
    "TokenizedSet",
    "audit_data",
    "cached_audit",
    "count_tokens",
    "load_tokenizer",
    "near_duplicates_of",
    "prepare_data",
    "prepare_whole",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if name in ("Example", "TokenizedSet"):  # with numpy
        from trainers.data import token_set as home
    else:
        from trainers.data import prepared as home
    return getattr(home, name)
