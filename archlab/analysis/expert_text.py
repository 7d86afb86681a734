"""Text coloured by expert, layer by layer: one choice of the layer governs the text and every block that is about a
layer. The numbers stand in the page as JSON; text only ever stands in escaped elements."""

import json
from collections.abc import Sequence

import numpy as np

from archlab.analysis.experts import ExpertLayer
from archlab.analysis.plots import COLOURS
from archlab.analysis.report import escape, visible

STYLE = """
:root { --strength: 44%; }
@media (prefers-color-scheme: dark) { :root { --strength: 58%; } }
.layers { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: 10px 0; display: flex; gap: 8px 12px;
  align-items: center; flex-wrap: wrap; font-size: 14px; color: var(--muted); }
.layers select { font: inherit; color: var(--ink); background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: 5px 8px; max-width: 100%; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 8px 0 12px; max-height: 118px; overflow-y: auto; }
.chips button { font: inherit; font-size: 13px; color: var(--ink); border: 1px solid transparent; border-radius: 999px;
  padding: 1px 10px; cursor: pointer; font-variant-numeric: tabular-nums; }
.chips button, .routed span { background: color-mix(in srgb, var(--c, transparent) var(--strength), transparent); }
.chips button[aria-pressed=true] { border-color: var(--ink); }
.chips b { font-weight: 600; margin-right: 6px; }
.routed .lost { text-decoration: underline wavy var(--ink) 1px; text-underline-offset: 3px; }
.routed i { display: block; height: 1px; background: var(--line); margin: 8px 0; }
"""

SCRIPT = """
{
  const data = JSON.parse(document.getElementById("routing").textContent);
  const select = document.querySelector(".layers select"), chips = document.querySelector(".chips");
  const spans = [...document.querySelectorAll(".routed span")];
  const colour = (expert, count) => count <= data.colours.length ? data.colours[expert]
    : `hsl(${(expert * 137.508) % 360} ${62 + 14 * (expert % 2)}% ${50 + 8 * (expert % 3 - 1)}%)`;
  let only = -1;  // the one expert to show, or -1 for everyone's first
  const paint = () => {
    const layer = data.layers[select.value], k = layer.k, of = (values, t) => values.slice(t * k, t * k + k);
    spans.forEach((span, t) => {
      const chosen = of(layer.choices, t), weights = layer.weights && of(layer.weights, t);
      const shown = only < 0 ? chosen[0] : chosen.includes(only) ? only : -1;
      const names = chosen.map((e, j) => e < 0 ? "" : `${e}` + (weights ? ` (${weights[j].toFixed(2)})` : ""));
      const lost = layer.lost ? layer.lost[t] : 0;
      span.style.setProperty("--c", shown < 0 ? "transparent" : colour(shown, layer.experts));
      span.classList.toggle("lost", lost > 0);
      span.title = (names.filter(n => n).length ? `experts ${names.filter(n => n).join(", ")}` : "no expert")
        + (lost ? `; in training ${lost} of ${k} dropped` : "");
    });
    chips.replaceChildren(...layer.load.map((share, e) => {
      const chip = document.createElement("button"), name = document.createElement("b");
      chip.type = "button"; name.textContent = e;
      chip.append(name, `${(100 * share).toFixed(layer.experts > 16 ? 1 : 0)}%`);
      chip.style.setProperty("--c", colour(e, layer.experts));
      chip.setAttribute("aria-pressed", e === only);
      chip.onclick = () => { only = only === e ? -1 : e; paint(); };
      return chip; }));
    for (const block of document.querySelectorAll("[data-layer]")) block.hidden = block.dataset.layer !== select.value;
  };
  select.onchange = () => { only = -1; paint(); };
  paint();
}
"""


def expert_text(pieces: Sequence[str], breaks: Sequence[int], places: np.ndarray,
                layers: Sequence[ExpertLayer]) -> str:
    """HTML of the text, the choice of a layer, and an expert's button for each share of the choices.

    Blocks of the page with `data-layer="i"` are shown while the i-th of `layers` is chosen.

    Args: pieces: text of each token shown; breaks: numbers of the tokens that begin a new row; places [N]: where the
      tokens are in the flattened text [B T]; layers: those that saw every token.
    """
    spans = [("<i></i>" if t in breaks else "") + f"<span>{escape(visible(piece))}</span>"
             for t, piece in enumerate(pieces)]
    options = "".join(f'<option value="{i}">{i + 1}: {escape(layer.path)}</option>' for i, layer in enumerate(layers))
    data = {"colours": COLOURS, "layers": [_numbers(layer, places) for layer in layers]}
    numbers = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (f'<style>{STYLE}</style><div class="layers"><label for="layer">layer</label>'
            f'<select id="layer" autocomplete="off">{options}</select></div><div class="chips"></div>'
            f'<div class="tokens routed">{"".join(spans)}</div>'
            f'<script type="application/json" id="routing">{numbers}</script>')


def _numbers(layer: ExpertLayer, places: np.ndarray) -> dict:
    of = lambda values: values.reshape(-1, *values.shape[2:])[places].reshape(-1)
    weights = None if layer.weights is None else [round(float(w), 3) for w in of(layer.weights)]
    return {"experts": len(layer.load), "k": layer.choices.shape[-1], "load": [round(float(x), 4) for x in layer.load],
            "choices": of(layer.choices).tolist(), "weights": weights,
            "lost": None if layer.lost is None else of(layer.lost).tolist()}
