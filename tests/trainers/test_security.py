"""Weights are safetensors, and a model's code stays text: whatever lies in a folder of a base, of an adapter or of a
checkpoint, nothing of it is run. Each hostile file would leave a marker."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hostile_models import (
    OTHER_WEIGHTS,
    OWN_CODE,
    add_code,
    model_copy,
    model_of_unknown_type,
    pickle_into,
    tokenizer_of_its_own,
)
from tests.orchestration.sweeps import BASE
from tests.trainers.packs import Bench
from tests.trainers.tiny import tiny_model
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.data.tokenizer import load_tokenizer
from trainers.gate import GateError
from trainers.integrity import seal_folder
from trainers.merge import published_dtype
from trainers.meta_shape import shape_of_folder
from trainers.sharded_loading import WeightFiles


def spec_of(folder: Path) -> BaseSpec:
    return BaseSpec(model=str(folder), quantization="none", dtype="fp32")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.mark.parametrize(
    "spoil",
    [*(each for each in OWN_CODE if each is not tokenizer_of_its_own), *OTHER_WEIGHTS],
    ids=lambda spoil: spoil.__name__,
)
def test_base_that_brings_code_or_pickles_is_refused_by_whoever_loads_it(tmp_path, marker, spoil):
    model_copy(tmp_path / "base")
    folder = model_copy(tmp_path / "own")
    spoil(folder, marker)
    for load in (load_base, published_dtype):
        with pytest.raises(ValueError, match=f"^model {folder}: "):
            load(spec_of(folder))
    assert not marker.exists()


def test_base_of_code_is_not_built_for_its_shape_either(tmp_path, marker):
    folder = model_copy(tmp_path / "own")
    model_of_unknown_type(folder, marker)
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        shape_of_folder(folder)
    assert not marker.exists()


def test_base_with_safetensors_and_pickles_is_loaded_from_the_safetensors(tmp_path, marker):
    folder = model_copy(tmp_path / "both")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        pickle_into(folder / name, marker)
    add_code(folder, marker)  # which nothing names
    (folder / "custom_generate").mkdir()
    add_code(folder / "custom_generate", marker)
    (folder / "custom_generate" / "modeling_own.py").rename(
        folder / "custom_generate" / "generate.py"
    )
    model = load_base(spec_of(folder))
    published = load_file(BASE / "model.safetensors")
    assert len(published) > 30
    own = dict(model.named_parameters())
    for name, tensor in published.items():
        assert torch.equal(own[name], tensor.float())
    assert not marker.exists()


def test_sharded_base_whose_index_names_a_pickle_is_not_unpickled(tmp_path, marker):
    folder = model_copy(tmp_path / "own")
    OTHER_WEIGHTS[1](folder, marker)
    files = WeightFiles(str(folder), None)
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        files.tensors(["model.embed_tokens.weight"])
    assert not marker.exists()


def test_tokenizer_with_code_is_refused_with_and_without_a_tokenizer_json(tmp_path, marker):
    folder = model_copy(tmp_path / "own")
    tokenizer_of_its_own(folder, marker)
    for _ in range(2):
        with pytest.raises(ValueError, match="has one of its own \\(OwnTokenizer"):
            load_tokenizer(folder)
        (folder / "tokenizer.json").unlink(missing_ok=True)
    assert not marker.exists()


def checkpoint_of(folder: Path) -> Bench:
    bench = Bench(tiny_model())
    bench.enter("e")
    bench.micro_steps(4)
    save_checkpoint(bench.pack, bench.runs["e"], folder, base_name="org/base", revision=None)
    return bench


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["a pickle beside", "a pickle in its place"])
def test_checkpoint_of_pickles_is_refused_and_not_unpickled(tmp_path, marker, name, how):
    checkpoint_of(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / name
    file.unlink()
    if how == "a pickle beside":
        pickle_into(file.with_suffix(".bin"), marker)
        pickle_into(file.with_suffix(".pt"), marker)
    else:
        pickle_into(file, marker)
    seal_folder(tmp_path / "checkpoint")  # its checksums agree: whoever put it there knew of them
    fresh = Bench(tiny_model())
    fresh.enter("e")
    with pytest.raises(GateError):
        load_checkpoint(fresh.runs["e"], tmp_path / "checkpoint")
    assert not marker.exists()


def test_marker_of_these_tests_appears_where_a_pickle_is_read(tmp_path, marker):
    import pickle

    pickle_into(tmp_path / "file", marker)
    pickle.loads((tmp_path / "file").read_bytes())
    assert marker.exists()
