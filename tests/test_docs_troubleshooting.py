"""docs/troubleshooting.md quotes error lines: each stands in the source, and each line of the source has an entry."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PACKAGES = ("orchestration", "trainers", "search_spaces", "cluster")
ANY = "\0"
"""Stands in a template for what is filled in."""
GENERIC = ("...must ...",)
"""Quotes that tell how to read a line, and nothing of a line's own."""
OUR_OWN = {
    "find needs a space or candidates",
    "a sharded base is never kept dequantized",
    "a sharded base needs",
    "a LoRA needs a Linear",
    "add_cross_attention has no shape reader",
    "lr_prior 'user' needs full_ft_learning_rate",
    "is saved, but nothing of that name is trained",
    "target_modules must reach",
    "this run is not driven by now",
    "no new workers:",
}
"""Raised between our own functions: a user's input does not lead there."""


def template_of(node: ast.AST) -> str:
    """The text that an expression gives, with ANY for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template_of(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template_of(node.left) + template_of(node.right)
    return ANY


@cache
def trees() -> dict[str, ast.Module]:
    """Module path -> its syntax, of all that is ours and no data."""
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if "assets" not in path.parts
    }


@cache
def texts() -> tuple[str, ...]:
    """Every text of the source, with ANY for what is filled in."""
    nodes = (node for tree in trees().values() for node in ast.walk(tree))
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return tuple({template_of(node) for node in nodes if isinstance(node, kinds)} - {ANY})


@cache
def user_errors() -> frozenset[str]:
    """Names of ValueError and of what is derived from it: what ends a command with exit code 2."""
    found = {"ValueError"}
    classes = [node for tree in trees().values() for node in ast.walk(tree)]
    for _ in range(3):  # a child of a child
        found |= {
            node.name
            for node in classes
            if isinstance(node, ast.ClassDef) and found & {ast.unparse(base) for base in node.bases}
        }
    return frozenset(found)


@cache
def raised() -> tuple[tuple[str, str, str], ...]:
    """(place, class, template) of every error for a user that has words of its own."""
    return tuple(
        (f"{path}:{node.lineno}", name, text)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        if (name := ast.unparse(node.exc.func)) in user_errors()
        if len(re.findall(r"[a-z]", text := template_of(node.exc.args[0]))) >= 8
    )


def quotes() -> list[str]:
    """The first cells of the page's tables that quote a line."""
    return re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)


@cache
def pattern_of(quote: str) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """The parts of a quote, and how a text begins that has them."""
    parts = tuple(quote.split("..."))
    return parts, re.compile(r"[\s\S]*?".join(map(re.escape, parts)))


def is_of(quote: str, template: str) -> bool:
    """Whether a text of the source begins as a quote does, where ... stands for anything."""
    parts, pattern = pattern_of(quote)
    return all(part in template for part in parts) and pattern.match(template) is not None


def test_troubleshooting_quotes_at_least_a_hundred_lines_none_twice():
    assert len(quotes()) > 100
    assert len(quotes()) == len(set(quotes()))


@pytest.mark.parametrize("quote", quotes())
def test_troubleshooting_quoted_line_stands_in_the_source(quote):
    assert any(is_of(quote, text) for text in texts())


def test_troubleshooting_has_an_entry_for_every_error_line():
    missing = [
        f"{place}: {text.replace(ANY, '...')}"
        for place, _, text in raised()
        if not any(part in text for part in OUR_OWN)
        and not any(is_of(quote, text) for quote in quotes())
    ]
    assert missing == []


def test_troubleshooting_has_an_own_entry_for_every_class_of_errors():
    own = [quote for quote in quotes() if quote not in GENERIC]
    found = {name for _, name, text in raised() if any(is_of(quote, text) for quote in own)}
    assert {name for _, name, _ in raised()} - found == set()


def test_troubleshooting_names_what_is_our_own_only_where_it_is_raised():
    stale = [part for part in OUR_OWN if not any(part in text for _, _, text in raised())]
    assert stale == []


def test_troubleshooting_explains_every_pitfall():
    codes = {
        keyword.value.value
        for node in ast.walk(trees()["search_spaces/pitfalls.py"])
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "code" and isinstance(keyword.value, ast.Constant)
    }
    assert len(codes) >= 12
    assert codes == set(re.findall(r"^\| ([a-z_]+) \|", PAGE, flags=re.MULTILINE)) - {
        "line",
        "code",
    }


def test_troubleshooting_names_every_variable_that_a_user_may_set_for_waiting():
    waits = {text for text in texts() if re.fullmatch(r"TENFOLD_\w+_S", text)}
    assert waits
    assert waits <= set(re.findall(r"TENFOLD_\w+", PAGE))
