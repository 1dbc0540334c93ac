"""The style sheet of the page: no outside resources, for light and dark screens, phones and paper."""

from __future__ import annotations

STYLE_SHEET = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #566170; --line: #d9dee4; --accent: #1d4ed8;
  --warn: #8a4b00; --warn-ground: #fff5e0;
  --c0: #1d4ed8; --c1: #b45309; --c2: #047857; --c3: #be185d; --c4: #6d28d9; --c5: #b91c1c; --c6: #0e7490; --c7: #57534e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141a; --card: #181f28; --ink: #e4e9ef; --soft: #9aa7b7; --line: #2b3541; --accent: #8ab1ff;
    --warn: #ffc978; --warn-ground: #2b2213;
    --c0: #7aa7ff; --c1: #fbbf24; --c2: #34d399; --c3: #f472b6; --c4: #b69cff; --c5: #f87171; --c6: #22d3ee;
    --c7: #d6d3d1;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 64px; }
h1 { margin: 0 0 4px; font-size: 28px; letter-spacing: -0.01em; }
header p, .note { margin: 0 0 12px; color: var(--soft); max-width: 84ch; }
h2 { margin: 40px 0 8px; font-size: 21px; }
.panel, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.panel { padding: 16px 18px; margin-bottom: 16px; overflow-x: auto; }
.warnings {
  background: var(--warn-ground); color: var(--warn); border-radius: 10px; padding: 12px 18px 12px 34px; margin: 18px 0 0;
}
.bar {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center;
  padding: 10px 0; background: var(--page); border-bottom: 1px solid var(--line);
}
.key { display: inline-flex; align-items: center; gap: 6px; font-size: 14px; overflow-wrap: anywhere; }
.key svg { width: 34px; height: 12px; flex: none; }
.choice { display: inline-flex; gap: 4px; margin-left: auto; }
.choice label {
  padding: 4px 12px; border: 1px solid var(--line); border-radius: 999px; cursor: pointer; font-size: 14px;
  background: var(--card); color: var(--ink);
}
.axis-input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#axis-tokens:checked ~ main label[for=axis-tokens], #axis-flops:checked ~ main label[for=axis-flops] {
  background: var(--accent); border-color: var(--accent); color: var(--page);
}
#axis-tokens:focus-visible ~ main label[for=axis-tokens], #axis-flops:focus-visible ~ main label[for=axis-flops] {
  outline: 3px solid var(--ink); outline-offset: 2px;
}
#axis-tokens:checked ~ main .by-flops, #axis-flops:checked ~ main .by-tokens { display: none; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; padding: 14px 14px 8px; min-width: 0; break-inside: avoid; }
figcaption { font-weight: 600; font-size: 15px; }
figcaption ul { list-style: none; display: flex; flex-wrap: wrap; gap: 0 16px; margin: 2px 0 4px; padding: 0; font-weight: 400; }
figcaption li { font-size: 13.5px; color: var(--soft); }
figcaption small { font-weight: 400; color: var(--soft); }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
svg text.y { text-anchor: end; font-variant-numeric: tabular-nums; }
svg text.axis, svg text.x { text-anchor: middle; }
svg .grid { stroke: var(--line); }
svg .base { stroke: var(--soft); }
svg .curve { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
svg circle, svg path:not(.curve) { fill: var(--c); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14.5px; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-size: 13.5px; overflow-wrap: anywhere; }
tbody th { text-align: left; font-weight: 400; color: var(--soft); padding-left: 0; min-width: 11em; }
tbody tr:last-child > * { border-bottom: 0; }
td { white-space: nowrap; } td.long { white-space: normal; overflow-wrap: anywhere; }
td small { display: block; color: var(--soft); font-size: 12.5px; }
footer { margin-top: 36px; color: var(--soft); font-size: 14px; }
footer code { font: 0.95em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 20px 12px 40px; } svg text { font-size: 15px; } .choice { margin-left: 0; } }
@media print {
  body { background: none; } .bar { position: static; } .choice, .axis-input { display: none; }
  .axis-input ~ main .by-flops, .axis-input ~ main .by-tokens { display: block !important; }
  .charts { grid-template-columns: 1fr 1fr; } .panel { break-inside: avoid; overflow: visible; }
}
"""
