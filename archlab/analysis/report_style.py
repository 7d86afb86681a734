"""The looks of a report: its style sheet and the few lines of script that sort its tables and
tell what a dot under the pointer is."""

STYLE = """
:root { --paper: #fefefe; --ink: #24292f; --muted: #6b7480; --line: #dfe3e8; --panel: #f6f7f9; --accent: #3f6fd9;
  --text: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e3e7ec; --muted: #97a1ad; --line: #2d333b; --panel: #1b1f25; --accent: #6f98f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--text); }
header, main { max-width: 1100px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
main { padding-bottom: 96px; }
h1 { font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 8px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 56px 0 12px; padding-top: 20px;
  border-top: 1px solid var(--line); }
p { max-width: 72ch; margin: 12px 0; }
.subtitle { color: var(--muted); font-size: 17px; margin: 0 0 18px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
code, pre, .tokens { font-family: var(--mono); font-size: 13.5px; }
code { background: var(--panel); padding: 1px 5px; border-radius: 4px; }
pre { background: var(--panel); padding: 14px 18px; border-radius: 8px; overflow-x: auto; line-height: 1.5; }
pre code { background: none; padding: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0; }
.facts div { background: var(--panel); border-radius: 10px; padding: 14px 18px; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 2px 0 0; font-size: 24px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
figure { margin: 20px 0; min-width: 0; }
figcaption { color: var(--muted); font-size: 13.5px; line-height: 1.5; margin-top: 8px; max-width: 80ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 40px;
  margin: 24px 0; align-items: start; }
.grid figure { margin: 0; max-width: 640px; }
svg { display: block; width: 100%; height: auto; font-family: var(--text); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th { vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid var(--muted); white-space: normal; }
.number { text-align: right; }
tbody tr:hover { background: var(--panel); }
th button { all: unset; cursor: pointer; color: var(--muted); font-size: 13px; line-height: 1.3; }
th button:hover, th button:focus-visible { color: var(--accent); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 9px; }
.tokens { background: var(--panel); border-radius: 8px; padding: 16px 18px; white-space: pre-wrap; tab-size: 4;
  overflow-wrap: anywhere; line-height: 1.75; max-height: 480px; overflow-y: auto; }
.tokens span, .step { background: color-mix(in srgb, var(--accent) calc(var(--v) * 62%), transparent); }
.tokens span { border-radius: 2px; padding: 2px 0; }
.legend { display: flex; align-items: center; gap: 8px; color: var(--muted); font-size: 13px; margin-bottom: 8px;
  font-variant-numeric: tabular-nums; }
.step { color: var(--ink); border-radius: 4px; padding: 1px 10px; }
.ramp { width: 140px; height: 12px; border-radius: 6px; border: 1px solid var(--line);
  background: linear-gradient(to right, transparent, color-mix(in srgb, var(--accent) 62%, transparent)); }
.tip { position: fixed; z-index: 1; pointer-events: none; max-width: 320px; padding: 8px 12px; border-radius: 8px;
  background: var(--panel); border: 1px solid var(--line); box-shadow: 0 4px 16px rgb(0 0 0 / 18%); font-size: 13px;
  line-height: 1.45; white-space: pre-line; font-variant-numeric: tabular-nums; }
.tip::first-line { font-weight: 600; }
.near use, .near path { stroke: var(--ink) !important; stroke-width: 1.6 !important; }
@media print { .tokens { max-height: none; } .tip { display: none; } }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const numeric = head.classList.contains("number");
  const key = row => { const cell = row.cells[column];
    return numeric ? parseFloat(cell.dataset.value ?? "NaN") : cell.textContent; };
  const compare = (a, b) => { const x = key(a), y = key(b);
    if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);  // what is missing stays last
    return (up ? 1 : -1) * (numeric ? x - y : x.localeCompare(y)); };
  body.append(...[...body.rows].sort(compare));
};
const tip = Object.assign(document.createElement("div"), {className: "tip", hidden: true});
document.body.append(tip);
for (const svg of document.querySelectorAll("svg")) {
  const dots = [...svg.querySelectorAll("g > title")].map(title => { const dot = title.parentElement;
    dot.setAttribute("aria-label", title.textContent);
    title.remove();  // or the browser's own tip would come over ours
    return dot; });
  const middle = dot => { const box = dot.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2]; };
  let last;
  const show = dot => {
    last?.classList.remove("near");
    last = dot;
    tip.hidden = !dot;
    if (!dot) return;
    dot.classList.add("near");
    tip.textContent = dot.getAttribute("aria-label");
    const [x, y] = middle(dot), right = x + 14 + tip.offsetWidth < innerWidth;
    tip.style.left = `${Math.max(4, right ? x + 14 : x - 14 - tip.offsetWidth)}px`;
    tip.style.top = `${Math.max(4, Math.min(y - 14, innerHeight - tip.offsetHeight - 4))}px`;
  };
  if (dots.length) svg.onpointermove = svg.onpointerdown = event => {
    let near, least = 18;  // pixels: dots are small, and the nearest is meant
    for (const dot of dots) { const [x, y] = middle(dot), far = Math.hypot(event.clientX - x, event.clientY - y);
      if (far < least) [near, least] = [dot, far]; }
    show(near);
  };
  if (dots.length) svg.onpointerleave = () => show();
}
"""
