"""The probe of a storage: what a node of one storage answers, and one of another."""

from pathlib import Path

import pytest

from orchestration.storage_probe import answer_probe, probing


@pytest.fixture(params=["folder", "file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket').url}/runs"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/runs"


def test_probe_of_a_shared_storage_is_answered_and_leaves_nothing(storage, tmp_path):
    with probing(storage) as probe:
        assert not probe.has_answered("n1")
        assert answer_probe(storage, probe.name, "n1") == ""
        assert probe.has_answered("n1")
        assert not probe.has_answered("n2")
    assert list(tmp_path.iterdir()) == []


def test_probe_of_another_storage_is_not_answered(storage):
    with probing(storage) as probe:
        wrong = answer_probe(f"{storage}-other", probe.name, "n1")
        assert wrong in ("no such folder", "what the driver wrote there is not seen here")
        assert not probe.has_answered("n1")


def test_probe_is_answered_only_in_the_drivers_folder(tmp_path):
    storage, probe = str(tmp_path), tmp_path / "probe"
    assert answer_probe(storage, "probe", "n1") == "not the driver's folder"
    assert answer_probe(str(tmp_path / "gone"), "probe", "n1") == "no such folder"
    assert list(tmp_path.iterdir()) == []
    probe.mkdir()
    (probe / "driver").write_text("another")
    assert answer_probe(storage, "probe", "n1") == "another folder of this path"
    (probe / "driver").write_text("probe")
    assert answer_probe(storage, "probe", "n1") == ""
    assert (probe / "n1").read_text() == "n1"


def test_probe_of_a_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refused = pytest.raises(ValueError, match="must be a folder that can be written")
    with refused, probing(str(tmp_path / "file" / "runs")):
        pass


def test_probe_node_without_the_stores_client_says_which():
    assert "install gcsfs" in answer_probe("gs://bucket/runs", "probe", "n1")
