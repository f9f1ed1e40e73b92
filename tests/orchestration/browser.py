"""Pages as a browser makes them: headless Chromium, where there is one."""

import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--virtual-time-budget=8000",
)


def dom_of(page: Path) -> str:
    """The document after the page's scripts ran."""
    return opened(page)[0]


def opened(page: Path, *, dark: bool = False) -> tuple[str, list[str]]:
    """The document after the page's scripts ran, and what it wrote to the console."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = _ran(page, *scheme, "--dump-dom")
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def num_printed_pages(page: Path) -> int:
    """On how many sheets a page is printed."""
    sheets = page.with_suffix(".pdf")
    _ran(page, f"--print-to-pdf={sheets}")
    return len(re.findall(rb"/Type\s*/Page\b", sheets.read_bytes()))


def _ran(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Chromium on a page, to its end."""
    profile = f"--user-data-dir={page.parent / 'chrome'}"
    command = [str(CHROMIUM), *OPTIONS, profile, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
