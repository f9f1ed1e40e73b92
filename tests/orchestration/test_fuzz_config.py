"""Whatever stands in a sweep.yaml or a study.yaml: exit 0, or exit 2 and one clear line for each problem; no
traceback, no hang, nothing left behind. TENFOLD_FUZZ_EXAMPLES=N tries N new files in each test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given

from orchestration.cli import main
from orchestration.config import SweepConfig
from orchestration.studies.config import DECIDED, KINDS, StudyConfig
from tests.fuzzing import Started, fuzz_folder, quick_settings
from tests.orchestration.config_cases import (
    BOMB,
    FEW_FACTS,
    LEGAL,
    MERGES,
    NAME,
    SHIPPED,
    STUDY,
    ConfigCase,
    fill,
    mutated,
    structured,
)

pytestmark = pytest.mark.own_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with fuzz_folder(tmp_path_factory.mktemp("fuzz")) as work:
        fill(work)
        yield work


@quick_settings(300)
@given(case=structured())
def test_fuzz_config_of_any_values_ends_in_0_or_2_and_leaves_nothing(folder, case):
    assert case.run(folder).fault is None


@quick_settings(250)
@given(case=mutated())
def test_fuzz_config_of_ours_damaged_ends_in_0_or_2_and_leaves_nothing(folder, case):
    assert case.run(folder).fault is None


def test_fuzz_config_cases_draw_every_key():
    assert LEGAL.keys() == SweepConfig.model_fields.keys()
    assert STUDY.keys() == StudyConfig.model_fields.keys() - SweepConfig.model_fields.keys()
    assert set(DECIDED) <= LEGAL.keys()


WANTING = {
    "docs/concepts.md 0": "rank 64 on attn+mlp+unembed holds 2,154,496 bits",  # 70B there, tiny-llama here
    **{f"cluster {kind}": "give data" for kind in ("lr-ratio", "rank", "layers", "batch")},
    "own-data-8b.yaml": "seq_len must be at most the model's context (1024 tokens)",
    "carried.yaml": "runs/small",
    "cluster rl": "openai/gsm8k:main",  # whose data come from the hub
}
"""Files of ours that need more than they say."""


@pytest.mark.parametrize(("name", "text"), SHIPPED, ids=dict(SHIPPED))
def test_fuzz_config_undamaged_file_of_ours_is_planned_or_would_start(folder, name, text):
    """Else the damaged ones would all end before anything is looked at."""
    kind = name.split()[-1]
    few = "".join(f"{key}: {value}\n" for key, value in FEW_FACTS.items() if kind == "capacity")
    command = ("study", kind, NAME) if kind in KINDS else PLAN
    ending = ConfigCase(command, f"{few}{text}".encode()).run(folder)
    assert ending.fault is None
    assert ending.code == (2 if name in WANTING else None if kind in KINDS else 0)
    assert WANTING.get(name, "") in ending.err


GOOD = "model: base\ndata: good.jsonl\n"
SMALL = GOOD + "lora_rank: 4\nglobal_batch_size: 8\nexamples: 32\n"
FACTS = SMALL + "exposures: 2\n"
PLAN, SWEEP = ("plan", NAME), ("sweep", NAME)
RATIO, CAPACITY, COMPUTE = (("study", kind, NAME) for kind in ("lr-ratio", "capacity", "compute"))
MANY = "[" + ", ".join(map(str, range(1, 31))) + "]"
FOUND = {
    "aliases that stand for 3 billion values": (PLAN, BOMB + GOOD, "at most 10,000 values"),
    "merges of merges": (PLAN, f"{MERGES}{GOOD}", "line 2: merges (<<) are not read"),
    "alias of itself": (PLAN, GOOD + "target: &a [*a]\n", "at most 10,000 values"),
    "tag of a value that is none": (PLAN, GOOD + "packing: !!bool maybe\n", "line 3: tags are not read"),
    "tag of a date that is none": (PLAN, GOOD + "name: !!timestamp x\n", "line 3: tags are not read"),
    "tag of a map on a list": (PLAN, GOOD + "eval: !!map [a]\n", "line 3: tags are not read"),
    "3,000 lists in each other": (PLAN, f"{GOOD}target: {'[' * 3000}\n", "line 3: must be nested at most 20 deep"),
    "20,000 lists in each other by dashes": (PLAN, "- " * 20_000, "line 1: must be nested at most 20 deep"),
    "escape of no character": (PLAN, GOOD + 'name: "\\UFFFFFFFF"\n', "line 3: an escape must be the code"),
    "half a character": (PLAN, GOOD + 'name: "a\\ud800"\n', "half a character: 'a\\ud800'"),
    "zero byte": (PLAN, GOOD + "\0", "line 3: must be text, has the control character #x0000"),
    "zero byte by an escape": (PLAN, 'model: base\ndata: "a\\0"\n', "data must be text of one line, without '\\x00'"),
    "line feed in a path": (PLAN, 'model: "a\\nb"\ndata: good.jsonl\n', "model must be text of one line"),
    "file of two megabytes": (PLAN, GOOD + "# " + "x" * 2_000_000, "at most 1,000,000 bytes"),
    "number of 5,000 digits": (PLAN, GOOD + "seed: 1" + "0" * 5000, "line 3: must be a number, got 1000"),
    "number of 5,000 hexadecimal digits": (PLAN, GOOD + "seed: 0x" + "f" * 5000,
        "line 3: must be a number, got 0xff"),
    "rank of 400 digits": (PLAN, GOOD + "lora_rank: 1" + "0" * 400, "lora_rank must be 0 or of a size between"),
    "rate next to nothing": (PLAN, GOOD + "learning_rate: 5e-324\n", "learning_rate must be 0 or of a size between"),
    "text of 5,000 characters": (PLAN, GOOD + "format: " + "x" * 5000,
        "format must be text of at most 1,000 characters"),
    "part of a path of 300 bytes": (PLAN, f"model: {'x' * 300}\ndata: good.jsonl\n", "255 bytes between two slashes"),
    "home of nobody": (PLAN, GOOD + 'eval: "~nobody-here/x"\n', "begins with no user's home"),
    "empty text": (PLAN, 'model: ""\ndata: good.jsonl\n', "model must not be empty"),
    "range of a billion points": (PLAN, GOOD + "learning_rate: {low: 1e-5, high: 1e-3, num: 1e9}\n", "to 1,000, got"),
    "billion candidates": (PLAN, GOOD + "search: random\nnum_candidates: 1000000000\n",
        "num_candidates: Input should be"),
    "grid of 5 million candidates": (
        PLAN, GOOD + f"global_batch_size: {MANY}\nlora_rank: {MANY}\nlora_alpha: {MANY}\n"
        "learning_rate: {low: 1e-5, high: 1e-3, num: 200}\n", "at most 100,000 candidates, has 5,400,000",
    ),
    "capacity of 1e308 bits": (PLAN, GOOD + "capacity: 1e308\n", "capacity must be 0 or of a size between"),
    "GPU of 200 digits": (PLAN, f"{GOOD}inventory: 1x{'9' * 200}GB\n",
        "inventory must be [NODESx]GPUSx[NAME-]SIZEGB"),
    "trillion of GPUs": (PLAN, GOOD + "inventory: 999999x999999xH100-80GB\n", "at most 100,000 GPUs"),
    "rows that stand 5e14 times": (PLAN, "model: base\ndata: {good.jsonl: 5e14}\n",
        "weights above 0 (at most 1,000;"),
    "storage in a file": (SWEEP, GOOD + "storage: good.jsonl/runs\n", "good.jsonl is a file"),
    "storage that is a file, of a study": (COMPUTE, SMALL + "storage: good.jsonl\n", "good.jsonl is a file"),
    "storage that cannot be made, of a study": (COMPUTE, SMALL + "storage: /proc/none\n",
        "must be one that can be made"),
    "grid of 1e15 decades": (RATIO, SMALL + "lr_decades: 1e15\n",
        "lr_decades: Input should be less than or equal to 10"),
    "a trillion seeds": (RATIO, SMALL + "seeds: 1000000000000\n", "seeds: Input should be less than or equal to 1000"),
    "facts beyond memory": (CAPACITY, FACTS + "loads: [1e9]\n", "num_facts must be at most 10,000,000"),
    "layer twice in a target, of a study": (CAPACITY, FACTS + "loads: [0.1]\ntarget: [mlp, all, all]\n", "target"),
    "several targets, of a study": (CAPACITY, FACTS + "target: [[mlp], [attn]]\n",
        "target must be one target in this study"),
}  # fmt: skip
"""What the campaigns found: a traceback, a hang, a line without end or a folder left behind; and what must be
said now."""


@pytest.mark.parametrize("name", FOUND)
def test_fuzz_config_found_before_gives_one_line_that_says_what_must_hold(folder, name):
    command, text, part = FOUND[name]
    ending = ConfigCase(command, text.encode()).run(folder)
    assert ending.fault is None
    assert ending.code == 2
    (line,) = ending.err.splitlines()
    assert part in line


def test_fuzz_config_date_is_the_text_that_it_is_written_as(folder):
    text = "model: base\ndata: 2024-13-45\n"
    ending = ConfigCase(PLAN, text.encode()).run(folder)
    assert ending.err.endswith("found nothing at 2024-13-45\n")


def test_fuzz_config_storage_in_the_home_folder_is_not_a_folder_named_tilde(folder):
    text = f'{SMALL}storage: "~/runs"\nname: mine\n'
    (Path.home() / "runs" / "mine").mkdir(parents=True)
    (Path.home() / "runs" / "mine" / "plan.json").touch()
    ending = ConfigCase(SWEEP, text.encode()).run(folder)
    shutil.rmtree(Path.home() / "runs")
    assert f"{Path.home()}/runs/mine: the run folder exists already" in ending.err


def test_fuzz_config_study_that_no_cluster_takes_leaves_no_run_and_keeps_one_that_was_there(
    folder, monkeypatch
):
    def refuse(address: str | None) -> None:
        raise ValueError(f"address {address}: no Ray cluster answers")

    def stop(address: str | None) -> None:
        raise Started

    run = folder / "runs" / "mine"
    (folder / NAME).write_text(f"{SMALL}name: mine\n")
    monkeypatch.setattr("orchestration.sweep.start_ray", refuse)
    assert main(RATIO) == 2
    assert not run.exists()
    monkeypatch.setattr("orchestration.sweep.start_ray", stop)
    with pytest.raises(Started):
        main(RATIO)
    begun = (run / "resolved.json").read_bytes()
    monkeypatch.setattr("orchestration.sweep.start_ray", refuse)
    assert main(RATIO) == 2
    assert (run / "resolved.json").read_bytes() == begun
    shutil.rmtree(folder / "runs")
