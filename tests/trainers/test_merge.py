"""Merged weights give the logits of base and adapter, for every family and adapter kind."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.trainers.families import CONFIGS, tiny_of
from tests.trainers.test_families import IDS, QUANTIZABLE, RUN, expressible, randomise, spec_of
from trainers.adapters import inject
from trainers.base_model import load_base
from trainers.base_spec import BaseSpec
from trainers.checkpoint import ADAPTER_FILE, save_weights
from trainers.gate import GateError
from trainers.merge import merge_adapter
from trainers.runs import new_run
from trainers.slots import AdapterSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to True:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:.*tie_word_embeddings.*:UserWarning",
)


def saved(family: str, folder: Path, **base_values) -> tuple[BaseSpec, AdapterSpec, Path]:
    """A base on disk, and an adapter on it that does something."""
    tiny_of(family).save_pretrained(folder / "base")
    base = BaseSpec(
        model=str(folder / "base"), **{"quantization": "none", "dtype": "fp32"} | base_values
    )
    pack = inject(load_base(base), [spec_of(tiny_of(family), target=expressible(family))])
    randomise(pack)
    (folder / "adapter").mkdir()
    save_weights(
        pack, new_run(pack, 0, RUN), folder / "adapter", base_name="org/base", revision=None
    )
    spec = pack.slots[0].spec
    assert spec is not None
    return base, spec, folder / "adapter"


def read_back(folder: Path) -> torch.nn.Module:
    return load_base(BaseSpec(model=str(folder), quantization="none", dtype="fp32"))


@pytest.mark.parametrize("family", CONFIGS)
def test_merge_gives_the_logits_that_peft_gives_on_the_base(family, tmp_path):
    base, spec, adapter = saved(family, tmp_path)
    merged = merge_adapter(base, spec, adapter, tmp_path / "merged")
    assert merged.logits_error <= 1e-4
    assert merged.nf4_error is None
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_of(family), str(adapter))(input_ids=IDS).logits
        untouched = tiny_of(family)(input_ids=IDS).logits
        got = read_back(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert (untouched - expected).abs().max() > 1e-2
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    was_tied = tiny_of(family).config.get_text_config().tie_word_embeddings
    assert merged.untied == bool(was_tied)
    if (
        merged.untied
    ):  # the flag matches the tensors (field case B11), and the embedding is the base's (B10)
        assert config["tie_word_embeddings"] is False
        before, after = (
            load_base(BaseSpec(model=str(f), quantization="none", dtype="fp32"))
            for f in (tmp_path / "base", tmp_path / "merged")
        )
        assert torch.equal(
            before.get_input_embeddings().weight, after.get_input_embeddings().weight
        )


@pytest.mark.parametrize("family", QUANTIZABLE)
def test_merge_of_nf4_dequantizes_and_says_what_nf4_did(family, tmp_path):
    base, spec, adapter = saved(family, tmp_path, quantization="nf4")
    merged = merge_adapter(base, spec, adapter, tmp_path / "merged")
    assert merged.logits_error <= 1e-4
    assert merged.nf4_error is not None
    # 9.2% of normal numbers, by the quantiles of its code in blocks of 64.
    assert merged.nf4_error == pytest.approx(0.092, abs=0.003)
    with torch.no_grad():
        trained_on = load_base(base)
        expected = PeftModel.from_pretrained(trained_on, str(adapter))(input_ids=IDS).logits
        got = read_back(tmp_path / "merged")(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_merge_of_bf16_stays_bf16_within_its_rounding(tmp_path):
    base, spec, adapter = saved("llama", tmp_path, dtype="bf16")
    merged = merge_adapter(base, spec, adapter, tmp_path / "merged")
    assert merged.logits_error <= merged.tolerance == 5e-2
    (file,) = (tmp_path / "merged").glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_merge_of_another_adapter_is_refused_and_names_the_tensor(tmp_path):
    base, spec, adapter = saved("llama", tmp_path)
    tensors = load_file(adapter / ADAPTER_FILE)
    tensors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    save_file(tensors, adapter / ADAPTER_FILE)
    with pytest.raises(GateError, match=r"not among them: base_model.model.model.layers.9"):
        merge_adapter(base, spec, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_whose_weights_are_not_read_back_as_they_were_is_refused(tmp_path, monkeypatch):
    base, spec, adapter = saved("llama", tmp_path)
    whole = torch.nn.Module.state_dict

    def without_head(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        for name in found:
            if name.endswith("lm_head.weight"):
                found[name] = torch.zeros_like(found[name])
        return found

    monkeypatch.setattr("transformers.LlamaForCausalLM.state_dict", without_head)
    with pytest.raises(GateError, match=r"must give the logits of base and adapter within 0\.0001"):
        merge_adapter(base, spec, adapter, tmp_path / "merged")
