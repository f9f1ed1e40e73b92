"""`--verbose` reaches what speaks of Ray: what `ray.init`, Tune and its logger are told, and the live view."""

import io
import logging
import os
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

from orchestration import run as run_module
from orchestration import sweep, verbosity
from orchestration.cli import main
from orchestration.progress import Progress


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_flag_lasts_as_long_as_its_verb(write_sweep, monkeypatch, verbose):
    seen: list[bool] = []
    monkeypatch.setattr(
        run_module, "run_sweep", lambda *_, **__: seen.append(verbosity.is_verbose()) or 0
    )
    assert main(["sweep", str(write_sweep()), *(["--verbose"] if verbose else [])]) == 0
    assert seen == [verbose]
    assert not verbosity.is_verbose()


@pytest.mark.parametrize("verb", ["sweep", "resume", "study", "demo"])
def test_verbose_is_a_flag_of_every_verb_that_starts_ray(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--verbose" in capsys.readouterr().out


def test_verbose_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv(verbosity.VARIABLE, "1")
    with verbosity.told(True):
        pass
    assert verbosity.is_verbose()


@pytest.mark.parametrize(("verbose", "level"), [(False, "error"), (True, "info")])
def test_start_ray_is_silent_unless_verbose(monkeypatch, verbose, level):
    from ray._private import auto_init_hook

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep, "_start_local", told.append)
    monkeypatch.setattr(sweep, "begin_alone", dict)
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    with mock.patch.dict(os.environ), verbosity.told(verbose):
        sweep.start_ray(None)
    assert told == [{"log_to_driver": verbose, "logging_level": level, "configure_logging": True}]


@pytest.mark.parametrize("verbose", [False, True])
def test_run_trials_lets_tune_speak_only_if_verbose(tmp_path, monkeypatch, verbose):
    from trainers.paths import RunPaths

    class Tuner:
        def __init__(self, trainable: Any, *, tune_config: Any, run_config: Any) -> None:
            levels.append(run_config.verbose)

        def fit(self) -> None:
            levels.append(logging.getLogger("ray.tune").level == logging.CRITICAL)

    levels: list[Any] = []
    monkeypatch.setattr("ray.tune.Tuner", Tuner)
    monkeypatch.setattr(logging.getLogger("ray.tune"), "level", logging.INFO)
    with verbosity.told(verbose):
        run = RunPaths(tmp_path)
        sweep.run_trials(lambda config: None, None, None, run, max_concurrent=1, callback=None)
    assert levels == ([2, False] if verbose else [0, True])


def test_progress_of_a_verbose_command_is_lines_even_on_a_terminal():
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    with verbosity.told(True), Progress(["a"], 0, 64, console) as progress:
        progress.reported("a", {"examples": 16, "eval_loss": 2.5})
    assert stream.getvalue().endswith("] a: 16/64 examples, eval_loss 2.5000\n")
