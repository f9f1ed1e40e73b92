"""The `tenfold` command. Everything heavy is imported by the verb that needs it: `tenfold --help` and
`tenfold plan` import neither torch nor ray."""

import argparse
import gc
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestration import bars, signals, verbosity
from orchestration.cluster_verb import add_cluster_options, run_cluster
from orchestration.config_verbs import add_config_verbs
from orchestration.exit_codes import BAD_INPUT, INTERRUPTED
from orchestration.live_verbs import add_live_verbs

EXIT_CODES = (
    "exit codes: 0 done; 1 no trial ended with a usable score; 2 input that cannot be used; "
    "130 interrupted; 143 ended by SIGTERM, 129 by SIGHUP"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. Returns its exit code; bad input prints one line per problem and gives 2."""
    # pydantic looks for plugins in every installed distribution; Tenfold has none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    args = _parsed(argv)
    with signals.handling(), verbosity.told(getattr(args, "verbose", False)), bars.reading():
        code = signals.exit_code(_ended(args))
    if signals.is_broken_off():
        sys.stdout.flush()
        os._exit(code)
    return code


def _ended(args: argparse.Namespace) -> int:
    try:
        return _ran(args)
    except Exception:
        # What breaks after a signal (a terminal that went, a server that it ended) is its end.
        if not signals.received():
            raise
    except SystemExit as end:
        if not signals.is_of_ray(end):
            raise
    _complain("; ".join(["interrupted", *filter(None, [signals.how_to_go_on()])]))
    return INTERRUPTED


def _ran(args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except ValueError as error:
        if signals.received():
            raise
        _complain(str(error))
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        _complain("; ".join(["interrupted", *map(str, stop.args)]))
        return INTERRUPTED
    except BrokenPipeError:  # `tenfold plan ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        from trainers.paths import storage_problem

        if signals.received() or not (line := storage_problem(error)):
            raise
        _complain(line)
        return BAD_INPUT


def _complain(line: str) -> None:
    # What others say may hold control characters and passwords.
    from trainers.terminal import printable

    print(f"tenfold: {printable(line)}", file=sys.stderr)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; a study.yaml may stand behind flags, where argparse no longer looks for one."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and getattr(args, "config", "") is None and not rest[0].startswith("-"):
        args.config = Path(rest.pop(0))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class _Parser(argparse.ArgumentParser):
    """Of the command and, as argparse makes them of the same class, of every verb."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("epilog", EXIT_CODES)
        super().__init__(**options)


class _Version(argparse.Action):
    """argparse's own would ask for the version at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # pyproject.toml says it, once

        print(f"tenfold {version('tenfold')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line: a verb, a config, few operational flags; everything else is in the file."""
    parser = _Parser(
        prog="tenfold",
        description="Finds the right LoRA for a model and a dataset: doctrine-built sweeps on Ray.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("check", _check, "pitfalls and data audit; nothing runs"),
        ("plan", _plan, "shape, dataset bits, every candidate admitted or discarded and why"),
        ("sweep", _sweep, "train the admitted candidates; report.html and the best adapter"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        takes = "sweep.yaml, or a data file or folder" if name == "check" else "sweep.yaml"
        verb.add_argument("config", type=Path, help=takes)
        verb.set_defaults(run=run)
        if name == "sweep":
            verb.add_argument("--name", help="folder name under runs/")
            verb.add_argument(
                "--address", help="a running Ray cluster (default: a local one is started)"
            )
            verb.add_argument(
                "--resume",
                action="store_true",
                help="go on with the run of this name, if there is one",
            )
        else:
            verb.add_argument("--json", action="store_true", help="print JSON")
        if name == "check":
            _add_check_options(verb)
        if name == "plan":
            _add_plan_options(verb)
    report = verbs.add_parser("report", help="write report.html again from what is on disk")
    report.add_argument("run_folder", help="runs/NAME, or a URL")
    report.add_argument("--json", action="store_true", help="print what it shows as JSON")
    report.set_defaults(run=_report)
    resume = verbs.add_parser(
        "resume", help="go on with a sweep whose driver died or was interrupted"
    )
    resume.add_argument("run_folder", help="runs/NAME, or a URL")
    resume.add_argument("--address", help="a running Ray cluster (default: as the sweep began)")
    resume.set_defaults(run=_resume)
    add_live_verbs(verbs)
    _add_export(verbs)
    _add_study(verbs)
    add_config_verbs(verbs)
    text = "a Ray, KubeRay or Slurm manifest of the size that the plan asks for"
    cluster = verbs.add_parser("cluster", help=text, description=text)
    add_cluster_options(cluster)
    cluster.set_defaults(run=run_cluster)
    demo = verbs.add_parser("demo", help="a real NF4 sweep of the shipped base on local Ray")
    demo.add_argument(
        "--name", help="folder name under runs/ (default: the first free demo, demo-2, ...)"
    )
    demo.set_defaults(run=_demo)
    for name in ("sweep", "resume", "study", "demo"):
        verbs.choices[name].add_argument("--verbose", action="store_true", help=verbosity.FLAG_HELP)
    return parser


def _add_plan_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--inventory", metavar="I", help="GPUs to plan for, as 8xH100-80GB, 2x8xA100-40GB or 1x24GB"
    )
    verb.add_argument("--address", help="plan for a running Ray cluster")
    verb.add_argument(
        "--price", type=float, metavar="P", help="of a GPU-hour: the plan names a price"
    )


def _add_export(verbs: Any) -> None:
    text = "the best trial's adapter as a portable PEFT folder, or merged into its base"
    verb = verbs.add_parser("export", help=text, description=text)
    verb.add_argument("run_folder", help="runs/NAME, or a URL")
    verb.add_argument("--trial", metavar="T", help="another trial than the best")
    verb.add_argument("--merge", action="store_true", help="plain weights, which need no PEFT")
    verb.add_argument(
        "--for", dest="server", metavar="SERVER", help="vllm: say what it would refuse"
    )
    verb.add_argument(
        "-o", "--output", type=Path, help="a new folder (default: runs/NAME/export/...)"
    )
    verb.set_defaults(run=_export)


def _add_study(verbs: Any) -> None:
    text = "measure a claim of the doctrine: every point of every arm runs to its end"
    study = verbs.add_parser("study", help=text, description=text)
    study.add_argument(
        "kind", metavar="KIND", help="lr-ratio, rank, layers, batch, capacity, compute or rl"
    )
    study.add_argument(
        "config", type=Path, nargs="?", help="study.yaml; its keys win over the preset's"
    )
    study.add_argument("--preset", metavar="P", help="smoke, laptop, gpu or cluster")
    study.add_argument(
        "--name", help="folder name under runs/ (an interrupted study goes on there)"
    )
    study.add_argument("--address", help="a running Ray cluster (default: a local one is started)")
    study.add_argument(
        "--reuse",
        action="append",
        default=[],
        metavar="RUN",
        help="folder or URL of another study whose equal points are taken over",
    )
    study.set_defaults(run=_study)


def _add_check_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", help="whose tokenizer, for data without a sweep.yaml")
    verb.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="show the first N rows as they are tokenized, what is trained in colour",
    )
    verb.add_argument(
        "--base-loss", action="store_true", help="measure what the base loses on the data"
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Imports make no garbage: looking for it in between is a tenth of the time of a plan."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _planned(args: argparse.Namespace) -> dict[str, Any]:
    with _no_collection():
        from orchestration.config import load_config
        from orchestration.placing import asked_inventory, placed_plan

    config = load_config(
        args.config,
        inventory=args.inventory,
        price_per_gpu_hour=args.price,
        address=args.address,
    )
    return placed_plan(config, asked_inventory(config))


def _check(args: argparse.Namespace) -> int:
    with _no_collection():
        from orchestration.check import CheckOptions, checked
        from orchestration.show import print_json
        from orchestration.show_check import check_lines

    options = CheckOptions(model=args.model, num_shown=args.show, base_loss=args.base_loss)
    found = checked(args.config, options)
    if args.json:
        print_json(found)
    else:
        print("\n".join(check_lines(found)))
    for line in found["refusals"]:
        _complain(line)
    return BAD_INPUT if found["refusals"] else 0


def _plan(args: argparse.Namespace) -> int:
    from orchestration.show import print_json, show_plan

    plan = _planned(args)
    if args.json:
        print_json(plan)
    else:
        show_plan(plan)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from orchestration.config import load_config
    from orchestration.run import run_sweep

    config = load_config(args.config, name=args.name, address=args.address)
    return run_sweep(config, args.config.read_text(encoding="utf-8"), resume=args.resume)


def _report(args: argparse.Namespace) -> int:
    from orchestration.report_json import report_json
    from orchestration.report_verb import write_report_again
    from orchestration.show import print_json

    place = write_report_again(args.run_folder)
    if args.json:
        print_json(report_json(args.run_folder))
    else:
        print(place)
    return 0


def _resume(args: argparse.Namespace) -> int:
    from orchestration.run import resume_sweep

    return resume_sweep(args.run_folder, args.address)


def _export(args: argparse.Namespace) -> int:
    from orchestration.export import export

    lines = export(
        args.run_folder,
        trial=args.trial,
        output=args.output,
        merge=args.merge,
        server=args.server,
    )
    print("\n".join(lines))
    return 0


def _study(args: argparse.Namespace) -> int:
    from orchestration.studies.config import KINDS, PRESETS, load_study
    from orchestration.studies.run import run_study

    for name, value, known in (("KIND", args.kind, KINDS), ("--preset", args.preset, PRESETS)):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    flags = {"name": args.name, "address": args.address}
    config = load_study(args.kind, args.preset, args.config, **flags)
    command = _study_command(args)
    with signals.goes_on_by(lambda: f"`{command}` goes on with it"):
        return run_study(args.kind, config, preset=args.preset, command=command, reuse=args.reuse)


def _study_command(args: argparse.Namespace) -> str:
    parts = ["tenfold", "study", args.kind, *([str(args.config)] if args.config else [])]
    for flag in ("preset", "name", "address"):
        if (value := getattr(args, flag)) is not None:
            parts += [f"--{flag}", value]
    for folder in args.reuse:
        parts += ["--reuse", folder]
    return shlex.join(parts)


def _demo(args: argparse.Namespace) -> int:
    from orchestration.demo import demo_config
    from orchestration.run import run_sweep

    return run_sweep(*demo_config(args.name))


if __name__ == "__main__":
    sys.exit(main())
