"""`tenfold schema` and `tenfold init`: what helps to write a sweep.yaml. Imports neither torch nor ray."""

import argparse
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


def _schema(args: argparse.Namespace) -> int:
    from orchestration.schema import study_schema, sweep_schema
    from orchestration.show import print_json

    print_json(study_schema() if args.file == "study" else sweep_schema())
    return 0
