"""sweep.yaml: what is read, and what is refused in which words."""

from pathlib import Path

import pytest

from orchestration.config import ConfigError, load_config, make_config, space_overrides

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = "model: base\ndata: rows.jsonl\n"

VARIANTS = "variant must be lora, or one or more of rslora, dora, lora_plus, pissa joined by '+'"


@pytest.fixture
def load(tmp_path):
    """Loads a sweep.yaml with the given lines after model and data."""

    def load(lines: str = "", head: str = MINIMAL, **flags):
        path = tmp_path / "sweep.yaml"
        path.write_text(head + lines, encoding="utf-8")
        return load_config(path, **flags)

    return load


def problems(load, lines: str, head: str = MINIMAL) -> list[str]:
    """The lines of the error that a file gives, without their place."""
    with pytest.raises(ConfigError) as error:
        load(lines, head)
    place = "sweep.yaml: "
    found = str(error.value).splitlines()
    assert all(place in line for line in found)
    return [line.split(place, 1)[1] for line in found]


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("learning_rate: 1e-4", "learning_rate", 0.0001),
        ("learning_rate: 1E-4", "learning_rate", 0.0001),
        ("learning_rate: 1.5e-4", "learning_rate", 0.00015),
        ("learning_rate: 2e+0", "learning_rate", 2.0),
        ("learning_rate: [1e-3, 3e-4, 0.5]", "learning_rate", [0.001, 0.0003, 0.5]),
        ("capacity: 6e-1", "capacity", 0.6),
        ("weight_decay: 1e-2", "weight_decay", 0.01),
        ("examples: 1e4", "examples", 10_000),
        ("lora_rank: [4.0, 8]", "lora_rank", [4, 8]),
        ("seed: 0", "seed", 0),
        ("revision: 'v1'", "revision", "v1"),
        ("tracking: wandb", "tracking", ["wandb"]),
        ("target: [[attn], [mlp, unembed]]", "target", [["attn"], ["mlp", "unembed"]]),
        ("gpus_per_worker: 0", "gpus_per_worker", 0),
        ("gpus_per_worker: 0.25", "gpus_per_worker", 0.25),
        ("lr_prior: 2e-5", "lr_prior", 0.00002),
        ("capacity: measured", "capacity", "measured"),
        ("packing: true", "packing", True),
        ("group_by_length: no", "group_by_length", False),
        ("system_role: fold", "system_role", "fold"),
        ("retention: owner/name", "retention", "owner/name"),
    ],
)
def test_load_config_value_as_written_gives_its_meaning(load, line, key, expected):
    found = getattr(load(line), key)
    assert found == expected
    assert type(found) is type(expected)


def test_load_config_range_in_exponents_gives_numbers(load):
    config = load("learning_rate: {low: 1e-3, high: 1e-2, num: 3}")
    expected = {"low": 0.001, "high": 0.01, "num": 3}
    assert space_overrides(config) == {"learning_rate": expected}


def test_load_config_dataset_tokens_in_exponents_is_a_whole_number(load):
    config = load("dataset_tokens: 2.0e9", head="model: base\n")
    assert (config.dataset_tokens, type(config.dataset_tokens)) == (2_000_000_000, int)


def test_load_config_data_with_weights_keeps_their_order(load):
    config = load("", head="model: base\ndata: {b.jsonl: 1, a.jsonl: 5e-1}\n")
    assert list(config.data.items()) == [("b.jsonl", 1.0), ("a.jsonl", 0.5)]


def test_load_config_flag_wins_over_the_file_and_none_does_not(load):
    config = load("name: file", name="flag", address=None)
    assert (config.name, config.address) == ("flag", None)


def test_space_overrides_of_a_minimal_config_are_empty(load):
    assert space_overrides(load()) == {}


@pytest.mark.parametrize(
    ("line", "nearest"),
    [
        ("learning_rte: 1e-4", "learning_rate"),
        ("lora_r: 8", "lora_rank"),
        ("global_batch: 8", "global_batch_size"),
        ("Seed: 1", "seed"),
    ],
)
def test_load_config_unknown_key_names_the_nearest(load, line, nearest):
    key = line.split(":")[0]
    assert problems(load, line) == [f"unknown key {key!r}; did you mean {nearest!r}?"]


def test_load_config_unknown_key_like_no_other_lists_the_known(load):
    (line,) = problems(load, "xyzzy: 1")
    assert line.startswith("unknown key 'xyzzy'; known keys: model, data, ")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("seed: 1\nepochs: 2\nseed: 2\n", "line 5: duplicate key 'seed'"),
        ("data: other.jsonl\n", "line 3: duplicate key 'data'"),
        ("learning_rate: {low: 1e-4, low: 1e-3}\n", "line 3: duplicate key 'low'"),
        ("lora_rank: [1, 2\n", "line 4: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n  epochs: 2\n", "line 4: mapping values are not allowed here"),
        ("? [a]\n: 1\n", "line 3: found unhashable key"),
        ("learning_rate: 1e999\n", "line 3: a number must be finite"),
    ],
)
def test_load_config_yaml_that_cannot_be_read_names_its_line(load, lines, expected):
    assert problems(load, lines) == [expected]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora_rank: 0", "lora_rank must be an integer >= 1, got 0"),
        ("lora_rank: [4, 0]", "lora_rank must be an integer >= 1, got 0"),
        ("lora_rank: 4.5", "lora_rank must be an integer >= 1, got 4.5"),
        ("lora_rank: eight", "lora_rank must be an integer >= 1, got 'eight'"),
        ("lora_rank: []", "lora_rank must have at least one value, got an empty list"),
        ("lora_rank: [4, 4]", "lora_rank must not list a value twice, got [4, 4]"),
        ("learning_rate: -1e-4", "learning_rate must be a finite number > 0, got -0.0001"),
        ("learning_rate: 0", "learning_rate must be a finite number > 0, got 0"),
        ("learning_rate: .nan", "learning_rate must be a finite number > 0, got nan"),
        ("learning_rate: [1e-4, .inf]", "learning_rate must be a finite number > 0, got inf"),
        ("global_batch_size: 0", "global_batch_size must be an integer >= 1, got 0"),
        ("lora_alpha: -.inf", "lora_alpha must be a finite number > 0, got -inf"),
        (
            "lora_alpha: twice",
            "lora_alpha must be a finite number > 0, 'rank' or a multiple such as '2*rank', got 'twice'",
        ),
        (
            "lora_alpha: [32, rank]",
            "lora_alpha must follow one convention, numbers or multiples of the rank, got [32, 'rank']; of the "
            "two together nobody can tell rank and learning rate apart",
        ),
        (
            "variant: olora",
            f"{VARIANTS}, got 'olora'",
        ),
        ("variant: [dora, 1]", f"{VARIANTS}, got 1"),
        ("variant: [dora, dora]", "variant must not list a value twice, got ['dora', 'dora']"),
        ("dropout: 1", "dropout must be a number >= 0 and < 1, got 1"),
        ("warmup: .nan", "warmup must be a finite number >= 0, got nan"),
        ("weight_decay: -1", "weight_decay must be a finite number >= 0, got -1"),
        ("seed: -1", "seed must be an integer >= 0, got -1"),
        ("epochs: 0", "epochs must be a finite number > 0, got 0"),
        ("examples: 0.5", "examples must be an integer >= 1, got 0.5"),
        (
            "target: 5",
            "target must be a name, 'attn+mlp' or a non-empty list, got 5",
        ),
        (
            "learning_rate: {low: 1e-4}",
            "learning_rate must be a value, a list, or (numbers) {low, high, num}, "
            "got {'low': 0.0001}",
        ),
        (
            "learning_rate: {low: .inf, high: 1e-3, num: 2}",
            "learning_rate: low must be a finite number, got inf",
        ),
        ("lora_rank: yes", "lora_rank must not be true or false, got True"),
        ("dropout: [0, yes]", "dropout must not be true or false, got [0, True]"),
        ("packing: 1", "packing must be true or false, got 1"),
        ("packing:", "packing must be true or false, got None"),
        ("num_candidates: true", "num_candidates must not be true or false, got True"),
        (
            "name: runs/mine",
            "name must be a folder name (letters, digits, . _ + -; no path), got 'runs/mine'",
        ),
        ("name: ..", "name must be a folder name (letters, digits, . _ + -; no path), got '..'"),
    ],
)
def test_load_config_value_out_of_range_says_what_must_hold_and_what_came(load, line, expected):
    assert problems(load, line) == [expected]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("seq_len: 1", ["seq_len", "greater than or equal to 2", "got 1"]),
        ("workers_per_trial: 0", ["workers_per_trial", "greater than or equal to 1", "got 0"]),
        ("eval: 1.5", ["eval", "less than 1", "got 1.5"]),
        ("capacity: .inf", ["capacity", "got inf"]),
        ("full_ft_learning_rate: .nan", ["full_ft_learning_rate", "got nan"]),
        ("quantization: int8", ["quantization", "'nf4' or 'none'", "got 'int8'"]),
        ("gpus_per_worker: 2", ["gpus_per_worker", "got 2"]),
        ("gpus_per_worker: 0.5\nworkers_per_trial: 2", ["gpus_per_worker below 1", "got 0.5"]),
        ("scheduler: [asha]", ["scheduler", "'asha', 'fifo' or 'median'", "got ['asha']"]),
        ("tracking: mlflow", ["tracking", "'wandb' or 'tensorboard'", "got 'mlflow'"]),
        ("columns: prompt", ["columns", "dictionary", "got 'prompt'"]),
        ("gradient_checkpointing: 1", ["gradient_checkpointing", "'auto'", "got 1"]),
        ("reduction_factor: 1", ["reduction_factor", "greater than or equal to 2", "got 1"]),
    ],
)
def test_load_config_wrong_value_of_another_key_gives_one_line(load, line, parts):
    (found,) = problems(load, line)
    for part in parts:
        assert part in found


def test_load_config_several_problems_are_told_at_once(load):
    lines = "learning_rte: 1\nlora_rank: 0\nglobal_batch_size: -2\nseq_len: 0\n"
    found = problems(load, lines)
    keys = ("learning_rte", "lora_rank", "global_batch_size", "seq_len")
    assert len(found) == len(keys)
    assert all(key in line for key, line in zip(keys, sorted(found, key=_by(keys)), strict=True))


def _by(keys: tuple[str, ...]):
    return lambda line: next(i for i, key in enumerate(keys) if key in line)


@pytest.mark.parametrize(
    ("head", "lines", "expected"),
    [
        ("model: base\n", "", "give data"),
        (MINIMAL, "dataset_tokens: 5\n", "instead dataset_tokens"),
        (MINIMAL, "epochs: 1\nexamples: 5\n", "give epochs or examples, not both"),
        (MINIMAL, "search: random\n", "search: random needs num_candidates"),
        (MINIMAL, "search: optuna\n", "search: optuna needs num_candidates"),
        ("data: rows.jsonl\n", "", "model: Field required"),
        ("model: base\n", "dataset_tokens: 0\n", "got 0"),
        ("model: base\n", "dataset_tokens: 1.5\n", "got 1.5"),
    ],
)
def test_load_config_keys_that_do_not_go_together_give_one_line(load, head, lines, expected):
    (found,) = problems(load, lines, head)
    assert expected in found


@pytest.mark.parametrize(
    ("text", "kind"), [("", "NoneType"), ("- a\n- b\n", "list"), ("hello\n", "str")]
)
def test_load_config_that_holds_no_keys_says_so(load, text, kind):
    (found,) = problems(load, text, head="")
    assert found == f"must hold `key: value` lines (model: ..., data: ...), holds {kind}"


def test_load_config_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")


def test_make_config_leaves_the_given_values_alone():
    values = {"model": "m", "data": "d", "lora_rank": [4.0]}
    assert make_config(values, "here").lora_rank == [4]
    assert values == {"model": "m", "data": "d", "lora_rank": [4.0]}


def shipped_configs() -> list[Path]:
    """Every YAML of the checkout that is a sweep (the run folders and installed packages are not, and
    studies and their presets have tests of their own)."""
    found = [path for suffix in ("yaml", "yml") for path in ROOT.rglob(f"*.{suffix}")]
    found = [path for path in found if path.name != "study.yaml" and path.parent.name != "presets"]
    places = [path.relative_to(ROOT) for path in found]
    return sorted(
        place
        for place in places
        if not {part for part in place.parts[:-1] if part[0] == "."} and place.parts[0] != "runs"
    )


def test_shipped_configs_include_the_demo():
    assert Path("trainers/assets/demo/sweep.yaml") in shipped_configs()


@pytest.mark.parametrize("place", shipped_configs(), ids=str)
def test_load_config_of_a_shipped_file_succeeds(place):
    assert load_config(ROOT / place).model != ""
