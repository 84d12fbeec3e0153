"""The look of report.html: one page without any address in it but those inside itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, TypeVar

from llmtrain import __version__

Values = Sequence[float | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Trace:
    """One curve or row of bars; `color` is a variable of the style sheet, so it follows light and dark."""

    name: str
    x: Sequence[float] | Sequence[str]
    y: Values
    color: str
    kind: str = "line"
    faint: bool = False
    dots: bool = False
    dash: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart and the card around it; without traces the card says that there is nothing."""

    title: str
    note: str
    traces: Sequence[Trace]
    wide: bool = False
    log: bool = False
    zero: bool = False
    marks: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """{x, text} of vertical lines."""
    across: str = "step"
    """What x is."""

    @property
    def id(self) -> str:
        return "chart-" + re.sub(r"\W+", "-", self.title.lower())

    def card(self) -> str:
        """The card as HTML."""
        kind = "card wide" if self.wide else "card"
        if not self.traces:
            inner = f"<h3>{escape(self.title)}</h3><p class=none>nothing logged</p>"
        else:
            log = f"<button class=log data-chart={self.id} aria-pressed=false>log scale</button>"
            inner = (
                f"<div class=title><h3>{escape(self.title)}</h3>{log if self.log else ''}</div>"
                f"<figcaption>{escape(self.note)}</figcaption><div class=chart id={self.id}></div>"
            )
        return f'<figure class="{kind}">{inner}</figure>'

    def data(self) -> dict[str, Any]:
        """What the page's script draws; names and categories are escaped: plotly reads HTML in them."""
        traces = []
        for trace in self.traces:
            x = [escape(place) if isinstance(place, str) else place for place in trace.x]
            traces.append({**vars(trace), "name": escape(trace.name), "x": x})
        marks = list(self.marks)
        return {"id": self.id, "traces": traces, "zero": self.zero, "marks": marks, "across": self.across}


def number(value: T | None, form: Callable[[T], str]) -> str:
    """A value as `form` writes it; an en dash where there is none."""
    return "\N{EN DASH}" if value is None else form(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A table of HTML cells; the first column and those named in `words` hold words, the others numbers.

    A row whose first cell is "all" is set apart.
    """
    kinds = [" class=text" if name in words else "" for name in head]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = ""
    for row in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True))
        body += f"<tr class=all>{cells}</tr>" if row[0] == "all" else f"<tr>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def page(title: str, body: str, charts: Sequence[Chart]) -> str:
    """The whole document: style, body, the charts' data, plotly.js (once) and the script that draws them.

    `title` is text and escaped here; `body` is HTML.
    """
    from plotly.offline import get_plotlyjs

    # "<" would let a string in the data end the script element; JSON may say it in another way.
    data = json.dumps([chart.data() for chart in charts], allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
<footer>llmtrain {escape(__version__)} · made from the files of the run directory · no network needed</footer>
</main>
<script type="application/json" id="charts">{data}</script>
<script>{get_plotlyjs() if charts else ""}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f5f2; --card: #ffffff; --ink: #1d1f24; --soft: #666b75; --line: #e4e2dc; --accent: #2f6f8f;
  --good: #2c7a4b; --warn: #a86611;
  --c0: #2a7f9e; --c1: #d9772b; --c2: #6a9a3a; --c3: #a3559e; --c4: #c4484f; --c5: #8a7a2a; --c6: #4a62b5;
  --c7: #3f9a86;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1c1f25; --ink: #e8e6e1; --soft: #9aa0ab; --line: #2d313a; --accent: #7cc0de;
    --good: #76c893; --warn: #e0a458;
    --c0: #62bad9; --c1: #f0a060; --c2: #a3cf70; --c3: #d38fce; --c4: #ee8087; --c5: #cdbb66; --c6: #8fa3ee;
    --c7: #77cfba;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 1.5rem; }
header { margin-bottom: 1.5rem; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.4rem); line-height: 1.15; margin: 0; letter-spacing: -0.02em;
     overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 0.75rem; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.35rem 0; }
p.soft { overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.headline { display: flex; flex-wrap: wrap; gap: 0.4rem 0.9rem; align-items: center; }
.chip { border: 1px solid currentColor; border-radius: 1rem; padding: 0.05rem 0.65rem; font-size: 0.8rem;
        white-space: nowrap; color: var(--soft); }
.chip.good { color: var(--good); } .chip.warn { color: var(--warn); }
.tiles { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
         margin: 1.25rem 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem;
        padding: 0.75rem 1rem; }
.tile dt { color: var(--soft); font-size: 0.8rem; }
.tile dd { margin: 0; font-size: 1.4rem; font-weight: 600; letter-spacing: -0.02em; line-height: 1.3; }
.tile small { display: block; color: var(--soft); font-size: 0.78rem; font-weight: 400; letter-spacing: 0;
              line-height: 1.4; }
.cards { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 48rem) { .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 0.75rem; padding: 1rem;
        margin: 0; min-width: 0; }
.card.table { align-self: start; }
.card.wide { grid-column: 1 / -1; }
.cards.uneven { grid-template-columns: minmax(0, 1fr); }
@media (min-width: 64rem) { .cards.uneven { grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); } }
.title { display: flex; justify-content: space-between; align-items: baseline; gap: 1rem; }
.chart { height: 17rem; margin-top: 0.25rem; }
.wide > .chart { height: 22rem; }
.none { color: var(--soft); padding: 2rem 0; text-align: center; }
button.log { font: inherit; font-size: 0.78rem; color: var(--soft); background: none; cursor: pointer;
             border: 1px solid var(--line); border-radius: 1rem; padding: 0.05rem 0.65rem; }
button.log[aria-pressed="true"] { color: var(--accent); border-color: currentColor; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.75rem 0.4rem 0; text-align: right; white-space: nowrap; vertical-align: top;
         border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 0.8rem; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
td.text:last-child { min-width: 14rem; }
.sums { padding: 0.6rem 0; border-bottom: 1px solid var(--line); font-size: 0.9rem; overflow-wrap: anywhere;
        font-variant-numeric: tabular-nums; }
.sums:last-child { border-bottom: none; padding-bottom: 0; }
.sums p { margin: 0.15rem 0; color: var(--soft); } .sums b { color: var(--ink); font-weight: 600; }
tr:last-child td { border-bottom: none; }
tr.all td { font-weight: 600; }
.shares { display: flex; height: 1.1rem; border-radius: 0.4rem; overflow: hidden; margin-bottom: 0.75rem; }
.dot { display: inline-block; width: 0.65em; height: 0.65em; border-radius: 50%; margin-right: 0.5em; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
      font: 0.85rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre + pre { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; }
pre b { color: var(--accent); font-weight: 600; }
.counts { display: flex; flex-wrap: wrap; gap: 0.4rem 1rem; list-style: none; margin: 0 0 0.75rem; padding: 0;
          color: var(--soft); font-size: 0.875rem; font-variant-numeric: tabular-nums; }
.tall > .scroll { max-height: 32rem; overflow-y: auto; }
.tall th { position: sticky; top: 0; background: var(--card); }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
details > * + * { margin-top: 0.75rem; }
footer { color: var(--soft); font-size: 0.8rem; margin: 2.5rem 0 0; border-top: 1px solid var(--line);
         padding-top: 1rem; }
@media (max-width: 40rem) {
  main { padding: 1.25rem 0.75rem; }
  .tiles { grid-template-columns: repeat(2, 1fr); gap: 0.5rem; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .card { padding: 0.75rem; }
  .tall td:first-child { white-space: normal; min-width: 6.75rem; }
  .chart, .wide > .chart { height: 15rem; }
}
@media print { .card, .tile { break-inside: avoid; } button.log { display: none; } }
"""

SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const logScale = new Set();
const touch = matchMedia("(pointer: coarse)").matches;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function trace(t) {
  const c = color(t.color);
  if (t.kind === "bar") {
    return {type: "bar", x: t.x, y: t.y, name: t.name, marker: {color: c}, opacity: t.faint ? 0.4 : 1,
            hovertemplate: "%{y:.4~g}<extra>" + t.name + "</extra>"};
  }
  const mode = t.dots && t.x.length <= 50 ? "lines+markers" : "lines";
  return {type: "scatter", mode: mode, x: t.x, y: t.y, name: t.name, showlegend: !t.dash,
          line: {color: c, width: t.faint || t.dash ? 1.2 : 2, dash: t.dash ? "dot" : "solid"},
          marker: {color: c, size: 6},
          opacity: t.faint ? 0.85 : 1, connectgaps: t.dots,
          hovertemplate: "%{y:.5~g}<extra>" + t.name + "</extra>"};
}

function axis(title, more) {
  return Object.assign({title: {text: title, font: {size: 12, color: color("soft")}, standoff: 8},
    gridcolor: color("line"), zeroline: false, linecolor: color("line"), automargin: true,
    tickfont: {color: color("soft")}}, more);
}

function note(mark, i, chart) {  // below the one before, and never beyond the curves
  const xs = chart.traces.flatMap(t => t.x), low = Math.min(...xs), high = Math.max(...xs);
  const right = 2 * mark.x > low + high;
  return {x: mark.x, yref: "paper", y: 1 - 0.07 * (i % 5), text: right ? mark.text.trim() + " " : mark.text,
          showarrow: false, xanchor: right ? "right" : "left", yanchor: "top",
          font: {size: 11, color: color("soft")}};
}

function layout(chart) {
  const bars = chart.traces.some(t => t.kind === "bar");
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 8, r: 12, t: 14, b: 8},
    font: {family: "inherit", color: color("ink"), size: 12}, barmode: "group", bargap: 0.35,
    hovermode: bars ? "x" : "x unified", dragmode: touch ? false : "zoom",
    hoverlabel: {bgcolor: color("card"), bordercolor: color("line"), font: {color: color("ink")}},
    showlegend: chart.traces.length > 1,
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: {color: color("soft")}},
    xaxis: bars ? axis("", {type: "category", showgrid: false})
                : axis(chart.across, {showgrid: false, hoverformat: ",.6~f"}),
    yaxis: axis("", Object.assign({type: logScale.has(chart.id) ? "log" : "linear"},
                                       chart.zero ? {rangemode: "tozero"} : {})),
    shapes: chart.marks.map(m => ({type: "line", x0: m.x, x1: m.x, yref: "paper", y0: 0, y1: 1,
      line: {color: color("soft"), width: 1, dash: "dot"}})),
    annotations: chart.marks.map((m, i) => note(m, i, chart))
  };
}

function draw() {
  for (const chart of charts) {
    Plotly.react(chart.id, chart.traces.map(trace), layout(chart),
                 {responsive: true, displaylogo: false, displayModeBar: false});
  }
}

for (const button of document.querySelectorAll("button.log")) {
  button.addEventListener("click", () => {
    const id = button.dataset.chart, on = !logScale.has(id);
    on ? logScale.add(id) : logScale.delete(id);
    button.setAttribute("aria-pressed", on);
    draw();
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
"""
