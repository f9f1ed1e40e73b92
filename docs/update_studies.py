"""Puts finished studies into docs/studies and their pictures into docs/studies.md, "What we measured".

python docs/update_studies.py runs/lr-ratio-laptop ...      (needs Chromium for the pictures)

Of each study docs/studies/NAME gets study.yaml, results.json, results.csv, report.html and picture.png.
The reports share one copy of plotly's script (docs/studies/plotly.min.js). Without arguments the page's
section is written again from what is there.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from update_readme import CHROMIUM, CHROMIUM_FLAGS, ROOT

from orchestration.page import Card, charts, frame
from orchestration.studies.charts import picture
from orchestration.studies.config import KINDS
from orchestration.studies.report import render
from search_spaces import doctrine
from trainers.paths import read_json

STUDIES = ROOT / "docs" / "studies"
PAGE = ROOT / "docs" / "studies.md"
SCRIPT = "plotly.min.js"
COPIED = ("study.yaml", "results.json", "results.csv")


def add(run: Path) -> None:
    results = read_json(run / "results.json")
    if results["status"] != "complete":
        sys.exit(f"{run}: must be a complete study, it is {results['status']}; run it to its end")
    target = STUDIES / run.name
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).exists():
            shutil.copyfile(run / name, target / name)
    page = render(results).replace(get_plotlyjs(), "")
    page = page.replace("</head>", f'<script src="../{SCRIPT}"></script></head>', 1)
    (target / "report.html").write_text(page)
    (STUDIES / SCRIPT).write_text(get_plotlyjs())
    take_picture(results, target / "picture.png")


def take_picture(results: dict[str, Any], target: Path) -> None:
    if CHROMIUM is None:
        sys.exit("docs/update_studies.py needs chromium on the PATH for the pictures")
    figure = picture(results)
    if figure is None:
        sys.exit(f"{target.parent.name}: a study must have a figure with values, it has none")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(frame(results["name"], charts([Card(figure=figure, is_wide=True)])))
        flags = [f"--user-data-dir={folder}/profile", "--window-size=1000,680"]
        command = [CHROMIUM, *CHROMIUM_FLAGS, *flags, f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def section() -> str:
    """The page's section: a picture and a line for each study."""
    found = [
        read_json(path) | {"folder": path.parent.name} for path in STUDIES.glob("*/results.json")
    ]
    lines = []
    for results in sorted(found, key=lambda each: (KINDS.index(each["kind"]), each["folder"])):
        folder, verdict = f"studies/{results['folder']}", results["verdict"]
        lines += [
            f"**{results['folder']}**: {verdict['status']}. {verdict['sentence']} "
            f"([report]({folder}/report.html), with the command; {results['machine']})",
            f"![{results['folder']}]({folder}/picture.png)",
        ]
    return "\n\n".join([ratio_table(found), *lines])


def ratio_table(found: list[dict[str, Any]]) -> str:
    """The measured ratios of all lr-ratio studies beside each other, and how often each law holds."""
    root = f"{doctrine.LR_RATIO_ROOT.value} sqrt(hidden / alpha)"
    rows = [
        f"| hidden | parameters | LoRA arm | best LR over FullFT's (95%) | 10 | hidden / (2 alpha) | {root} |",
        "| --: | --: | --- | --: | --- | --- | --- |",
    ]
    all_held = []
    for model, arm, measured, laws in ratios(found):
        held = [measured["low"] <= law <= measured["high"] for law in laws]
        all_held.append(held)
        cells = [
            f"{law:.2g}: {'inside' if h else 'outside'}" for law, h in zip(laws, held, strict=True)
        ]
        rows.append(
            f"| {model['hidden_size']} | {model['num_params'] / 1e6:.1f}M | {arm} | {measured['measured']:.3g} "
            f"({measured['low']:.3g} to {measured['high']:.3g}) | {' | '.join(cells)} |"
        )
    names = ("10", "hidden / (2 alpha)", root)
    counts = [
        f"{name} lies in {sum(held[law] for held in all_held)}" for law, name in enumerate(names)
    ]
    said = (
        f"Of {len(all_held)} measured intervals, {', '.join(counts)}. The last law is Tenfold's own: read off "
        "hidden 192, 256 and 1024, and written down before hidden 512 was measured."
    )
    return "\n".join([said, "", *rows])


def ratios(
    found: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], str, dict[str, Any], list[float]]]:
    """(model, arm's label, a claim with the measured ratio, what the laws say) of every measured ratio."""
    studies = [each for each in found if each["kind"] == "lr-ratio"]
    for results in sorted(studies, key=lambda each: each["model"]["hidden_size"]):
        alphas = {arm["label"]: arm["lora_alpha"] for arm in results["arms"]}
        hidden = results["model"]["hidden_size"]
        for label in dict.fromkeys(claim["arm"] for claim in results["claims"]):
            claims = [claim for claim in results["claims"] if claim["arm"] == label]
            if claims[0]["measured"] is not None:
                told = [c["predicted"] for c in claims if "short" not in c["name"]]
                root = doctrine.root_lr_ratio(hidden, alphas[label])
                yield results["model"], label, claims[0], [*told, root]


def main() -> None:
    for name in sys.argv[1:]:
        add(Path(name))
    block = f"<!-- studies -->\n{section()}\n<!-- end studies -->"
    text, count = re.subn(
        r"<!-- studies -->.*?<!-- end studies -->",
        lambda _: block,
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, "docs/studies.md must hold the two markers once"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
