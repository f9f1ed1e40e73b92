"""Runs `make demo` in a fresh run folder and puts its output and the report's pictures, light and dark, into docs.

python docs/update_readme.py              (needs Chromium for the pictures)
python docs/update_readme.py REPORT.html  takes the pictures alone, of a report that is there
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
    block = f"<!-- demo output -->\n```\n$ make demo\n{done.stdout.strip()}\n```\n<!-- end -->"
    text = re.sub(
        r"<!-- demo output.*?<!-- end -->", lambda _: block, readme.read_text(), flags=re.DOTALL
    )
    readme.write_text(text)


if __name__ == "__main__":
    main()
