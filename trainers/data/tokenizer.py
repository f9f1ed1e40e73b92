"""The tokenizer of a model folder, through `tokenizers` alone: ids, special tokens, chat template.

transformers is imported only where a folder has no tokenizer.json and must be converted, and
huggingface_hub only for a hub id: counting tokens of a local file costs neither.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.credentials import mask_logs
from trainers.data.records import DataError, first_line
from trainers.foreign_code import refuse_own_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHIPPED_MODEL = Path(__file__).parent.parent / "assets" / "tiny-llama"
SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)
# What transformers can convert when tokenizer.json is missing.
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Padding that a tokenizer has but does not declare, then entries reserved for nothing (Llama 3,
# Gemma).
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|PAD|>", "<|padding|>", "<|finetune_right_pad_id|>")
RESERVED_PREFIXES = ("<|reserved_special_token_", "<unused", "<|reserved_", "<|extra_", "<SPECIAL_")
EOS_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|return|>",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedTokenizer:
    """A tokenizer that never grows.

    Args:
        name: the model it came from, for messages.
        encoder: encodes text without special tokens; no truncation, no padding, untrimmed offsets.
        prefix_ids: what the tokenizer puts before a text: usually its BOS, or nothing.
        bos_id, eos_id: None where there is no BOS; every trained text ends with eos_id.
        pad_id: an id to fill batches with. It may equal eos_id: masks go by length, never by id.
        pad_source: how pad_id was chosen, for people.
        special_ids: added tokens marked special.
        special_tokens: name -> text, as chat templates see them.
        chat_template: Jinja source, or None for a base model.
        vocab_size: number of ids, added tokens included.
        fingerprint: hash of everything that decides ids and masks.
    """

    name: str
    encoder: "Tokenizer"
    prefix_ids: tuple[int, ...]
    bos_id: int | None
    eos_id: int
    pad_id: int
    pad_source: str
    special_ids: frozenset[int]
    special_tokens: dict[str, str]
    chat_template: str | None
    vocab_size: int
    fingerprint: str

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included."""
        return self.encoder.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    chat_template: str | Path | None = None,
) -> LoadedTokenizer:
    """The tokenizer of a model.

    Args:
        model: folder, a file in it, or hub id; None is the base that Tenfold ships.
        chat_template: Jinja file that takes the place of the model's own template.
    Raises:
        DataError: no such model, no tokenizer in it, no end token, or a template file that is
            missing.
        ValueError: a tokenizer that is code of the model's own.
    """
    folder = tokenizer_folder(model, revision)
    config = _side_config(folder)
    refuse_own_tokenizer(config, str(model or folder))
    backend = _backend(folder)
    template = read_template(chat_template) if chat_template else config["chat_template"]
    return _loaded(backend, config, name=str(model or folder), template=template)


def read_template(path: str | Path) -> str:
    """Raises: DataError: no such file, or not UTF-8."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template must be a readable Jinja file, {path}: {error}") from error


def tokenizer_folder(model: str | Path | None, revision: str | None = None) -> Path:
    """The local folder with a model's tokenizer; files of a hub id are fetched into the hub's
    cache.

    Raises: DataError: neither folder nor hub id.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    return _fetch_from_hub(str(model), revision)


def local_folder(model: str | Path | None) -> Path | None:
    """The folder that a model value names on this machine; None where it can only be a hub id."""
    if model is None:
        return SHIPPED_MODEL
    path = Path(model).expanduser()
    if path.is_file():
        return path.parent
    return path if path.is_dir() else None


def _fetch_from_hub(model: str, revision: str | None) -> Path:
    import huggingface_hub

    mask_logs()
    try:
        found = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=["tokenizer.json", *SIDE_FILES, *SLOW_FILES, "merges.txt"],
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"model must be a folder or a hub id; {model} is no folder here, and from the hub:"
            f" {first_line(error)}"
        ) from error
    return Path(found)


def _backend(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception for every damaged file
            raise DataError(f"{path}: not a readable tokenizer: {error}") from error
    if any((folder / name).exists() for name in SLOW_FILES):
        return _converted(folder)
    raise DataError(f"a model must have a tokenizer (tokenizer.json), found none in {folder}")


def _converted(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{folder} has no tokenizer.json and cannot be converted: {first_line(error)}"
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{folder} has a tokenizer without a fast form; save it with tokenizer.json"
        )
    return Tokenizer.from_str(backend.to_str())


def _side_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what stands in the files beside it, under the same keys."""
    read = {name: _json_file(folder / name) for name in SIDE_FILES if name.endswith(".json")}
    config = {**read["special_tokens_map.json"], **read["tokenizer_config.json"]}
    declared = read["generation_config.json"].get(
        "eos_token_id", read["config.json"].get("eos_token_id")
    )
    config["eos_token_id"] = declared[0] if isinstance(declared, list) and declared else declared
    jinja = folder / "chat_template.jinja"
    template = read_template(jinja) if jinja.exists() else config.get("chat_template")
    config["chat_template"] = _default_template(
        template or read["chat_template.json"].get("chat_template")
    )
    return config


def _json_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _default_template(template: Any) -> str | None:
    """One template where a model has several under names."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    return template.get("default") if isinstance(template, dict) else template


def _token_text(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _loaded(
    backend: "Tokenizer", config: dict[str, Any], *, name: str, template: str | None
) -> LoadedTokenizer:
    tokens = {key: _token_text(config.get(key)) for key in NAMED_TOKENS}
    tokens = {
        key: text for key, text in tokens.items() if text and backend.token_to_id(text) is not None
    }
    eos_id = _eos_id(backend, tokens, config.get("eos_token_id"), name)
    bos_id = _known_id(backend, tokens["bos_token"]) if "bos_token" in tokens else None
    pad_id, pad_source = _pad(backend, tokens, eos_id)
    added = backend.get_added_tokens_decoder()
    prefix = _prefix_ids(backend)
    return LoadedTokenizer(
        name=name,
        encoder=_plain_encoder(backend),
        prefix_ids=prefix,
        bos_id=bos_id if bos_id is not None else next(iter(prefix), None),
        eos_id=eos_id,
        pad_id=pad_id,
        pad_source=pad_source,
        special_ids=frozenset(i for i, token in added.items() if token.special),
        special_tokens=tokens,
        chat_template=template,
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        fingerprint=_digest(backend.to_str(), tokens, eos_id, prefix, template),
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _known_id(backend: "Tokenizer", text: str) -> int:
    token_id = backend.token_to_id(text)
    assert token_id is not None, text
    return token_id


def _eos_id(backend: "Tokenizer", tokens: dict[str, str], declared: Any, name: str) -> int:
    if "eos_token" in tokens:
        return _known_id(backend, tokens["eos_token"])
    text = backend.id_to_token(declared) if isinstance(declared, int) else None
    if text is not None:
        tokens["eos_token"] = text
        return _known_id(backend, text)
    raise DataError(
        f"{name}: the tokenizer must have an end token (eos_token in tokenizer_config.json), has"
        " none;"
        " without it no answer ever learns to stop"
    )


def _pad(backend: "Tokenizer", tokens: dict[str, str], eos_id: int) -> tuple[int, str]:
    """Never a new entry: the embedding keeps its rows (field case A05)."""
    if "pad_token" in tokens:
        return _known_id(backend, tokens["pad_token"]), f"pad token {tokens['pad_token']}"
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    reserved = sorted(text for text in added if text.startswith(RESERVED_PREFIXES))
    for text in (*PAD_NAMES, *reserved):
        if text in added:
            return added[text], f"unused token {text} (the tokenizer has no pad token)"
    return eos_id, "end token (the tokenizer has no pad token; masks go by length)"


def _prefix_ids(backend: "Tokenizer") -> tuple[int, ...]:
    """What encoding puts before a text, found by encoding one. `add_bos_token` in the config is not
    asked: transformers 5 does not either, where there is a tokenizer.json."""
    probe = "a"
    plain = backend.encode(probe, add_special_tokens=False).ids
    full = backend.encode(probe, add_special_tokens=True).ids
    starts = (i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
    return tuple(full[: next(starts, 0)])


def _plain_encoder(backend: "Tokenizer") -> "Tokenizer":
    """A copy that only encodes. Without its post-processor, because a byte-level one trims the
    leading space from a token's offsets, and a seam inside that token would not be seen."""
    from tokenizers import Tokenizer

    description = json.loads(backend.to_str())
    description |= {"post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(description))


def as_tokenizer(tokenizer: Any, *, chat_template: str | Path | None = None) -> LoadedTokenizer:
    """A LoadedTokenizer from what people hold: a model folder or hub id, a tokenizers.Tokenizer,
    or a transformers tokenizer.

    Raises: DataError: no fast tokenizer in it, or no known end token.
    """
    if isinstance(tokenizer, LoadedTokenizer):
        template = read_template(chat_template) if chat_template else tokenizer.chat_template
        return with_template(tokenizer, template)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer, chat_template=chat_template)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "get_added_tokens_decoder"):
        raise DataError(
            f"tokenizer must be a folder or a fast tokenizer, is {type(tokenizer).__name__}"
        )
    config = {key: getattr(tokenizer, key, None) for key in NAMED_TOKENS}
    if backend is tokenizer:  # a bare tokenizers.Tokenizer does not say which token ends a text
        config["eos_token"] = next(
            (t for t in EOS_NAMES if backend.token_to_id(t) is not None), None
        )
    template = (
        read_template(chat_template) if chat_template else getattr(tokenizer, "chat_template", None)
    )
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    return _loaded(backend, config, name=name, template=_default_template(template))


def with_template(tokenizer: LoadedTokenizer, template: str | None) -> LoadedTokenizer:
    """The same tokenizer with another chat template."""
    if template == tokenizer.chat_template:
        return tokenizer
    fingerprint = _digest(tokenizer.fingerprint, template)
    return replace(tokenizer, chat_template=template, fingerprint=fingerprint)
