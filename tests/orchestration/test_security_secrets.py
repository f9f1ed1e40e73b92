"""Secrets stay where they are: what a user wrote into a config is refused, what his environment holds is written and
printed nowhere, and an error of a client is masked before anybody sees it."""

import pytest

from orchestration.cli import main
from orchestration.report import write_report
from orchestration.runtime_env import PASSED_ON, worker_environment
from tests.orchestration.sweeps import ended, start, told
from tests.orchestration.test_orch_report import candidate, plan
from trainers.base_fetch import hub_config, missing_bytes
from trainers.credentials import credential_in, masked
from trainers.object_store import ObjectStore, StoreError
from trainers.paths import RunPaths, write_state
from trainers.terminal import printable

SECRETS = {
    "HF_TOKEN": "hf_MARKERmarkerMARKERmarker01",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAMARKERMARKER0123",
    "AWS_SECRET_ACCESS_KEY": "marker/Secret+Access/Key/0123456789abcd",
    "OPENAI_API_KEY": "sk-proj-MARKERmarkerMARKERmarker",
    "GITHUB_TOKEN": "ghp_MARKERmarkerMARKERmarkerMARKER01",
    "DATABASE_PASSWORD": "correct horse battery staple",
}
URLS = {
    "https://user:MARKERpw@host.example/owner/name": "a user or token before the @ of a URL (https://...)",
    "https://hf_MARKERmarkerMARKERmarker01@huggingface.co/owner/name": "set HF_TOKEN in the environment",
    "s3://key:MARKERsecret@bucket/data": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3://key:MARKER/with/slashes@bucket/data": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "https://host.example/rows.jsonl?token=MARKERtoken": "a secret in a URL (token=...)",
    "https://bucket.example/x?X-Amz-Signature=MARKERsig&x=1": "a secret in a URL (X-Amz-Signature",
    "gs://MARKERtoken@bucket/data": "set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "sk-proj-MARKERmarkerMARKERmarker": "a token (sk-...)",
}
HARMLESS = (
    "owner/name",
    "s3://bucket/runs",
    "http://localhost:9000/a@b",
    "abfs://container@account.dfs.core.windows.net/runs",
    "git+ssh://git@host.example/repository",
    "ray://127.0.0.1:10001",
    "./models/base@main",
    "runs/key=3",
    "is this right? token=yes",
)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment that holds them."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    ("verb", "key"), [("plan", "model"), ("sweep", "data"), ("check", "storage")]
)
def test_config_with_a_credential_is_refused_with_its_place_and_what_to_use(
    write_sweep, capsys, verb, key, url
):
    config = write_sweep(**{key: url})
    line_number = 1 + next(
        i for i, x in enumerate(config.read_text().splitlines()) if "MARKER" in x
    )
    assert main([verb, str(config)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tenfold: {config}:{line_number}: must hold no credentials, holds a")
    assert URLS[url] in line
    assert "MARKER" not in captured.out + captured.err


@pytest.mark.parametrize(
    "text",
    [
        "# see hf_MARKERmarkerMARKERmarker01\n",  # the file is copied into the run, comments and all
        'columns: {"https:\\u002f/user:MARKER@host/": prompt}\n',  # as YAML reads it, it is one
        "hf_tokn: hf_MARKERmarkerMARKERmarker01\n",
    ],
)
def test_config_with_a_credential_anywhere_is_refused(write_sweep, capsys, text):
    config = write_sweep()
    config.write_text(config.read_text() + text)
    assert main(["sweep", str(config)]) == 2
    captured = capsys.readouterr()
    assert "must hold no credentials" in captured.err
    assert "MARKER" not in captured.out + captured.err


def test_config_with_the_value_of_a_secret_variable_is_refused(write_sweep, capsys, secrets):
    config = write_sweep(name="x", retention=f"data/{secrets['DATABASE_PASSWORD']}.jsonl")
    assert main(["plan", str(config)]) == 2
    err = capsys.readouterr().err
    assert "holds the value of DATABASE_PASSWORD; the variable is enough" in err
    assert secrets["DATABASE_PASSWORD"] not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("resume", "s3://key:MARKER@bucket/runs/run"),
        ("resume", "https://host.example/run?token=MARKER"),
        ("report", "s3://key:MARKER@bucket/runs/run"),
        ("export", "s3://key:MARKER@bucket/runs/run"),
        ("sweep", "sweep.yaml", "--address", "ray://user:MARKER@host:10001"),
        ("plan", "sweep.yaml", "--address", "ray://user:MARKER@host:10001"),
        ("study", "rank", "sweep.yaml", "--address", "ray://user:MARKER@host:10001"),
    ],
)
def test_credential_on_the_command_line_is_refused_and_not_repeated(write_sweep, capsys, arguments):
    write_sweep()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert "credentials" in captured.err
    assert "MARKER" not in captured.out + captured.err


@pytest.mark.parametrize("url", URLS)
def test_masked_text_keeps_what_is_around_a_credential(url):
    found = masked(f"before {url} behind")
    assert "MARKER" not in found
    assert found.startswith("before ")
    assert found.endswith(" behind")
    assert credential_in(found) is None
    assert masked(found) == found


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_credential_stays_as_it_is(text):
    assert credential_in(text) is None
    assert masked(text) == text


def test_masked_text_holds_no_value_of_a_secret_variable(secrets):
    for name, value in secrets.items():
        assert masked(f"{name}={value}!") == f"{name}=***!"
    assert printable(f"\x1b[31m{secrets['HF_TOKEN']}") == "\\x1b[31m***"


def test_masked_text_holds_the_path_of_a_secret_but_no_secret_that_looks_like_one(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/MARKER/Secret+Access/Key")
    assert masked(f"{tmp_path}: /MARKER/Secret+Access/Key") == f"{tmp_path}: ***"


def test_environment_of_workers_that_ray_shows_to_all_holds_no_secret(secrets, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    found = worker_environment("head:6379")
    assert found["env_vars"]["AWS_ENDPOINT_URL"] == "http://store.example:9000"
    assert not [value for value in secrets.values() if value in str(found)]
    assert not {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"} & set(PASSED_ON)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "HF_ENDPOINT", "TENFOLD_SHARED_CACHE"])
def test_environment_of_workers_with_a_credential_in_a_url_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "https://user:MARKER@host.example")
    with pytest.raises(
        ValueError, match=f"{name} in the environment must hold no credentials"
    ) as told:
        worker_environment("head:6379")
    assert "MARKER" not in str(told.value)


def test_error_of_a_store_with_a_secret_in_it_is_masked(tmp_path, monkeypatch):
    store = ObjectStore(f"file://{tmp_path}", patience_s=0)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(
            "403 for https://host/x?X-Amz-Signature=MARKER from http://u:MARKER@proxy:1"
        )

    monkeypatch.setattr(store.fs, "cat_file", fail)
    with pytest.raises(StoreError, match=r"X-Amz-Signature=\*\*\*.*http://\*\*\*@proxy:1"):
        store.read("name")


def test_error_of_the_hub_with_a_secret_in_it_is_masked(write_sweep, workplace):
    """The hub at an address that nobody answers, with a password in it, as behind a company's proxy."""
    write_sweep(model="owner/name")
    environment = {"HF_ENDPOINT": "http://user:MARKERpassword@127.0.0.1:1", "HF_HUB_OFFLINE": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = ended(start(workplace, "plan", "sweep.yaml"))
    assert done.returncode == 2, told(done)
    assert "owner/name" in done.stderr
    assert "MARKER" not in done.stdout + done.stderr


@pytest.mark.parametrize("ask", [hub_config, missing_bytes])
def test_answer_of_the_hub_with_a_signed_url_in_it_is_masked(monkeypatch, workplace, ask):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(
            "403 Forbidden for https://cdn.example/x?Expires=1&Signature=MARKER&Key-Pair-Id=K"
        )

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"Expires=1&Signature=\*\*\*&Key") as told:
        ask("owner/name", None)
    assert "MARKER" not in str(told.value)


def test_report_of_errors_with_secrets_in_them_shows_none(tmp_path):
    run, error = RunPaths(tmp_path / "run"), "403 for https://host.example/x?X-Amz-Signature=MARKER"
    trial = run.trial("trial")
    write_state(trial.config, {"candidate": candidate(1e-3)})
    write_state(trial.status, {"status": "failed", "reason": error, "examples": 0, "steps": 0})
    write_state(run.plan, plan())
    write_state(run.resolved, {"config": {"model": "m", "data": "d"}, "versions": {}})
    packs = {"num_groups": 1, "workers_per_group": 1, "places": 4, "reason": "r"}
    groups = {"group-0": {"lost": error}}
    write_state(run.packs, packs | {"keep_dequantized": True, "groups": groups})
    write_report(run)
    page = run.report.read_text()
    assert "MARKER" not in page
    assert page.count("403 for https://host.example/x?X-Amz-Signature=***") == 2
