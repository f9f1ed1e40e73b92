"""The verbs for a run that may be running elsewhere: `tenfold status`, `tenfold trial stop` and `tenfold trial clone`.
Everything heavy is imported by the verb that needs it."""

import argparse
from typing import Any

PLACE = "runs/NAME, or a URL"
TRIAL = "its name, or the beginning of it"


def add_live_verbs(verbs: Any) -> None:
    """Adds them to the verbs of `tenfold`."""
    text = "how far a run is: what runs, waits and has ended, and the best so far"
    status = verbs.add_parser("status", help=text, description=text)
    status.add_argument("run_folder", help=PLACE)
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    text = "stop or clone a trial of a sweep, also while it runs"
    trial = verbs.add_parser("trial", help=text, description=text)
    _add_actions(trial.add_subparsers(required=True, metavar="stop|clone"))


def _add_actions(actions: Any) -> None:
    text = "end a trial at its next evaluation at the latest; it keeps its scores"
    stop = actions.add_parser("stop", help=text, description=text)
    stop.set_defaults(run=_stop)
    text = "train another candidate: that of a trial with keys changed, judged as all others"
    clone = actions.add_parser("clone", help=text, description=text)
    clone.set_defaults(run=_clone)
    for verb in (stop, clone):
        verb.add_argument("run_folder", help=PLACE)
        verb.add_argument("trial", metavar="TRIAL", help=TRIAL)
    clone.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what is changed, as in sweep.yaml: learning_rate=3e-4; may be given several times",
    )


def _status(args: argparse.Namespace) -> int:
    from orchestration.status import status_lines, status_of

    status = status_of(args.run_folder)
    if args.json:
        from orchestration.show import print_json

        print_json(status)
    else:
        print("\n".join(status_lines(status)))
    return 0


def _stop(args: argparse.Namespace) -> int:
    from orchestration.trial_verb import stop_trial

    return _print(stop_trial(args.run_folder, args.trial))


def _clone(args: argparse.Namespace) -> int:
    from orchestration.clones import parsed_changes
    from orchestration.trial_verb import clone_trial

    return _print(clone_trial(args.run_folder, args.trial, parsed_changes(args.set))[1])


def _print(lines: list[str]) -> int:
    from trainers.terminal import printable

    print("\n".join(map(printable, lines)))
    return 0
