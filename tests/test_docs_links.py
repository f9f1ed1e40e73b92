"""Every relative link and anchor of README and docs leads somewhere, and every page is in the index."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "README.md",
)
COMING: frozenset[str] = frozenset()
"""Pages that another change brings. Empty once they are there."""
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"^\[[^\]]+\]: (\S+)$", re.MULTILINE)


def prose(path: Path) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


def links(path: Path) -> list[str]:
    """What a page links to on this disk."""
    text = prose(path)
    found = [*LINK.findall(text), *REFERENCE.findall(text)]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def problem_of(path: Path, link: str) -> str | None:
    """Why a link leads nowhere."""
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.is_relative_to(ROOT):
        return f"{link} leads out of the repository"
    if str(target.relative_to(ROOT)) in COMING:
        return None
    if not target.exists():
        return f"{link} leads to nothing"
    if anchor and anchor not in anchors(target):
        return (
            f"{link} names no heading of {target.name}; it has {', '.join(sorted(anchors(target)))}"
        )
    return None


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_docs_links_of_a_page_lead_somewhere(path):
    problems = [problem_of(path, link) for link in links(path)]
    assert [problem for problem in problems if problem] == []


def test_docs_links_are_found_in_the_readme():
    found = links(ROOT / "README.md")
    assert len(found) > 15
    assert problem_of(ROOT / "README.md", "docs/none.md") == "docs/none.md leads to nothing"
    assert problem_of(ROOT / "README.md", "docs/rl.md#none") is not None
    assert problem_of(ROOT / "README.md", "../x") is not None


def test_docs_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    assert [name_of(path) for path in PAGES if path not in listed | {index}] == []


def test_docs_pages_that_are_coming_are_not_there_yet():
    assert [name for name in COMING if (ROOT / name).exists()] == []
