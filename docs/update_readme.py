"""Runs `make demo` in a fresh run folder and puts its output and the report's pictures, light and dark, into docs.

python docs/update_readme.py              (needs Chromium for the pictures)
python docs/update_readme.py REPORT.html  takes the pictures alone, of a report that is there

Of the output the README shows the essential lines: the plan, what is discarded, and the results.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
]
PLANNED = re.compile(r"demo: \d+ candidates planned")
RESULTS = re.compile(r"demo: \d+ trials, ")
ESSENTIAL = re.compile(r"demo: |  discarded: ")
LEFT_OUT = "..."


PICTURES = {"report.png": [], "report-dark.png": ["--blink-settings=preferredColorScheme=0"]}
"""Pictures in docs/, and how Chromium is asked for their colour scheme."""


def pictures(report: Path) -> None:
    for name, scheme in PICTURES.items():
        picture(report, ROOT / "docs" / name, scheme)


def picture(report: Path, target: Path, scheme: list[str]) -> None:
    if CHROMIUM is None:
        sys.exit("docs/update_readme.py needs chromium on the PATH for the report's pictures")
    with tempfile.TemporaryDirectory() as profile:
        size = ["--window-size=1100,1280", f"--user-data-dir={profile}", f"--screenshot={target}"]
        subprocess.run(
            [CHROMIUM, *CHROMIUM_FLAGS, *scheme, *size, report.as_uri()],
            check=True,
            capture_output=True,
        )


def essential(output: str) -> str:
    """The lines of the demo's output that say what it does; what is left out between them stands as "...".

    Raises: ValueError: the output has no plan or no results, which the README must show.
    """
    kept: list[str] = []
    is_result = False
    for line in output.strip().splitlines():
        is_result = is_result or bool(RESULTS.match(line))
        if is_result or ESSENTIAL.match(line):
            kept.append(line)
        elif kept and kept[-1] != LEFT_OUT:
            kept.append(LEFT_OUT)
    if not kept or not PLANNED.match(kept[0]) or not is_result:
        raise ValueError(f"the demo must print its plan and its results, it printed:\n{output}")
    return "\n".join(kept)


def block_of(output: str) -> str:
    """The README's block between the markers."""
    return f"<!-- demo output -->\n```\n$ make demo\n{essential(output)}\n```\n<!-- end -->"


def main() -> None:
    if len(sys.argv) > 1:
        pictures(Path(sys.argv[1]).resolve())
        return
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found = re.search(r"^report: (.*)$", done.stdout, flags=re.MULTILINE)
    assert found, done.stdout
    pictures((ROOT / found[1]).resolve())
    readme = ROOT / "README.md"
    block = block_of(done.stdout)
    text, count = re.subn(
        r"<!-- demo output.*?<!-- end -->", lambda _: block, readme.read_text(), flags=re.DOTALL
    )
    assert count == 1, "the README must hold the two markers once"
    readme.write_text(text)


if __name__ == "__main__":
    main()
