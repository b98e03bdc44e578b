"""The style sheet of ``report.html``: system fonts, two themes, one column on a phone."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcf9; --ink: #1f1d1a; --soft: #5f5b53; --faint: #8a857b; --rule: #dcd8ce; --wash: #f4f1ea;
  --right: #22713f; --right-wash: #e4f1e7; --wrong: #ab3425; --wrong-wash: #f9e6e2;
  --c0: #22577a; --c1: #b5651d; --c2: #4d7c4a; --c3: #8a4a7d; --c4: #7a6a2f;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171715; --ink: #e9e6df; --soft: #b0aba0; --faint: #8f8a80; --rule: #383631; --wash: #211f1d;
    --right: #7cc796; --right-wash: #1c3225; --wrong: #ee9485; --wrong-wash: #3b211c;
    --c0: #7fb6da; --c1: #e0a061; --c2: #93c18e; --c3: #cf98c3; --c4: #cdbd7a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  font-variant-numeric: tabular-nums lining-nums;
}
main, header, footer { max-width: 69rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
header { padding-top: clamp(2rem, 6vw, 4rem); }
h1, h2, h3 {
  font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance;
  overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.9rem, 5vw, 2.7rem); margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.45rem; margin: 0 0 1.4rem; padding-top: .8rem; border-top: 1px solid var(--ink); }
h3 { font-size: 1.12rem; margin: 2rem 0 .6rem; }
h4 { font-size: .82rem; font-weight: 600; color: var(--soft); margin: 0 0 .9rem; }
p { max-width: 42rem; margin: 0 0 .9rem; }
section { margin-top: clamp(3rem, 7vw, 4.5rem); }
a { color: inherit; text-decoration-color: var(--faint); text-underline-offset: .2em; }
nav {
  margin-top: 1.4rem; display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; font-size: .9rem;
  color: var(--soft);
}
nav a { padding: .25rem 0; }
.facts {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 1.1rem 2.2rem; margin: 2rem 0 0;
}
.facts dt, .pairs dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.02rem; overflow-wrap: anywhere; }
.cards {
  list-style: none; margin: 2.2rem 1px 1px 0; padding: 0; display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(9.75rem, 100%), 1fr));
}
.cards li {
  border: 1px solid var(--rule); margin: 0 -1px -1px 0; padding: 1.1rem 1.2rem 1rem; display: flex;
  flex-direction: column;
}
.cards .what { font-size: .82rem; color: var(--soft); line-height: 1.4; }
.cards .of { font-weight: 600; color: var(--ink); display: block; }
.cards .value { font: 600 2.1rem/1.15 var(--serif); margin: auto 0 .2rem; padding-top: .7rem; }
.cards .value.failed { font-size: 1.3rem; color: var(--wrong); }
.cards .against { font-size: .82rem; color: var(--soft); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  gap: 2rem 2.2rem;
}
.chart { margin: 0; min-width: 0; }
.chart figcaption {
  display: flex; justify-content: space-between; gap: 1rem; font-size: .86rem; font-weight: 600;
}
.chart figcaption span:first-child { overflow-wrap: anywhere; }
.chart .newest { font-weight: 400; color: var(--soft); white-space: nowrap; }
.chart svg { display: block; width: 100%; height: auto; margin-top: .35rem; overflow: visible; }
.chart text { font: 10.5px var(--sans); fill: var(--soft); }
.chart .grid { stroke: var(--rule); stroke-width: .75; }
.chart .axis, .chart .tick { stroke: var(--faint); stroke-width: .75; }
.chart .reference { stroke: var(--faint); stroke-dasharray: 3 3; }
.chart .series path { fill: none; stroke: currentColor; stroke-linejoin: round; stroke-linecap: round; }
.chart .series .line { stroke-width: 1.7; }
.chart .series .raw { stroke-width: .8; opacity: .42; }
.chart circle { fill: currentColor; stroke: var(--paper); stroke-width: .8; }
.s0 { color: var(--c0); }
.s1 { color: var(--c1); }
.s2 { color: var(--c2); }
.s3 { color: var(--c3); }
.s4 { color: var(--c4); }
.chart text.label { fill: currentColor; font-weight: 600; }
.warning, .empty { font-size: .82rem; color: var(--soft); margin: .3rem 0 0; }
.failure {
  border-left: 3px solid var(--wrong); background: var(--wrong-wash); padding: .7rem 1rem;
  overflow-wrap: anywhere;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; max-width: 42rem; font-size: .94rem; }
th {
  text-align: left; font-weight: 600; font-size: .82rem; color: var(--soft);
  border-bottom: 1px solid var(--faint);
}
th, td { padding: .42rem 1.2rem .42rem 0; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
td { border-bottom: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
tbody th { font-weight: 400; font-size: inherit; color: inherit; border-bottom: 1px solid var(--rule); }
.quiet { color: var(--faint); }
.directions {
  display: grid; gap: 2.2rem 3.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
}
.directions > div { min-width: 0; }
.examples { list-style: none; margin: 0; padding: 0; }
.example {
  display: grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: .9rem 1.2rem; padding: .95rem 0;
  border-top: 1px solid var(--rule);
}
.query p, .query .caption {
  font: italic .95rem/1.35 var(--serif); margin: 0 0 .45rem; overflow-wrap: anywhere;
}
.query img { width: 5rem; margin-bottom: .4rem; }
img {
  display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border: 1px solid var(--rule); border-radius: 3px;
}
.results { list-style: none; margin: 0; padding: 0; }
.results.pictures {
  display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .55rem; align-items: start;
}
.pictures li { font-size: .8rem; text-align: center; }
.pictures .right img { border-color: transparent; box-shadow: 0 0 0 2.5px var(--right); }
.pictures .caption { font-size: .72rem; line-height: 1.25; color: var(--soft); overflow-wrap: anywhere; }
.texts li {
  display: grid; grid-template-columns: 3.6rem minmax(0, 1fr); gap: .6rem; padding: .12rem .4rem;
  font-size: .88rem; line-height: 1.4; overflow-wrap: anywhere;
}
.texts .right { background: var(--right-wash); border-radius: 3px; }
.mark { white-space: nowrap; }
.mark svg { width: .72em; height: .72em; margin-right: .3em; vertical-align: -.02em; overflow: visible; }
.mark path {
  fill: none; stroke: currentColor; stroke-width: 2; stroke-linecap: round; stroke-linejoin: round;
}
.mark.right { color: var(--right); font-weight: 600; }
.mark.wrong { color: var(--soft); }
.mark.wrong svg { color: var(--wrong); }
.verdict { font-size: .8rem; }
.pictures .mark { display: block; margin-top: .3rem; }
.spoken {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}
details > summary { cursor: pointer; }
details.more { margin-top: .4rem; }
details.more > summary { font-size: .86rem; color: var(--soft); padding: .5rem 0; }
.tree { font: .86rem/1.7 var(--mono); }
.tree details { border-left: 1px solid var(--rule); padding-left: .8rem; margin-left: .25rem; }
.tree > details { border-left: 0; padding-left: 0; margin-left: 0; }
.tree div { padding-left: 1.05rem; overflow-wrap: anywhere; }
.tree > div { padding-left: 0; } .tree .key { color: var(--soft); } .tree .type { color: var(--c0); }
.columns {
  display: grid; gap: 2rem 3.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(16.5rem, 100%), 1fr));
}
.pairs {
  display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .35rem 1.4rem;
  margin: 0; font-size: .94rem;
}
.pairs dd { margin: 0; overflow-wrap: anywhere; } .pairs dt { font-size: inherit; }
pre {
  font: .86rem/1.6 var(--mono); background: var(--wash); padding: .9rem 1.1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0 0 1.6rem;
}
footer { padding-top: 4rem; padding-bottom: 3rem; color: var(--faint); font-size: .82rem; }
@media (max-width: 34rem) {
  .facts { display: grid; grid-template-columns: 1fr 1fr; }
  .cards li { padding: .9rem .9rem .8rem; } .cards .value { font-size: 1.75rem; }
  table { font-size: .88rem; } th, td { padding-right: .8rem; }
  .example { grid-template-columns: minmax(0, 1fr); gap: .7rem; }
  .query { display: flex; align-items: center; justify-content: space-between; gap: 1rem; }
  .query p, .query .caption { margin: 0; } .query img { width: 4rem; margin: 0; }
  .verdict { flex: none; }
}
@media print {
  nav { display: none; }
  .example, .chart { break-inside: avoid; }
}
"""
