"""What of a model's folder would run, and is refused: code that comes with it, pickles, kernels of the hub.

Reads JSON alone. Imports no torch; transformers is asked for the names of its classes where a config names code
of its own, as those of many published models do although transformers has had their class for years.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
INDEX = "model.safetensors.index.json"
NO_CODE = "Tenfold runs no code that comes with a model (trust_remote_code is off)"


def refuse_foreign(folder: Path, name: str) -> None:
    """Looks at a folder from which a model is about to be loaded.

    Raises:
        ValueError: as `refuse_own_code` and `refuse_other_weights`.
    """
    if (folder / "config.json").is_file():
        refuse_own_code(folder / "config.json", name)
    refuse_other_weights(folder, name)


def refuse_own_code(config: Path, name: str) -> None:
    """Looks at a model's config.json.

    Args:
        name: of the model, for messages.

    Raises:
        ValueError: the model is of a class of its own, or asks for a kernel from the hub.
    """
    values = _json(config)
    if values.get("auto_map") and (lost := _own_class(values)):
        raise ValueError(
            f"model {name}: must be of a class that transformers has, is of one of its own ({lost}, by auto_map in "
            f"{config.name}); {NO_CODE}; use a model that transformers knows, as a conversion of this one (-hf)"
        )
    for key, kernel in _kernels(values):
        raise ValueError(
            f"model {name}: {key} in {config.name} must be one that transformers has, is {kernel!r}, code from the "
            f"hub; {NO_CODE}; take the key out"
        )


def refuse_own_tokenizer(config: dict[str, Any], name: str) -> None:
    """Looks at the values of a tokenizer_config.json.

    Raises:
        ValueError: the tokenizer is of a class of its own.
    """
    classes = _classes(config, "tokenizer_class", "AutoTokenizer")
    if "AutoTokenizer" in _mapping(config) and (lost := _unknown(classes, suffix="Fast")):
        raise ValueError(
            f"model {name}: must have a tokenizer of a class that transformers has, has one of its own ({lost}, by "
            f"auto_map in tokenizer_config.json); {NO_CODE}; use a model whose tokenizer transformers knows, as a "
            "conversion of this one (-hf)"
        )


def refuse_other_weights(folder: Path, name: str) -> None:
    """Makes sure that a model's weights are its own safetensors and nothing else.

    Raises:
        ValueError: it has none, its index names other files, or an adapter lies beside them, which transformers
            would load into the base.
    """
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
        what = f", but {pickles[0]}, a pickle, which can run code" if pickles else ""
        raise ValueError(
            f"model {name}: the folder must hold *.safetensors weights, it has none{what}; save the model again "
            "with save_pretrained, which writes safetensors"
        )
    for file in indexed_files(folder):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise ValueError(
                f"model {name}: {INDEX} must name *.safetensors files of its folder alone, names {file}"
            )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model {name}: must be a base alone, an adapter lies beside it (adapter_config.json), which would be "
            "loaded into it; give the base's own folder, or merge the two first"
        )


def indexed_files(folder: Path) -> list[str]:
    """The files that a folder's index names; none without one.

    Raises:
        ValueError: an index that is none.
    """
    weights = _json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).is_file() else {}
    names = weights.values() if isinstance(weights, dict) else [weights]
    return sorted({str(name) for name in names})


def _own_class(config: dict[str, Any]) -> str:
    """What of a model that brings code transformers does not have; empty: it has all."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if (model_type := config.get("model_type")) not in CONFIG_MAPPING_NAMES:
        return f"model_type {model_type!r}"
    return _unknown(_classes(config, "architectures", "AutoModelForCausalLM"), suffix="")


def _classes(config: dict[str, Any], key: str, auto_class: str) -> list[str]:
    """The classes that a config asks for: by its key, else by its auto_map."""
    named = config.get(key) or _mapping(config).get(auto_class) or []
    listed = [named] if isinstance(named, str) else named
    return [str(one).rpartition(".")[2] for one in listed if one]


def _mapping(config: dict[str, Any]) -> dict[str, Any]:
    auto_map = config.get("auto_map")
    if isinstance(auto_map, list):  # of a tokenizer, as it was written before 2022
        return {"AutoTokenizer": auto_map}
    return auto_map if isinstance(auto_map, dict) else {}


def _unknown(classes: Iterable[str], *, suffix: str) -> str:
    """The first class that transformers does not have, whatever the case of its letters; empty: it has all."""
    import transformers

    known = {one.casefold() for one in dir(transformers)}
    for one in classes:
        if not {one.casefold(), one.removesuffix(suffix).casefold()} & known:
            return one
    return ""


def _kernels(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(Key, what it names) of each kernel that would come from the hub."""
    for key, value in config.items():
        if key.endswith(("attn_implementation", "experts_implementation")):
            each = value.values() if isinstance(value, dict) else [value]
            yield from ((key, one) for one in each if isinstance(one, str) and "/" in one)
        elif isinstance(value, dict):
            yield from _kernels(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON, is not ({error})") from error
    return value if isinstance(value, dict) else {}
