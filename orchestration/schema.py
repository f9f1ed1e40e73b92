"""The JSON Schema (draft 2020-12) of sweep.yaml and study.yaml, for editors and for docs/configuration.md: the
types of config.py, what its validators take and refuse beyond them, and its words. Imports neither torch nor ray."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from cluster.gpus import PATTERN as INVENTORY
from orchestration.choice_config import LOSS_KEYS, READY
from orchestration.config import MAX_NAME_BYTES, CarriedFrom, LogRange, SweepConfig
from orchestration.config_checks import MAX_PART_BYTES, MAX_TEXT, MAX_WEIGHT
from orchestration.key_docs import key_docs
from orchestration.rl_config import RL_KEYS
from orchestration.studies.config import DECIDED, StudyConfig
from search_spaces import doctrine, variants
from search_spaces.values import MAX_NUMBER, MAX_POINTS, MIN_NUMBER
from trainers.data.rows import FORMATS, ROLES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

END = r"(?![\s\S])"
"""Of a text: `$` would also stand before a last line feed."""
ANY_TEXT: Schema = {"type": "string", "minLength": 0}
TEXT_RULE: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_TEXT,
    "pattern": rf"^(?![\s\S]*[^/]{{{MAX_PART_BYTES + 1}}})[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*{END}",
}
"""As `check_texts` takes it, but that it counts the bytes of a path's parts, and knows whose home is there."""
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 1}
TEXT, RATE_RANGE, COUNT_RANGE = (
    {"$ref": f"#/$defs/{name}"} for name in ("Text", "LogRange", "CountRange")
)


def _any_of(*forms: Schema) -> Schema:
    return {"anyOf": list(forms)}


def _words(*texts: str) -> Schema:
    return {"enum": list(texts)}


def _list_of(item: Schema, *, distinct: bool = True) -> Schema:
    different: Schema = {"uniqueItems": True, "maxItems": MAX_POINTS} if distinct else {}
    return {"type": "array", "items": item, "minItems": 1, **different}


def _matching(pattern: str, *examples: str) -> Schema:
    return {"type": "string", "pattern": f"^(?:{pattern}){END}", "examples": list(examples)}


def _weighted(weight: Schema) -> Schema:
    """Names with weights."""
    return {
        "type": "object",
        "propertyNames": TEXT,
        "additionalProperties": weight,
        "minProperties": 1,
    }


def _variant() -> Schema:
    known = "|".join(variants.MEANINGS)
    combined = rf"(?!.*\b(\w+)\b.*\b\1\b)(?:{known})(?:\+(?:{known}))*"
    return _any_of(_words(variants.PLAIN, *variants.MEANINGS), _matching(combined, "rslora+dora"))


NUMBER = r"(?=[^*e]*[1-9])(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
ALPHA_RULE = _matching(rf" *(?:{NUMBER} *\* *)?rank *", "rank", "2*rank")
TARGET_NAME = _any_of(_words("attn", "mlp", "experts", "unembed"), TEXT)
RATES = _any_of(POSITIVE, _list_of(POSITIVE), RATE_RANGE)
COUNTS = _any_of(COUNT, _list_of(COUNT), COUNT_RANGE)
TRACKER = _words("wandb", "tensorboard")
FRACTION: Schema = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
DATA_WEIGHT: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_WEIGHT}
REWARD_WEIGHT: Schema = {
    "type": "number",
    "minimum": -MAX_WEIGHT,
    "maximum": MAX_WEIGHT,
    "not": {"const": 0},
}

METRIC_NAME = _any_of(_words(*LOSS_KEYS, *READY), _matching(r"[^:]*:.*", "regex:PATTERN"))
DURATION = r"\s*(?=.*[1-9])(?=.*[dhms])(?:[0-9]+d)?\s*(?:[0-9]+h)?\s*(?:[0-9]+m)?\s*(?:[0-9]+s)?\s*"

FORMS: Mapping[str, Schema] = {
    "data": _any_of(TEXT, _weighted(DATA_WEIGHT)),
    "name": {**_matching(r"[^\s/\\.+-][^\s/\\]*", "llama-8b-v2"), "maxLength": MAX_NAME_BYTES},
    "columns": {
        "type": "object",
        "propertyNames": _words(*ROLES),
        "additionalProperties": ANY_TEXT,  # a header of a csv file may have several lines
    },
    "format": _words(*FORMATS),
    "reward": _any_of(TEXT, _weighted(REWARD_WEIGHT)),
    "lora_rank": COUNTS,
    "learning_rate": RATES,
    "full_learning_rate": RATES,
    "global_batch_size": COUNTS,
    "lora_alpha": _any_of(
        POSITIVE, ALPHA_RULE, _list_of(POSITIVE), _list_of(ALPHA_RULE), RATE_RANGE
    ),
    "variant": _any_of(_variant(), _list_of(_variant())),
    "target": _any_of(
        TARGET_NAME,
        _list_of(TARGET_NAME, distinct=False),
        _list_of(_list_of(TARGET_NAME, distinct=False), distinct=False),
    ),
    "size_class": _words(*(row.name for row in doctrine.RANK_TABLE.value)),
    "dropout": _any_of(FRACTION, _list_of(FRACTION)),
    "inventory": _matching(INVENTORY.pattern, "8xH100-80GB", "1x24GB"),
    "metric": _any_of(METRIC_NAME, _weighted(REWARD_WEIGHT)),
    "select": _any_of(
        _words("best"),
        _matching(r"lowest_lr_within [0-9]{1,2}(?:\.[0-9]+)?\s*%", "lowest_lr_within 0.5%"),
    ),
    "time_budget": _matching(DURATION, "90m", "2h", "1h30m"),
    "tracking": _any_of(TRACKER, {"type": "array", "items": TRACKER}),
    "seeds": _any_of(COUNT | {"maximum": MAX_POINTS}, _list_of({"type": "integer", "minimum": 0})),
}
"""Keys of which config.py's type says less than its validators."""


def sweep_schema() -> Schema:
    """The schema of sweep.yaml."""
    schema = _schema(SweepConfig, "Tenfold sweep.yaml", "A sweep of LoRA settings.")
    alone = [_given("data"), _given("dataset_tokens")]
    is_rl = {"properties": {"method": {"const": "rl"}}, "required": ["method"]}
    no_rl = {key: {"type": "null"} for key in RL_KEYS if key != "max_completion_length"}
    draws = {"properties": {"search": _words("random", "optuna")}, "required": ["search"]}
    rules: list[Schema] = [
        {"if": is_rl, "else": {"oneOf": alone, "properties": no_rl}},
        {"if": draws, "then": _given("num_candidates")},
        {"not": {"allOf": [_given("epochs"), _given("examples")]}},
        {"if": _given("max_cost"), "then": _given("price_per_gpu_hour")},
        {"if": _given("max_forgetting"), "then": _given("retention")},
    ]
    return schema | {"required": ["model"], "allOf": rules}


def study_schema() -> Schema:
    """The schema of study.yaml, whose model and data may come from a preset."""
    schema = _schema(StudyConfig, "Tenfold study.yaml", "A claim of the doctrine, measured.")
    for key in DECIDED:
        del schema["properties"][key]
    return schema


def _given(key: str) -> Schema:
    return {"required": [key], "properties": {key: {"not": {"type": "null"}}}}


def _schema(kind: type[SweepConfig], title: str, description: str) -> Schema:
    drawn = kind.model_json_schema()
    keys = {key: _key_schema(key, form) for key, form in drawn["properties"].items()}
    return {
        "$schema": DIALECT,
        "title": title,
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "properties": _described(keys, kind),
        "$defs": _definitions(),
    }


def _key_schema(key: str, drawn: Schema) -> Schema:
    """pydantic's schema of a key, or the form that its validators take; with its default, but null."""
    form = FORMS.get(key) or {name: drawn[name] for name in drawn.keys() - {"title", "default"}}
    if key in FORMS and {"type": "null"} in drawn.get("anyOf", ()):
        form = _any_of(*form.get("anyOf", [form]), {"type": "null"})
    default = drawn.get("default")
    return _bounded(form) | ({} if default is None else {"default": default})


def _bounded(form: Any) -> Any:
    """With the bounds that every text and every number has, at any depth."""
    if isinstance(form, list):
        return [_bounded(item) for item in form]
    if not isinstance(form, dict):
        return form
    found = {name: _bounded(value) for name, value in form.items()}
    if found == {"type": "string"}:
        return TEXT
    if found.get("type") in ("number", "integer"):
        return _sized(found)
    return found


def _sized(form: Schema) -> Schema:
    """Within the sizes that can be computed with: `check_sizes`."""
    least = MIN_NUMBER if form.get("exclusiveMinimum") == 0 else -MAX_NUMBER
    bounds = {"minimum": least, "maximum": MAX_NUMBER}
    return {name: value for name, value in bounds.items() if not _is_bound(form, name)} | form


def _is_bound(form: Schema, side: str) -> bool:
    exclusive = f"exclusive{side.capitalize()}"
    return side in form or form.get(exclusive, 0) != 0


def _described(properties: Schema, model: type[BaseModel]) -> Schema:
    docs = key_docs(model)
    return {key: {"description": docs[key].meaning} | form for key, form in properties.items()}


def _definitions() -> Schema:
    """The forms that have keys of their own."""
    rates: Schema = {"low": POSITIVE, "high": POSITIVE, "num": COUNT | {"maximum": MAX_POINTS}}
    counts = rates | {"low": COUNT, "high": COUNT}
    return {
        "Text": TEXT_RULE,
        "LogRange": _keyed(LogRange, rates),
        "CountRange": _keyed(LogRange, counts, "Rounded to whole numbers."),
        "CarriedFrom": _keyed(CarriedFrom, {"from": TEXT}),
    }


def _keyed(model: type[BaseModel], properties: Schema, more: str = "") -> Schema:
    docs = {
        (model.model_fields[key].alias or key): doc.meaning for key, doc in key_docs(model).items()
    }
    return {
        "description": " ".join([*(model.__doc__ or "").split(), *more.split()]),
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": {
            key: {"description": docs[key]} | _bounded(form) for key, form in properties.items()
        },
    }


def undescribed(schema: Schema) -> Iterator[str]:
    """The keys of which a schema says nothing."""
    for key, form in schema["properties"].items():
        if not form["description"]:
            yield key
