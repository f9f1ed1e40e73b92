"""What people, and nobody, write into a sweep.yaml or a study.yaml: as text, for the fuzz tests."""

import gzip
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import yaml

from orchestration.studies.config import DECIDED, KINDS
from tests.fuzzing import BASE, Ending, ended, mutated_bytes, rarely
from tests.orchestration.shipped import MODELS, place_data, shipped_texts

NAME = "sweep.yaml"
COMMANDS = tuple(
    [("plan", NAME), ("plan", NAME, "--json"), ("check", NAME), ("sweep", NAME)]
    + [("study", kind, NAME) for kind in KINDS]
)


@dataclass(frozen=True)
class ConfigCase:
    """A command and the bytes of the file that it is given."""

    command: tuple[str, ...]
    text: bytes

    def run(self, folder: Path) -> Ending:
        """Runs it in a folder that `fill` filled."""
        (folder / NAME).write_bytes(self.text)
        return ended(folder, self.command)


def fill(folder: Path) -> None:
    """Puts there what the cases name: data of several shapes, the shipped base under several names."""
    pairs = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in pairs)
    place_data(folder)
    for name in ("good.jsonl", "数据.jsonl", "two\nlines.jsonl"):
        (folder / name).write_text(lines)
    (folder / "texts.csv").write_text("text\n" + "".join(f"word {i} of it\n" for i in range(40)))
    chats = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]
        for i in range(40)
    ]
    (folder / "chats.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
    (folder / "one.jsonl").write_text(json.dumps(pairs[0]) + "\n")
    (folder / "empty.jsonl").touch()
    (folder / "folder").mkdir()
    (folder / "template.jinja").write_text(TEMPLATE)
    for name in ("base", "模型", "two words", *MODELS):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(BASE)
    (folder / "Llama-3.1-70B").mkdir()
    shutil.copy(BASE / "config.json", folder / "Llama-3.1-70B" / "config.json")
    for name in ("assets", "trainers/assets"):
        (folder / name / "demo").mkdir(parents=True)
        (folder / name / "study").mkdir()
        (folder / name / "tiny-llama").symlink_to(BASE)
        (folder / name / "demo" / "functions.jsonl").write_text(lines)
        (folder / name / "study" / "tests.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / NAME).touch()


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def mostly(
    good: st.SearchStrategy[str], other: st.SearchStrategy[str], one_in: int = 12
) -> st.SearchStrategy[str]:
    return rarely(one_in).flatmap(lambda is_other: other if is_other else good)


# Values as they stand in a file. Numbers of any size are values that many keys allow.
WHOLE = mostly(
    mostly(st.integers(1, 64).map(str), st.integers(0, 10**15).map(str), 4),
    st.one_of(
        st.integers(0, 10**40).map(str),
        st.sampled_from(
            ["2.0e9", "1e3", "0x10", "1_000", "1e30", "9223372036854775808", "1" + "0" * 400]
        ),
    ),
)
REAL = mostly(
    mostly(st.floats(1e-6, 0.99).map(repr), st.floats(1e-30, 1e15).map(repr), 4),
    st.one_of(
        st.floats(min_value=0, allow_infinity=False, allow_subnormal=True).map(repr),
        st.sampled_from(["1e-4", "5e-324", "1.7976931348623157e308", "0.0", "1", "1e-300", "100"]),
    ),
)


def flow(items: st.SearchStrategy[str], max_size: int = 4) -> st.SearchStrategy[str]:
    """[a, b, ...]"""
    return st.lists(items, min_size=1, max_size=max_size).map(lambda xs: f"[{', '.join(xs)}]")


def ranges(ends: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """{low: ..., high: ..., num: ...}"""
    num = st.one_of(st.integers(1, 20).map(str), WHOLE)
    return st.tuples(ends, ends, num).map(lambda r: "{low: %s, high: %s, num: %s}" % r)  # noqa: UP031


def several(items: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(items, flow(items), ranges(items))


def words(*texts: str, near: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """One of some legal values, or rarely of those that only look so."""
    good = st.sampled_from(texts)
    return mostly(good, st.sampled_from(near)) if near else good


FILES = ("good.jsonl", "train.jsonl", "texts.csv", "chats.json", "数据.jsonl", "{folder: 1}")
NO_FILES = (
    "one.jsonl", "empty.jsonl", "folder", '"two\\nlines.jsonl"', "absent.jsonl", "nobody/nothing",
    "template.jinja", "base",
)  # fmt: skip
VARIANTS = words(
    "lora",
    "rslora",
    "dora",
    "lora_plus",
    "pissa",
    "dora+rslora",
    near=("lora+dora", "rslora+", "olora"),
)
COMPONENTS = words(
    "attn", "mlp", "unembed", "attn+mlp", "q_proj", near=("experts", "down_proj+attn", "all")
)
LEGAL: Mapping[str, st.SearchStrategy[str]] = {
    "model": words(
        "base", "模型", "two words", "base/config.json", "meta-llama/Llama-3.1-8B", "trainers/assets/tiny-llama",
        near=("Llama-3.1-70B/config.json", "nobody/nothing", "folder", "good.jsonl"),
    ),
    "data": st.one_of(
        words(*FILES[:5], near=NO_FILES),
        st.dictionaries(words(*FILES[:4]), st.floats(0.1, 3).map(repr), min_size=1, max_size=3).map(
            lambda d: "{" + ", ".join(f"{k}: {v}" for k, v in d.items()) + "}"
        ),
    ),
    "name": words("mine", "a.b", "v1+2", "x" * 200, "0", "CON", "é", "a..b",
        near=("x" * 300, "..", '"a\\n"', "é" * 150)),
    "revision": words("main", "v1.0", "2024-01-01", near=('""', "refs/pr/1", "../x")),
    "columns": words(
        "{prompt: prompt, completion: completion}", "{text: prompt}", "{prompt: completion, completion: prompt}",
        near=("{prompt: completion}", "{}", "{text: absent}", "{tools: completion}", "{who: prompt}",
            '{text: "a\\nb"}'),
    ),
    "format": words("completion", "text", near=("messages", "alpaca", "sharegpt", "dpo")),
    "chat_template": words("template.jinja", near=("good.jsonl", "folder", "absent.jinja", "base")),
    "data_revision": words("main", "1"),
    "bad_rows": words("error", "drop"),
    "system_role": words("template", "fold"),
    "packing": words("true", "false"),
    "group_by_length": words("true", "false"),
    "retention": words(*FILES[:5], near=NO_FILES),
    "dataset_tokens": WHOLE,
    "method": words("sft", "rl"),
    "reward": words("exact_match", "numeric_answer", '"format:.*"', "{exact_match: 1, numeric_answer: 0.5}",
        near=("none_such", '"regex:("', "absent.py:f", "{exact_match: 0}", "{}", "math:sqrt")),
    "num_generations": WHOLE,
    "max_completion_length": WHOLE,
    "temperature": REAL,
    "lora_rank": several(WHOLE),
    "learning_rate": several(REAL),
    "global_batch_size": several(WHOLE),
    "lora_alpha": st.one_of(several(REAL),
        words("rank", "2*rank", "[rank, 2*rank]", near=("1e400*rank", "rank*rank", "1e300*rank", "1e-300*rank"))),
    "variant": st.one_of(VARIANTS, flow(VARIANTS)),
    "target": st.one_of(COMPONENTS, flow(COMPONENTS), flow(flow(COMPONENTS))),
    "lr_prior": st.one_of(words("doctrine", "tinker",
        near=("{from: runs/none}", "{from: base}", "{from: good.jsonl}")), REAL),
    "size_class": words("7-8B", "1-3B", "70B", near=("<1B",)),
    "full_ft_learning_rate": REAL,
    "capacity": st.one_of(words("doctrine"), REAL),
    "capacity_policy": words("discard", "advisory"),
    "search": words("grid", "random", "optuna"),
    "num_candidates": WHOLE,
    "scheduler": words("asha", "fifo", "median"),
    "grace_period": WHOLE,
    "reduction_factor": WHOLE,
    "epochs": REAL,
    "examples": WHOLE,
    "seq_len": st.one_of(st.integers(2, 1025).map(str), WHOLE),
    "truncation": words("drop", "cut"),
    "eval": st.one_of(st.floats(0.05, 0.9).map(repr), REAL, words(*FILES[:5], near=NO_FILES)),
    "eval_every": WHOLE,
    "lr_schedule": words("constant", "linear", "cosine"),
    "warmup": REAL,
    "weight_decay": REAL,
    "max_grad_norm": REAL,
    "dropout": st.one_of(REAL, flow(REAL)),
    "seed": WHOLE,
    "quantization": words("nf4", "none"),
    "dtype": words("auto", "fp32", near=("bf16",)),
    "strategy": words("auto", "single", near=("ddp", "zero3")),
    "workers_per_trial": words("auto", "1", "2", near=("4", "1000000000")),
    "gradient_checkpointing": words("auto", "true", "false"),
    "cpus_per_worker": words("1", "2", near=("3", "1000000000000")),
    "gpus_per_worker": words("auto", "0", near=("1", "0.25", "1e-9", "0.999999")),
    "micro_batch_size": WHOLE,
    "engine": words("packed", "solo"),
    "inventory": words(
        "8xH100-80GB", "2x8xA100-40GB", "1x24GB", "10000x10xH100-999999GB", "1x0.000001GB",
        near=("0x24GB", "999999x999999xH100-80GB", "9" * 30 + "x80GB", "1x1e9GB", "1x" + "9" * 400 + "GB",
            "１xH100-80GB"),
    ),
    "price_per_gpu_hour": REAL,
    "pack_size": WHOLE,
    "address": words("auto", "127.0.0.1:1", "ray://nowhere:10001", near=('""', '"[::1"', "x:99999999999")),
    "storage": words(
        "runs", "out/deep", "../up", '"~/runs"',
        near=("good.jsonl", "good.jsonl/x", "/dev/null", "/proc/x", "s3://", "memory://x", "nope://bucket/x",
            '""', "x" * 300),
    ),
    "metric": words("eval_loss", "bits_per_byte", "exact_match", '"regex:.*"', "{exact_match: 1, numeric_answer: 0.5}",
        near=("accuracy", '"regex:("', "absent.py:f", "{eval_loss: 1}", "{}", "math:sqrt")),
    "metric_rows": WHOLE,
    "select": words("best", "lowest_lr_within 0.5%", "lowest_lr_within 3 %",
        near=("lowest", "lowest_lr_within 100%", "lowest_lr_within -1%", "0.5%")),
    "max_forgetting": REAL,
    "confirm": words("0", "2", "3", near=("1", "-1", "100000", "two")),
    "time_budget": words("90m", "2h", "1h30m", "1d", near=("0s", "2", "1.5h", "h", "later", "9" * 40 + "d")),
    "max_cost": REAL,
    "tracking": words("[]", "wandb", "tensorboard", "[wandb, tensorboard]"),
}  # fmt: skip
"""Of every key of a sweep values of its own kind: legal ones, and some that only look so."""
STUDY: Mapping[str, st.SearchStrategy[str]] = {
    "seeds": st.one_of(words("1", "2"), WHOLE, flow(WHOLE)),
    "full_learning_rate": several(REAL),
    "lr_decades": REAL,
    "seed_window_decades": REAL,
    "max_extensions": WHOLE,
    "tolerance_frac": REAL,
    "exposures": WHOLE,
    "loads": flow(st.floats(0.001, 0.2).map(repr)),
}
STUDY_SIZED = {
    "lora_rank": words("4", "[1, 8]"),
    "global_batch_size": words("8", "16", "[4, 8]"),
    "examples": words("32", "100"),
}
"""What most studies want before they plan on: one batch size, small."""
FEW_FACTS = {"loads": "[0.05]", "exposures": "1"}

ODD_SCALARS = (
    "", "~", "null", "true", "False", "yes", "on", "0", "-1", "-0.0", "1e400", "-1e400", "1e-400", ".inf",
    "-.inf", ".nan", "0x1F", "0o17", "017", "1:30", "190:20:30.15", "2024-01-01", "2024-13-45", "0000-00-00",
    "2024-01-01T25:61:61Z", "2001-12-14t21:59:43.10-05:00", "9999-12-31T23:59:59-23:59", "1" + "0" * 5000,
    "0x" + "f" * 5000, "1_0e5", "+1e+5", "1.e5", "!!int abc", "!!int 1_", "!!float x", "!!bool maybe",
    "!!null x", "!!binary 'not base64'", "!!binary aGk=", "!!timestamp x", "!!merge x", "!!set {a, b}",
    "!!map [a]", "!!python/object:os.system ls", "!!python/object/apply:os.system ['touch x']",
    "!own x", "!exponent x", "!exponent 1e99999", "'a\nb'", '"a\\nb"', '"\\0"', '"\\ud800"', '"\\ud83d\\ude00"',
    '"\\x1b[2J"', '"\\u2028"',
    '"\\u202e"', '"\\uFEFF"', '"\\UFFFFFFFF"', '"\\x"', '"unended', "'unended", "../../x", "../..", "/", ".",
    '"~nobody/x"', '"~"', "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/fd", "x" * 300, "x" * 5000,
    "a/" * 3000, "ｌｏｒａ", "lоra", "NaN", "Infinity", "*undefined", "&a", "&a [*a]", "&a {b: *a}", "[]", "[[]]",
    "{}", "[1, [2]]", "[1, a]", "[~]", "[true]", "[.nan]", "[1, 1]", "[1, 1.0]", "{a: b}", "{1: 2}", "{~: 1}",
    "{a: 1, a: 2}", "{[a]: 1}", "{{a: 1}: 2}", "? a", "{low: 1}", "{low: 1, high: 2, num: 1e9}", "- a", "|",
    "{low: a, high: [], num: ~}", "{low: .nan, high: .nan, num: 2}", "{low: 1, high: .inf, num: 3}", ">", "@x",
    "{low: 1, high: 2, num: 1000000000000}", "{low: 2, high: 1, num: 2}", "{from: ~}", '{from: "\\0"}', "`x`",
    "{from: /}", "{from: ..}", "{<<: {a: 1}}", "{<<: [1]}", "{<<: x}", "[" * 300, "[" * 60 + "]" * 60, "%x",
    "[" * 3000 + "]" * 3000, "{a: " * 500 + "1" + "}" * 500, "{? " * 200, "a: b: c", "\t", "# nothing", "--- x",
)  # fmt: skip
BOMB = "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9) if n else 'lol'}]\n" for n in range(10)
)
MERGES = "".join(
    f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" if n else "m0: &m0 {a: 1}\n"
    for n in range(12)
)
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(),
        st.datetimes(), st.binary(max_size=10),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.text(max_size=8), st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


def written(value: object) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=False, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


ODD = st.one_of(st.sampled_from(ODD_SCALARS), JSON_VALUES.map(written))
WHOLE_FILES = (
    b"", b"\n", b"---\n", b"...\n", b"- a\n- b\n", b"model\n", b"5\n", b"~\n", b"\x00", b"\xff\xfem\x00",
    b"%YAML 9.9\n---\na: b\n",
    b"{" * 2000, b"[" * 100_000, b"a: &a [*a]\n", b"? " * 3000, b"- " * 20_000, b"a:\n" * 10,
    b"!!python/object/apply:os.abort []\n",
    b"model: base\n---\ndata: good.jsonl\n", b"*a\n", b"&a *a\n", b"<<: *a\n",
    b"<<: {model: base, dataset_tokens: 5}\n",
    (BOMB + "model: *b9\n").encode(), (MERGES + "model: *m11\n").encode(),
    b"model: base\ndataset_tokens: 1e9\nx: " + b"y" * 2_000_000,
)  # fmt: skip
"""Files that are no list of keys, or one of a kind."""


def _as_bytes(text: str, way: str) -> bytes:
    ways: dict[str, Callable[[str], bytes]] = {
        "plain": str.encode,
        "bom": lambda t: t.encode("utf-8-sig"),
        "crlf": lambda t: t.replace("\n", "\r\n").encode(),
        "cr": lambda t: t.replace("\n", "\r").encode(),
        "utf-16": lambda t: t.encode("utf-16"),
        "latin-1": lambda t: (t + "# é\n").encode("latin-1", "replace"),
        "tabs": lambda t: re.sub("(?m)^", "\t", t).encode(),
        "indented": lambda t: re.sub("(?m)^", "  ", t).encode(),
        "in json": lambda t: b"{" + t.rstrip("\n").replace("\n", ", ").encode() + b"}",
        "cut": lambda t: t.encode()[: len(t) * 2 // 3],
        "two documents": lambda t: f"---\n{t}---\n{t}".encode(),
        "ended": lambda t: f"{t}...\n{{{{".encode(),
        "bomb before": lambda t: (BOMB + t).encode(),
    }
    return ways[way](text)


WAYS = ("plain",) * 40 + (
    "bom", "crlf", "cr", "utf-16", "latin-1", "tabs", "indented", "in json", "cut", "two documents", "ended",
    "bomb before",
)  # fmt: skip


@st.composite
def structured(draw: st.DrawFn) -> ConfigCase:
    """A config of a base, data and some more keys, of which none, one or two hold what they must not."""
    command = draw(st.sampled_from(COMMANDS))
    legal = {**LEGAL, **STUDY, **STUDY_SIZED} if command[0] == "study" else {**LEGAL}
    lines = {"model": "base", "data": "good.jsonl"}
    if command[0] == "study":
        lines |= {key: draw(strategy) for key, strategy in STUDY_SIZED.items()}
    if command[1] == "capacity":
        lines |= FEW_FACTS
    left = sorted(legal.keys() - (DECIDED if command[0] == "study" else {"dataset_tokens"}))
    for key in draw(st.lists(st.sampled_from(left), max_size=5)):
        lines[key] = draw(legal[key])
    if draw(rarely(60 if command[0] == "study" else 6)):
        lines |= {"dataset_tokens": draw(WHOLE)}
        lines.pop("data")
    for key in draw(
        st.lists(st.sampled_from([*sorted(legal), "learning_rte", "é", '"\\0"', "[a]"]), max_size=2)
    ):
        lines[key] = draw(ODD)
    pairs = list(lines.items())
    if draw(rarely(30)):
        pairs.append(draw(st.sampled_from(pairs)))
    text = "".join(f"{key}: {value}\n" for key, value in draw(st.permutations(pairs)))
    return ConfigCase(command, _as_bytes(text, draw(st.sampled_from(WAYS))))


SHIPPED = tuple(shipped_texts().items())


@st.composite
def mutated(draw: st.DrawFn) -> ConfigCase:
    """A YAML of ours, damaged; or a file of a kind of its own."""
    if draw(rarely(20)):
        return ConfigCase(draw(st.sampled_from(COMMANDS)), draw(st.sampled_from(WHOLE_FILES)))
    name, text = draw(st.sampled_from(SHIPPED))
    kind = name.split()[-1]
    own = (("study", kind, NAME),) if kind in KINDS else COMMANDS[:4]
    command = draw(st.sampled_from(own))
    if kind == "capacity":
        text = "".join(f"{key}: {value}\n" for key, value in FEW_FACTS.items()) + text
    return ConfigCase(command, draw(mutated_bytes(text.encode())))
