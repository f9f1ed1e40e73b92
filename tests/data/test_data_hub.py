"""Hub datasets: their own files, read as any file is. A local folder laid out like a repository
stands for the hub; the network itself is a fake."""

import gzip
import json

import pytest

from trainers.data import DataError
from trainers.data.records import BadRows
from trainers.data.rows import KNOWN_COLUMNS
from trainers.data.source_keys import source_key
from trainers.data.sources import Source, read_hub, read_records

pytest.importorskip("datasets")

# A21: values that the readers of `datasets` retype.
RETYPED = [
    {"prompt": "on: ", "completion": "2024-01-02"},
    {"prompt": "n: ", "completion": "01"},
    {"prompt": "n: ", "completion": "1.50"},
    {"prompt": "n: ", "completion": "1"},
]
LINES = "".join(json.dumps(row) + "\n" for row in RETYPED)
CSV = "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in RETYPED)


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.fixture
def repository(tmp_path):
    """Writes a repository's files, {name: text or bytes}, and gives its folder."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "repo" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / "repo")

    return write


def hub_rows(hub_id, bad=None):
    return [*read_hub(hub_id, None, KNOWN_COLUMNS, bad or BadRows())]


def parquet_bytes(rows):
    import io

    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data/train.jsonl", LINES),
        ("train.json", json.dumps(RETYPED)),
        ("train.csv", CSV),
        ("train.tsv", CSV.replace(",", "\t")),
        ("train.jsonl.gz", gzip.compress(LINES.encode())),
        ("data/train-00000-of-00001.parquet", parquet_bytes(RETYPED)),
    ],
)
def test_hub_train_split_of_any_kind_keeps_text_as_written(name, content, repository):
    other = "test" + name[name.index(".") :]
    repo = repository({name: content, other: content, "README.md": "# a card"})
    records = hub_rows(repo)
    assert [record.columns for record in records] == RETYPED
    unit = ", row 1" if name.endswith(".parquet") else ":2" if "sv" in name else ":1"
    assert str(records[0].origin) == f"{repo}: {name}{unit}"


def test_hub_number_beside_text_is_trained_as_written(repository, tmp_path):
    repo = repository({"train.jsonl": LINES + '{"prompt": "n: ", "completion": 2.50}\n'})
    last = hub_rows(repo)[-1]
    assert last.columns["completion"].source == "2.50"


def test_hub_broken_line_is_named_by_the_repositorys_file_and_line(repository):
    repo, bad = repository({"data/train.jsonl": LINES + '{"prompt": "a", "comp\n'}), BadRows()
    assert len(hub_rows(repo, bad)) == len(RETYPED)
    assert len(bad.shown) == 1
    assert bad.shown[0].startswith(f"{repo}: data/train.jsonl:5: not valid JSON")


def test_hub_subset_is_read_by_its_name_and_asked_for(repository, tmp_path, monkeypatch):
    card = (
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.jsonl\n"
        "- config_name: two\n  data_files: two/*.jsonl\n---\n"
    )
    repository({"README.md": card, "one/a.jsonl": LINES, "two/b.jsonl": LINES.replace("n", "m")})
    monkeypatch.chdir(tmp_path)
    assert [record.columns for record in hub_rows("repo:one")] == RETYPED
    assert hub_rows("repo:two")[1].columns["prompt"] == "m: "
    with pytest.raises(DataError, match=r"\['one', 'two'\].*owner/name:subset$") as error:
        hub_rows("repo")
    assert "\n" not in str(error.value)


def test_hub_card_with_another_delimiter_goes_through_datasets(repository):
    card = "---\nconfigs:\n- config_name: one\n  data_files: a.csv\n  sep: ';'\n---\n"
    repo = repository({"README.md": card, "a.csv": "prompt;completion\nx;y\n"})
    assert [record.columns for record in hub_rows(repo)] == [{"prompt": "x", "completion": "y"}]


def test_hub_text_files_go_through_datasets(repository):
    repo = repository({"train.txt": "one\ntwo\n"})
    assert [record.columns for record in hub_rows(repo)] == [{"text": "one"}, {"text": "two"}]


def test_hub_without_a_train_split_names_those_found(repository):
    repo = repository({"test.jsonl": LINES, "validation.jsonl": LINES})
    with pytest.raises(DataError, match="must have a train split, has validation, test;") as error:
        hub_rows(repo)
    assert "\n" not in str(error.value)


def test_hub_key_changes_with_the_data_and_only_with_it(repository):
    repo = repository({"train.jsonl": LINES, "test.jsonl": LINES})
    first = source_key(Source(hub_id=repo))
    assert source_key(Source(hub_id=repo)) == first
    repository({"test.jsonl": LINES * 2})
    assert source_key(Source(hub_id=repo)) == first
    repository({"train.jsonl": LINES.replace("01", "02")})
    assert source_key(Source(hub_id=repo)) != first


# The network


@pytest.fixture
def hub(monkeypatch, repository):
    """A hub that gives a local repository for owner/name, or raises what it is set to."""

    class Hub:
        error = None
        repo = repository({"data/train.jsonl": LINES})

    import datasets

    real = datasets.load_dataset_builder

    def load_dataset_builder(name, subset=None, revision=None):
        assert name == "owner/name"
        if Hub.error:
            raise Hub.error
        return real(Hub.repo, subset)

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    from trainers.data import hub

    hub.remote_files.cache_clear()
    yield Hub
    hub.remote_files.cache_clear()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("Couldn't reach 'owner/name' on the Hub (ConnectError)"), "reach 'owner"),
        (OSError("Dataset 'owner/name' is a gated dataset on the Hub.\nVisit it."), "Hub. Visit"),
        (ValueError("BuilderConfig 'x' not found. Available: ['a']"), r"Available: \['a'\]"),
    ],
)
def test_hub_that_gives_nothing_says_why_on_one_line(error, reason, hub):
    hub.error = error
    with pytest.raises(DataError, match=f"owner/name is neither file.*{reason}") as raised:
        hub_rows("owner/name")
    assert "\n" not in str(raised.value)


def test_hub_no_longer_reached_gives_the_files_fetched_before(hub, capsys):
    from trainers.data.hub import remote_files

    key = source_key(Source(hub_id="owner/name"))
    remote_files.cache_clear()
    hub.error = ConnectionError("no network")
    assert source_key(Source(hub_id="owner/name")) == key
    records = [*read_records(Source(hub_id="owner/name"), KNOWN_COLUMNS, BadRows())]
    assert [record.columns for record in records] == RETYPED
    assert str(records[0].origin) == "owner/name: data/train.jsonl:1"
    assert "hub is not reached" in capsys.readouterr().err
    remote_files.cache_clear()
    with pytest.raises(DataError, match="no network"):
        source_key(Source(hub_id="owner/name", revision="v2"))


def test_hub_is_looked_up_once_so_that_key_and_rows_are_of_one_version(hub, repository):
    key = source_key(Source(hub_id="owner/name"))
    hub.error = OSError("gone")
    assert len(hub_rows("owner/name")) == len(RETYPED)
    assert source_key(Source(hub_id="owner/name")) == key
