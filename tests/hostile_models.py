"""Model folders that would run something, if anybody let them: each leaves a marker file where it does."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from tests.orchestration.sweeps import BASE


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickle_into(file: Path, marker: Path) -> None:
    """Writes a pickle that leaves a marker where it is read."""
    file.write_bytes(pickle.dumps(Touch(marker)))


def model_copy(folder: Path) -> Path:
    """The shipped base, to be spoiled."""
    shutil.copytree(BASE, folder)
    return folder


def change_json(file: Path, **values: object) -> None:
    """Puts keys into a JSON file, which may be new."""
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | values))


def add_code(folder: Path, marker: Path) -> None:
    """A module that leaves a marker when it is imported, with classes that would even work."""
    (folder / "modeling_own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
        "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n"
    )


OWN_MODEL = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnModel",
}
OWN_TOKENIZER = {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}


def model_of_unknown_type(folder: Path, marker: Path) -> None:
    """An architecture that transformers does not know, with its code."""
    add_code(folder, marker)
    change_json(
        folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=OWN_MODEL
    )


def model_of_known_type(folder: Path, marker: Path) -> None:
    """A type that transformers knows, whose class it does not: it would load another one in its place."""
    add_code(folder, marker)
    change_json(folder / "config.json", architectures=["OwnModel"], auto_map=OWN_MODEL)


def tokenizer_of_its_own(folder: Path, marker: Path) -> None:
    """A tokenizer with code, beside a tokenizer.json that can be read without."""
    add_code(folder, marker)
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=OWN_TOKENIZER
    )


def kernel_of_the_hub(folder: Path, marker: Path) -> None:
    """An attention that transformers would fetch and run."""
    change_json(folder / "config.json", attn_implementation="own/kernel")


OWN_CODE = (model_of_unknown_type, model_of_known_type, tokenizer_of_its_own, kernel_of_the_hub)


def pickle_alone(folder: Path, marker: Path) -> None:
    """Weights as a pickle, and no others."""
    (folder / "model.safetensors").unlink()
    pickle_into(folder / "pytorch_model.bin", marker)


def index_of_a_pickle(folder: Path, marker: Path) -> None:
    """An index whose weights lie in a pickle, beside safetensors that it does not name."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    pickle_into(folder / "pytorch_model.bin", marker)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
    change_json(folder / "model.safetensors.index.json", **index)


def index_that_leads_out(folder: Path, marker: Path) -> None:
    """An index that names a file of another folder."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../base/model.safetensors"}}
    change_json(folder / "model.safetensors.index.json", **index)


def adapter_beside(folder: Path, marker: Path) -> None:
    """An adapter, as a pickle, that transformers would load into the base."""
    pickle_into(folder / "adapter_model.bin", marker)
    values = {"peft_type": "LORA", "base_model_name_or_path": str(BASE), "r": 4}
    change_json(folder / "adapter_config.json", **values, target_modules=["q_proj"])


OTHER_WEIGHTS = (pickle_alone, index_of_a_pickle, index_that_leads_out, adapter_beside)
