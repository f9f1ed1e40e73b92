"""`tenfold schema` and `tenfold init`: what helps to write a sweep.yaml. Imports neither torch nor ray."""

import argparse
from pathlib import Path
from typing import Any

FILES = ("sweep", "study")


def add_config_verbs(verbs: Any) -> None:
    """The two verbs and their arguments."""
    text = "the JSON Schema of sweep.yaml (or study.yaml), for editors"
    schema = verbs.add_parser("schema", help=text, description=text)
    schema.add_argument(
        "file", nargs="?", choices=FILES, default="sweep", help="of which file (default: sweep)"
    )
    schema.set_defaults(run=_schema)
    text = "a commented sweep.yaml with the doctrine's values for a model and data"
    init = verbs.add_parser("init", help=text, description=text)
    init.add_argument("model", metavar="MODEL", help="folder or hub id")
    init.add_argument("data", metavar="DATA", help="file, folder or hub id")
    init.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("sweep.yaml"),
        metavar="FILE",
        help="a new file (default: sweep.yaml)",
    )
    init.set_defaults(run=_init)


def _schema(args: argparse.Namespace) -> int:
    from orchestration.schema import study_schema, sweep_schema
    from orchestration.show import print_json

    print_json(study_schema() if args.file == "study" else sweep_schema())
    return 0


def _init(args: argparse.Namespace) -> int:
    from orchestration.init_file import write_init
    from trainers.terminal import printable

    written = write_init(args.model, args.data, args.output)
    print(printable(f"written: {', '.join(map(str, written))}"))
    print(printable(f"next: tenfold check {args.output}; tenfold plan {args.output}"))
    return 0
