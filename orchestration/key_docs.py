"""What config.py says of its keys: the line below each, and the heading above the group that it stands in."""

import ast
import inspect
import re
from dataclasses import dataclass

from pydantic import BaseModel

HEADING = re.compile(r"    # (.+)")
"""A comment of the class itself: what the fields below it are about."""


@dataclass(frozen=True, kw_only=True)
class KeyDoc:
    """A key as people are told of it.

    Attributes:
        heading: of its group; empty where the class has none.
        meaning: empty where nothing stands below the field.
        owner: name of the class that has the field.
    """

    heading: str
    meaning: str
    owner: str


def key_docs(model: type[BaseModel]) -> dict[str, KeyDoc]:
    """Key -> what is said of it, in the order of the source; a subclass's word is the last."""
    found: dict[str, KeyDoc] = {}
    for kind in reversed(model.__mro__):
        if kind is not BaseModel and issubclass(kind, BaseModel):
            found |= _own_docs(kind)
    return found


def _own_docs(model: type[BaseModel]) -> dict[str, KeyDoc]:
    # pydantic's use_attribute_docstrings would read the source at every import of config.py.
    source = inspect.getsource(model)
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    headings = _headings(source)
    found: dict[str, KeyDoc] = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            heading = next((text for line, text in headings if line < node.lineno), "")
            name = node.target.id
            found[name] = KeyDoc(heading=heading, meaning=_text(after), owner=model.__name__)
    return found


def _headings(source: str) -> list[tuple[int, str]]:
    """(line, text) of each, the last first."""
    lines = enumerate(source.splitlines(), start=1)
    found = [(number, match[1]) for number, line in lines if (match := HEADING.fullmatch(line))]
    return found[::-1]


def _text(node: ast.stmt | None) -> str:
    value = node.value if isinstance(node, ast.Expr) else None
    text = value.value if isinstance(value, ast.Constant) else None
    return " ".join(text.split()) if isinstance(text, str) else ""
