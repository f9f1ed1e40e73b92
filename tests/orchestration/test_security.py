"""Nothing of a user's or of the hub's is run: models that bring code or pickles are refused by every verb, and our
own packages hold nothing that would run them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.models import model_shape
from tests.hostile_models import (
    OTHER_WEIGHTS,
    OWN_CODE,
    change_json,
    model_copy,
    pickle_into,
)
from tests.orchestration.sweeps import ROOT
from tests.orchestration.test_orch_export import add_trial
from trainers.data.tokenizer import load_tokenizer
from trainers.integrity import seal_folder
from trainers.paths import RunPaths, write_state

PACKAGES = ("orchestration", "trainers", "search_spaces", "cluster", "benchmarks")
REASONS = {
    "model_of_unknown_type": "is of one of its own (model_type 'own', by auto_map in config.json)",
    "model_of_known_type": "is of one of its own (OwnModel, by auto_map in config.json)",
    "tokenizer_of_its_own": "has one of its own (OwnTokenizer, by auto_map in tokenizer_config",
    "kernel_of_the_hub": "attn_implementation in config.json must be one that transformers has",
    "pickle_alone": "it has none, but pytorch_model.bin, a pickle, which can run code",
    "index_of_a_pickle": "must name *.safetensors files of its folder alone, names pytorch_model.bin",
    "index_that_leads_out": "files of its folder alone, names ../base/model.safetensors",
    "adapter_beside": "must be a base alone, an adapter lies beside it (adapter_config.json)",
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a verb says, which leaves nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert sorted(Path.cwd().rglob("*")) == before
    return line.removeprefix("tenfold: ")


@pytest.mark.parametrize("spoil", OWN_CODE, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("verb", ["plan", "check", "sweep"])
def test_model_with_code_of_its_own_is_refused_and_not_run(
    write_sweep, workplace, tmp_path, capsys, verb, spoil
):
    marker = tmp_path / "marker"
    spoil(model_copy(workplace / "own"), marker)
    line = refused(capsys, verb, str(write_sweep(model="./own")))
    assert line.startswith(("model ./own: ", "model own: "))
    assert REASONS[spoil.__name__] in line
    assert "Tenfold runs no code that comes with a model (trust_remote_code is off)" in line
    assert not marker.exists()


@pytest.mark.parametrize("spoil", OTHER_WEIGHTS, ids=lambda spoil: spoil.__name__)
def test_model_with_weights_that_are_no_safetensors_is_refused_by_a_sweep(
    write_sweep, workplace, tmp_path, capsys, spoil
):
    marker = tmp_path / "marker"
    model_copy(workplace / "base")
    spoil(model_copy(workplace / "own"), marker)
    line = refused(capsys, "sweep", str(write_sweep(model="./own")))
    assert line.startswith("model ./own: ")
    assert REASONS[spoil.__name__] in line
    assert not marker.exists()


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """runs/run of one trial with weights, on the base in models/base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    model_copy(tmp_path / "models" / "base")
    run = RunPaths(tmp_path / "runs" / "run")
    write_state(run.resolved, {"config": {"model": "models/base", "revision": None}})
    add_trial(run, seed=0, eval_loss=1.0)
    return run


@pytest.mark.parametrize(
    "spoil", [*OWN_CODE[:2], OWN_CODE[3], *OTHER_WEIGHTS], ids=lambda spoil: spoil.__name__
)
def test_model_changed_after_its_sweep_is_refused_by_export_and_not_run(
    finished, tmp_path, capsys, spoil
):
    marker = tmp_path / "marker"
    spoil(tmp_path / "models" / "base", marker)
    line = refused(capsys, "export", "runs/run", "--merge")
    assert REASONS[spoil.__name__] in line
    assert not marker.exists()


def test_export_of_an_adapter_that_is_a_pickle_is_refused_and_not_run(finished, tmp_path, capsys):
    marker = tmp_path / "marker"
    (best,) = finished.trials.glob("*/best")
    (best / "adapter_model.safetensors").unlink()
    pickle_into(best / "adapter_model.bin", marker)
    for arguments in ((), ("--merge",)):
        assert "must have weights in best/" in refused(capsys, "export", "runs/run", *arguments)
    pickle_into(best / "adapter_model.safetensors", marker)
    seal_folder(best)  # so that its checksums agree
    assert "adapter_model.safetensors" in refused(capsys, "export", "runs/run", "--merge")
    assert not marker.exists()


def test_export_writes_over_nothing(finished, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    (tmp_path / "link").symlink_to(other)
    (tmp_path / "dangling").symlink_to("absent")
    for name in ("other", "other/kept", "link", "dangling", "models/base"):
        line = refused(capsys, "export", "runs/run", "-o", name)
        assert line == f"{name}: must be new, it exists; give another folder (-o)"
    line = refused(capsys, "export", "runs/run", "-o", "other/kept/x")
    assert line.startswith("other/kept/x: must lie in a folder where you can write, ")
    assert (other / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    # As they are published: the class that auto_map names has been in transformers for years.
    ("model_type", "architecture", "code"),
    [
        ("phi3", "Phi3ForCausalLM", "modeling_phi3.Phi3ForCausalLM"),
        ("deepseek_v3", "DeepseekV3ForCausalLM", "modeling_deepseek.DeepseekV3ForCausalLM"),
        ("falcon", "FalconForCausalLM", "modeling_falcon.FalconForCausalLM"),
        ("mpt", "MPTForCausalLM", "modeling_mpt.MPTForCausalLM"),  # there: MptForCausalLM
    ],
)
def test_model_whose_class_transformers_has_keeps_its_auto_map(
    tmp_path, model_type, architecture, code
):
    from trainers.foreign_code import refuse_own_code

    config = tmp_path / "config.json"
    change_json(
        config,
        model_type=model_type,
        architectures=[architecture],
        auto_map={"AutoConfig": f"{code}Config", "AutoModelForCausalLM": code},
    )
    refuse_own_code(config, "name")
    change_json(config, architectures=["OwnForCausalLM"])
    with pytest.raises(ValueError, match="OwnForCausalLM"):
        refuse_own_code(config, "name")


def test_model_whose_tokenizer_class_transformers_has_keeps_its_auto_map(workplace):
    folder = model_copy(workplace / "own")
    own = {"AutoTokenizer": ["tokenization_own.LlamaTokenizer", None]}
    for name in ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"):
        change_json(folder / "tokenizer_config.json", tokenizer_class=name, auto_map=own)
        assert load_tokenizer(folder).encoder.encode("def f(x):").ids


def test_model_with_safetensors_and_a_pickle_beside_them_is_planned_from_its_config(workplace):
    folder = model_copy(workplace / "both")
    pickle_into(folder / "pytorch_model.bin", workplace / "marker")
    assert model_shape(str(folder)).num_layers == 4
    assert not (workplace / "marker").exists()


# ---- What our packages hold

UNPICKLERS = ("pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle")
CALLS = (
    "torch.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "Tuner.restore",
    "tune.Tuner.restore",
    "pd.read_pickle",
    "os.system",
    "os.popen",
    "runpy.run_path",
)
BUILTINS = ("eval", "exec", "compile", "__import__")


def faults(source: str) -> Iterator[str]:
    """Line and text of what would run or unpickle somebody's file."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += (
                [f"{node.module}.{name}" for name in names]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            yield from (
                f"{line}: {name}" for name in names if set(name.split(".")) & set(UNPICKLERS)
            )
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in CALLS or (isinstance(node.func, ast.Name) and called in BUILTINS):
            yield f"{line}: {called}"
        if (
            given.get("allow_pickle", "False") != "False"
            or given.get("weights_only", "True") != "True"
        ):
            yield f"{line}: {called} of a pickle"
        if given.get("shell", "False") != "False":
            yield f"{line}: {called} by a shell"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{line}: {called} that trusts"
        loads = re.fullmatch(r"(transformers\.)?Auto\w+\.from_(pretrained|config)", called)
        if loads and given.get("trust_remote_code") != "False":
            yield f"{line}: {called} must say trust_remote_code=False"
        has_weights = re.fullmatch(r"(transformers\.)?AutoModel\w*\.from_pretrained", called)
        if has_weights and given.get("use_safetensors") != "True":
            yield f"{line}: {called} must say use_safetensors=True"


def sources() -> list[Path]:
    return [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def test_our_packages_unpickle_nothing_evaluate_nothing_and_trust_no_code():
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sources()
        for fault in faults(path.read_text())
    ]
    assert len(sources()) > 200
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import torch\ntorch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "tune.Tuner.restore(path, trainable)",
        "eval(text)",
        "exec(text)",
        "AutoConfig.from_pretrained(path)",
        "AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)",
        "load(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_our_packages_are_searched_for_what_would_run(line):
    assert list(faults(line))
