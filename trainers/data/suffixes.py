"""The kinds of files whose rows are read, by the ends of their names."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def file_suffix(name: str) -> str:
    """The kind of a data file by its name, without .gz; empty for a kind that is not read."""
    name = name.lower()
    plain = name.removesuffix(".gz")
    kinds = SUFFIXES if plain == name else SUFFIXES[:-1]  # parquet is packed within
    return next((suffix for suffix in kinds if plain.endswith(suffix)), "")
