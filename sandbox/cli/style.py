"""The style sheet of the report: light and dark, wide and narrow. Its digest is in the page's policy."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1c2530; --soft: #5a6675; --edge: #dde2e8; --grid: #e6eaef;
  --good: #14693a; --good-back: #dcf3e4; --mild: #7a5200; --mild-back: #fcefcf; --bad: #a3201c; --bad-back: #fde3e1;
  --memory: #2563c4; --cpu: #b4560a; --tasks: #0f766e; --pids: #8b3fa8; --limit: #c62a24; --warning: #a87400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b212a; --text: #e4e9ef; --soft: #9aa7b6; --edge: #323b47; --grid: #2a323d;
    --good: #7fdca4; --good-back: #153a26; --mild: #f0c968; --mild-back: #41320f; --bad: #ff9d97; --bad-back: #4a1b1a;
    --memory: #74a9ff; --cpu: #f2a25c; --tasks: #4fd1c0; --pids: #d497ec; --limit: #ff7a73; --warning: #e6b84c;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 40px; }
header, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 18px 20px; }
header, section { overflow-x: auto; }
section, footer { margin-top: 16px; }
footer { color: var(--soft); font-size: 13px; text-align: center; }
h1, h2, h3, p, ul, dl, dd, figure { margin: 0; }
h1 { font-size: 24px; line-height: 1.3; overflow-wrap: anywhere; }
h2 { font-size: 18px; line-height: 1.3; }
h3 { font-size: 15px; }
h2 + * { margin-top: 12px; }
p + p, p + table, table + p, figure + p, article + p { margin-top: 10px; }
bdi, code, dd, footer, .mend, .note, .unit, .of { overflow-wrap: anywhere; }
td { overflow-wrap: break-word; }
td, dd, code { unicode-bidi: isolate; }
code { font: 13px/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.over, .note, .none, .unit, .of, dt, .mend { color: var(--soft); }
.over { font-size: 13px; letter-spacing: .04em; }
.note, .mend { font-size: 13px; }
.unit { font-weight: normal; }
.badge, .label {
  display: inline-block; padding: 1px 9px; border-radius: 12px; font-size: 12.5px; font-weight: 600; line-height: 1.6;
  vertical-align: middle; letter-spacing: 0; overflow-wrap: anywhere;
}
td .badge { white-space: nowrap; }
.label { background: var(--grid); color: var(--soft); font-weight: normal; }
.good { background: var(--good-back); color: var(--good); }
.mild { background: var(--mild-back); color: var(--mild); }
.bad { background: var(--bad-back); color: var(--bad); }
header dl { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 6px 28px; margin-top: 14px; }
dl > div { display: grid; grid-template-columns: 7em minmax(0, 1fr); gap: 10px; }
.violation dl > div { grid-template-columns: 12em minmax(0, 1fr); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 16px 24px; }
.tile { display: flex; flex-direction: column; }
.tile .name, .tile .of { font-size: 13px; color: var(--soft); }
.tile .of { min-height: 1.5em; }
.tile .used { font-size: 22px; font-weight: 600; line-height: 1.3; }
.meter { display: block; width: 100%; height: 6px; margin-top: 6px; border-radius: 3px; }
.meter .rest { fill: var(--grid); }
.meter .some { fill: var(--memory); }
.meter .full { fill: var(--limit); }
figure + figure { margin-top: 22px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 2px 20px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; list-style: none; font-size: 13px; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 6px; }
.legend svg { flex: none; width: 22px; height: 10px; }
.plot { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 8px; padding: 10px 16px 0 0; }
.plot > svg { display: block; width: 100%; height: 150px; overflow: visible; }
.y { display: flex; flex-direction: column; justify-content: space-between; min-width: 2.2em; text-align: right; }
.y span { height: 0; line-height: 0; }
.x { grid-column: 2; display: flex; justify-content: space-between; height: 20px; margin-top: 5px; }
.x span { display: flex; justify-content: center; width: 0; white-space: nowrap; }
.time { grid-column: 2; text-align: right; }
.x, .y, .time { font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); stroke-width: 1; }
.course { stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.level { stroke-width: 1.5; stroke-dasharray: 6 4; }
.level.warning { stroke-dasharray: 2 4; }
.memory { stroke: var(--memory); }
.cpu { stroke: var(--cpu); }
.tasks { stroke: var(--tasks); }
.pids { stroke: var(--pids); stroke-dasharray: 1 5; }
.limit { stroke: var(--limit); }
.warning { stroke: var(--warning); }
.violation + .violation { margin-top: 16px; padding-top: 16px; border-top: 1px solid var(--edge); }
.message { font-weight: 600; overflow-wrap: anywhere; }
.labels { display: flex; flex-wrap: wrap; gap: 6px; }
.message + .labels { margin-top: 4px; }
.violation dl { display: grid; gap: 4px; margin-top: 8px; font-size: 14px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { color: var(--soft); font-weight: 600; font-size: 13px; text-align: left; }
th, td { padding: 6px 14px 6px 0; vertical-align: top; border-bottom: 1px solid var(--edge); }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
td { min-width: 5em; }
details summary { cursor: pointer; }
details summary h2 { display: inline; }
details[open] summary { margin-bottom: 12px; }
@media (max-width: 700px) {
  main { padding: 12px 10px 28px; }
  header, section { padding: 14px; border-radius: 8px; }
  header dl { grid-template-columns: minmax(0, 1fr); }
  dl > div { grid-template-columns: 6em minmax(0, 1fr); }
  .violation dl > div { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px 18px; }
  table, tbody, tr, td { display: block; width: 100%; }
  thead { display: none; }
  tr { padding: 8px 0; border-bottom: 1px solid var(--edge); }
  tr:last-child { border-bottom: 0; }
  td { display: grid; grid-template-columns: 6.5em minmax(0, 1fr); gap: 10px; padding: 2px 0; border: 0; }
  td::before { content: attr(data-label); color: var(--soft); font-size: 13px; }
  td.empty { display: none; }
}
@media print {
  body { background: none; }
  header, section { break-inside: avoid-page; }
}
"""
