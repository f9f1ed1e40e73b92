"""The frame that our self-contained HTML pages share: style, sections, tables, tiles and charts."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go

MOST_ROWS = 20
"""Rows that a long table shows at once."""
STYLE = """
:root { color-scheme: light dark; --fg: #1c2330; --muted: #5b6575; --line: #d9dee6; --bg: #ffffff;
  --card: #f6f8fa; --good: #1a7f37; --bad: #b42318; --accent: #0b62c4; --warn: #8a5a00; }
@media screen and (prefers-color-scheme: dark) { :root { --fg: #e6e9ef; --muted: #9aa4b5; --line: #333b49;
  --bg: #14181f; --card: #1c222c; --good: #4ac26b; --bad: #ff8a7a; --accent: #6cb2ff; --warn: #e3b341; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--fg);
  background: var(--bg); margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p, li { max-width: 78ch; } .muted { color: var(--muted); } .good { color: var(--good); }
.bad { color: var(--bad); } .note { color: var(--muted); font-size: 13px; margin: 6px 0 4px; }
.box { background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--muted);
  border-radius: 8px; padding: 12px 18px; margin: 18px 0; }
.box p { margin: 6px 0; max-width: none; } .box p.lead { font-size: 18px; line-height: 1.4; }
.box b.label { text-transform: uppercase; letter-spacing: 0.06em; font-size: 12.5px; }
.box.good { border-left-color: var(--good); } .box.bad { border-left-color: var(--bad); }
.box.warn { border-left-color: var(--warn); } .box.accent { border-left-color: var(--accent); }
.box.good, .box.bad, .box.warn, .box.accent { color: var(--fg); }
.box.good b.label { color: var(--good); } .box.bad b.label { color: var(--bad); }
.box.warn b.label { color: var(--warn); } .box.accent b.label { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 20px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; } .tile span { color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.num, th.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
tr.chosen td { background: var(--card); font-weight: 600; }
tr:is(.good, .bad) { color: inherit; } tr.good td:first-child { box-shadow: inset 3px 0 var(--good); }
tr.bad td:first-child { box-shadow: inset 3px 0 var(--bad); }
tr.warn td:first-child { box-shadow: inset 3px 0 var(--warn); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; overflow-x: auto; overflow-wrap: normal; }
pre.copy { user-select: all; -webkit-user-select: all; }
summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 12px; }
.chart { min-width: 0; overflow: hidden; border: 1px solid var(--line); border-radius: 8px; padding: 6px; margin: 0; }
.chart figcaption { font-weight: 600; padding: 6px 8px 0; } .chart .note { padding: 0 8px; }
.chart :is(.infolayer, .xtick, .ytick) text { fill: var(--fg) !important; }
.chart .annotation rect.bg { fill: var(--bg) !important; fill-opacity: 0.75 !important; }
@media screen and (prefers-color-scheme: dark) {
  .chart :is(.scatterlayer, .legend .layers) { filter: brightness(1.3); } }
.wide { grid-column: 1 / -1; }
@media print { body { max-width: none; padding: 0; } .chart, .box, .tile, tr { break-inside: avoid; }
  .charts { display: block; } .chart { margin-bottom: 12px; zoom: 0.75; } .scroll, pre { overflow: visible; }
  pre, td.name { white-space: pre-wrap; } td.name { overflow-wrap: anywhere; min-width: 10em; }
  table { font-size: 9px; }
  th { white-space: normal; } th, td { padding: 3px 4px; } h2 { break-after: avoid; }
  .box, .tile { print-color-adjust: exact; } }
"""

# The first chart is drawn before the grid has its other cells: each takes its cell's size at the end.
# A printed page is narrower than the window, and charts on it are smaller (zoom), so that two go on one.
SCRIPT = """
const plots = () => document.querySelectorAll('.js-plotly-plot');
const resize = () => { for (const plot of plots()) Plotly.Plots.resize(plot); };
resize();
addEventListener('beforeprint', () => {
  for (const folded of document.querySelectorAll('details')) folded.open = true;
  for (const plot of plots()) Plotly.relayout(plot, {width: 880});
});
addEventListener('afterprint', () => {
  for (const plot of plots()) Plotly.relayout(plot, {width: null, autosize: true});
  resize();
});
"""


Header = tuple[str, bool | Literal["name"]]
"""Title of a column, and whether it holds numbers, or names that are kept on a line."""
CELL = {False: "", True: " class=num", "name": " class=name"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A chart with what is written around it."""

    figure: go.Figure
    heading: str = ""
    note: str = ""
    """What the reader must know of the picture, under it."""
    is_wide: bool = False
    """Whether it takes the page's whole width."""


def frame(title: str, body: str) -> str:
    """A whole page. body: markup."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{body}</body></html>\n'
    )


def section(title: str, body: str) -> str:
    """A titled part of a page. body: markup."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """The page's few important numbers. items: (number, what it is)."""
    boxes = "".join(
        f'<div class="tile"><b>{html.escape(number)}</b><span>{html.escape(name)}</span></div>'
        for number, name in items
    )
    return f'<div class="tiles">{boxes}</div>'


def table(
    headers: Sequence[Header],
    rows: Sequence[tuple[str, Sequence[str]]],
    *,
    note: str = "",
) -> str:
    """A table in a container of its own that scrolls when it is too wide.

    Args: rows: (css class, cells). note: a line under it.
    """
    head = "".join(f"<th{CELL[kind]}>{html.escape(title)}</th>" for title, kind in headers)
    body = "".join(
        f"<tr class='{css}'>"
        + "".join(
            f"<td{CELL[kind]}>{html.escape(cell)}</td>"
            for cell, (_, kind) in zip(cells, headers, strict=True)
        )
        + "</tr>"
        for css, cells in rows
    )
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{below}"
    )


def folded_table(headers: Sequence[Header], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table whose rows after the first MOST_ROWS are folded away; a click, or a printer, shows them."""
    first, rest = rows[:MOST_ROWS], rows[MOST_ROWS:]
    if len(rest) <= MOST_ROWS // 4:
        return table(headers, rows)
    summary = f"<summary>{len(rest):,} more</summary>"
    return f"{table(headers, first)}<details>{summary}{table(headers, rest)}</details>"


def charts(cards: Sequence[Card]) -> str:
    """Charts in a grid. plotly's script goes in once, whole: the page must work without a network."""
    if not cards:
        return ""
    drawn = "".join(_card(card, index) for index, card in enumerate(cards))
    return f'<div class="charts">{drawn}</div><script>{SCRIPT}</script>'


def _card(card: Card, index: int) -> str:
    body = card.figure.to_html(
        full_html=False,
        include_plotlyjs=index == 0,
        div_id=f"chart-{index}",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    css = "chart wide" if card.is_wide else "chart"
    heading = f"<figcaption>{html.escape(card.heading)}</figcaption>" if card.heading else ""
    note = f'<p class="note">{html.escape(card.note)}</p>' if card.note else ""
    return f'<figure class="{css}">{heading}{body}{note}</figure>'
