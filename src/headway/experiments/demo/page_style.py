"""The style sheet of the report: no outside resources, for dark and light screens and for paper."""

from __future__ import annotations

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6675; --line: #dfe3e8;
  --good: #12805c; --bad: #c22f2f; --accent: #2563eb;
  --f0: #bfdbfe; --f1: #fde68a; --f2: #bbf7d0; --f3: #fbcfe8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #181f28; --ink: #e4e9ef; --soft: #94a1b2; --line: #2b3541;
    --good: #4ade9f; --bad: #ff8080; --accent: #7aa7ff;
    --f0: #1e4278; --f1: #66500c; --f2: #1c5535; --f3: #6f2750;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
header h1 { margin: 0 0 4px; font-size: 30px; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--soft); max-width: 72ch; }
h2 { margin: 44px 0 6px; font-size: 21px; letter-spacing: -0.005em; }
h3 { margin: 0 0 10px; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
h3 .verdict { float: right; margin-left: 12px; }
.note { margin: 0 0 14px; color: var(--soft); max-width: 80ch; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); margin-top: 26px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px; }
.card .label { color: var(--soft); font-size: 13px; }
.card .figure { font-size: 30px; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card .detail { color: var(--soft); font-size: 13px; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.panel { padding: 18px; margin-bottom: 16px; overflow-x: auto; }
.pair { display: grid; gap: 16px; grid-template-columns: 1fr 1fr; }
.pair > * { min-width: 0; }
.split { display: grid; gap: 16px; grid-template-columns: minmax(0, 1.15fr) minmax(0, 1fr); align-items: start; }
.split.stacked { grid-template-columns: 1fr; }
@media (max-width: 860px) { .pair, .split { grid-template-columns: 1fr; } }
.way { margin: 0 0 6px; font-size: 13px; color: var(--soft); }
.way b { color: var(--ink); }
pre {
  margin: 0; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--page);
  font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: break-spaces; overflow-wrap: anywhere; tab-size: 4;
}
.prompt { color: var(--soft); }
.f0, .f1, .f2, .f3 { border-radius: 2px; }
.f0 { background: var(--f0); } .f1 { background: var(--f1); }
.f2 { background: var(--f2); } .f3 { background: var(--f3); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 0 0 14px; font-size: 14px; color: var(--soft); }
.legend span.key { padding: 1px 7px; font-family: ui-monospace, Menlo, Consolas, monospace; color: var(--ink); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14.5px; }
caption { text-align: left; font-weight: 600; padding-bottom: 8px; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
table.facts td { text-align: left; vertical-align: top; }
table.facts td:first-child { width: 15em; color: var(--soft); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
ul.names { columns: 14em; margin: 10px 0 0; padding-left: 1.2em; font-size: 14px; }
code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { body { background: none; } .card, .panel { break-inside: avoid; } }
"""
