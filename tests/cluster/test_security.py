"""Manifests: no secret in them, no command made of a user's text, no cluster without its token."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from orchestration.cli import main
from tests.cluster.test_manifests_cli import AWS, BASE, KINDS

SECRETS = {
    "HF_TOKEN": "hf_MARKERmarkerMARKERmarker01",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAMARKERMARKER0123",
    "AWS_SECRET_ACCESS_KEY": "marker/Secret+Access/Key/0123456789abcd",
    "RAY_AUTH_TOKEN": "MARKERtoken0123456789",
}


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., str]:
    """What `tenfold cluster` prints for a sweep, with secrets in the environment."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    rows = [{"prompt": f"{i} plus one?", "completion": f" It is {i + 1}."} for i in range(60)]
    Path("good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(arguments: list[str], more: str = "", **values: object) -> str:
        plain = {"model": str(BASE), "data": "good.jsonl", "pack_size": 1, "workers_per_trial": 1}
        plain |= {"lora_rank": 4, "learning_rate": 1e-3, "global_batch_size": 16, "name": "run"}
        Path("sweep.yaml").write_text(yaml.safe_dump(plain | values) + more)
        assert main(["cluster", *arguments, "sweep.yaml"]) == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    return made


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("storage", ["runs", "s3://bucket/runs"])
def test_manifest_holds_no_secret_of_the_environment(manifest, kind, storage):
    text = manifest(KINDS[kind], tracking=["wandb"], storage=storage)
    assert "run" in text
    assert not [name for name, value in SECRETS.items() if value in text]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--pip", "git+https://MARKERtoken@host.example/tenfold"),
        ("--image", "https://user:MARKER@registry.example/t:1"),
        ("--nfs", "nfs://user:MARKER@10.0.0.1/x"),
        ("--secrets-file", "https://host.example/secrets?token=MARKER"),
        ("--work-folder", f"/mnt/{SECRETS['AWS_ACCESS_KEY_ID']}"),
    ],
)
def test_manifest_of_a_flag_with_a_credential_is_refused(manifest, capsys, flag, value):
    manifest(KINDS["slurm"])
    assert main(["cluster", *KINDS["aws"], flag, value, "sweep.yaml"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tenfold: {flag} must hold no credentials, holds a")
    assert "MARKER" not in captured.out + captured.err


def test_manifest_takes_a_user_of_ssh(manifest):
    flags = [*KINDS["aws"], "--pip", "git+ssh://git@host.example/tenfold"]
    assert "git+ssh://git@host.example/tenfold" in manifest(flags)


def document_of(text: str) -> dict:
    """The YAML of what was printed, without what was said on stderr."""
    lines = (line for line in text.splitlines() if not line.startswith("tenfold: "))
    return yaml.safe_load("\n".join(lines))


HOSTILE = """
# '; touch marker; ' "$(touch marker)" `touch marker` \\'; touch marker
# {{ x }} %s %n ${HOME} EOF
"""


def test_manifest_writes_a_config_of_shell_code_to_the_letter_and_runs_none_of_it(
    manifest, tmp_path
):
    flags = ["ray", "--gpu", "A100-80GB", "--gpus-per-node", "8", *AWS, "--nfs", "fs-1:/"]
    text = manifest(flags, HOSTILE)
    commands = [c for c in document_of(text)["head_setup_commands"] if "pip" not in c]
    home = tmp_path / "home"
    home.mkdir()
    for command in commands:
        subprocess.run(
            ["bash", "-c", command],
            cwd=home,
            env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
            check=True,
        )
    (written,) = home.rglob("sweep.yaml")
    assert written.read_text() == Path("sweep.yaml").read_text()
    assert HOSTILE in written.read_text()
    assert not list(tmp_path.rglob("marker"))


@pytest.mark.parametrize("kind", list(KINDS))
def test_manifest_starts_no_ray_without_its_token(manifest, kind):
    text = manifest(KINDS[kind])
    starts = text.count("ray start")
    if kind == "kuberay":
        assert "authOptions:\n      mode: token" in text
        assert text.count("dashboard-host") == 1  # reached through a Service, by the token alone
        return
    assert starts == 2
    assert text.count("--dashboard-host=127.0.0.1") == text.count("--dashboard-host") == 1
    assert text.count("export RAY_AUTH_MODE=token") >= 1
    if kind != "slurm":
        document = document_of(text)
        for side in ("head", "worker"):
            (start,) = (c for c in document[f"{side}_start_ray_commands"] if "ray start" in c)
            assert start.index("export RAY_AUTH_MODE=token") < start.index("ray start")
