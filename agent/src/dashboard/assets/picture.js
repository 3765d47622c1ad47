// One tensor: histogram, heat map with its scale, statistics, layout.

import { h, s, text } from "./dom.js";
import { bytes, clock, count, number, shape } from "./format.js";

const BLUE_RED = {
  light: ["#1d4f91", "#5f9ccf", "#c9dff0", "#f6f5f3", "#f8d3bd", "#e07b54", "#9e1f2c"],
  dark: ["#8cc4f5", "#3f86c6", "#1f4468", "#1d2128", "#673226", "#cf6a45", "#ffb59a"],
};
const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  return (dark.matches ? BLUE_RED.dark : BLUE_RED.light).map((hex) =>
    [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)),
  );
}

/** The colour of `t` in -1..1. */
function mix(stops, t) {
  const at = ((Math.max(-1, Math.min(1, t)) + 1) / 2) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((a, channel) => Math.round(a + (stops[i + 1][channel] - a) * (at - i)));
}

export class Picture {
  constructor() {
    this.look = null;
    this.heat = h("canvas", { class: "heat", role: "img", width: 1, height: 1 });
    this.scale = h("canvas", { class: "scale", width: 256, height: 1, "aria-hidden": "true" });
    this.low = h("span");
    this.high = h("span");
    this.clip = h("span", { class: "quiet" });
    this.cell = h("output", { class: "readout" });
    this.caption = h("p", { class: "quiet caption" });
    this.peak = h("select", { "aria-label": "What a cell shows", onchange: () => this.drawHeat() },
      h("option", { value: "mean" }, "mean of cell"), h("option", { value: "peak" }, "peak of cell"));
    this.bars = s("svg", { class: "histogram", role: "img" });
    this.bin = h("output", { class: "quiet caption bin-readout" });
    this.logBox = h("input", { type: "checkbox", onchange: () => this.drawBars() });
    this.table = h("table", { class: "stats" });
    this.facts = h("dl", { class: "facts" });
    this.element = h(
      "div", { class: "picture" },
      h("figure", { class: "card bars" },
        h("figcaption", {}, h("b", {}, "histogram"), h("label", { class: "quiet" }, this.logBox, "log")), this.bars, this.bin),
      h("figure", { class: "card map" },
        h("figcaption", {}, h("b", {}, "heat map"), this.cell, this.peak), this.heat, this.caption,
        h("div", { class: "scalebar", role: "group", "aria-label": "Colour scale" }, this.low, this.scale, this.high, this.clip)),
      h("div", { class: "card about" }, this.table, this.facts),
    );
    this.heat.addEventListener("pointermove", (event) => this.readCell(event));
    this.heat.addEventListener("pointerleave", () => text(this.cell, ""));
    this.bars.addEventListener("pointermove", (event) => this.readBin(event));
    this.bars.addEventListener("pointerleave", () => this.tellBars());
    dark.addEventListener("change", () => this.look && this.drawHeat());
  }

  /** Takes the answer of `/api/tensor`. */
  load(look) {
    this.look = look;
    this.peak.hidden = look.heat.peak.length === 0;
    this.drawBars();
    this.drawHeat();
    this.drawAbout();
  }

  drawHeat() {
    const { heat } = this.look;
    const cells = this.cells();
    const canvas = this.heat;
    canvas.width = Math.max(1, heat.cols);
    canvas.height = Math.max(1, heat.rows);
    // A bias is a strip, a wide activation a map.
    canvas.style.height = `${Math.round(Math.max(26, Math.min(250, heat.rows * 12)))}px`;
    const context = canvas.getContext("2d");
    const sizes = cells.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    const top = sizes[sizes.length - 1] ?? 0;
    const usual = sizes[Math.floor((sizes.length - 1) * 0.995)] ?? 0;
    // A few outliers must not turn everything else grey.
    this.limit = top > 3 * usual && usual > 0 ? usual : top;
    const stops = colours();
    const bad = new Set(heat.bad);
    if (cells.length > 0) {
      const image = context.createImageData(heat.cols, heat.rows);
      cells.forEach((value, i) => {
        const colour = bad.has(i) || value === null ? [214, 51, 214] : mix(stops, this.limit > 0 ? value / this.limit : 0);
        image.data.set([...colour, 255], i * 4);
      });
      context.putImageData(image, 0, 0);
    }
    const scale = this.scale.getContext("2d");
    const ramp = scale.createImageData(256, 1);
    for (let i = 0; i < 256; i += 1) ramp.data.set([...mix(stops, (i - 127.5) / 127.5), 255], i * 4);
    scale.putImageData(ramp, 0, 0);
    text(this.low, number(-this.limit, 3));
    text(this.high, number(this.limit, 3));
    text(this.clip, `${top > this.limit ? `clipped: the largest is ${number(top, 3)}` : ""}${bad.size ? "  ■ NaN or infinity" : ""}`);
    this.clip.classList.toggle("bad", bad.size > 0);
    text(this.caption, this.describe());
    canvas.setAttribute("aria-label", `Heat map of ${this.look.name}: ${heat.of_rows} by ${heat.of_cols}, up to ±${number(this.limit, 3)}`);
  }

  cells() {
    const { heat } = this.look;
    return this.peak.value === "peak" && heat.peak.length > 0 ? heat.peak : heat.mean;
  }

  describe() {
    const { heat, shape: dims, elements, sampled } = this.look;
    if (elements === 0) return "No elements.";
    if (dims.length === 0) return "A single number.";
    const across = `across: dim ${dims.length - 1} (${count(heat.of_cols)})`;
    const down = dims.length < 2 ? "" : dims.length === 2 ? `down: dim 0 (${count(heat.of_rows)}) · `
      : `down: dims 0–${dims.length - 2} (${dims.slice(0, -1).join("×")} = ${count(heat.of_rows)}) · `;
    const cells = heat.rows < heat.of_rows || heat.cols < heat.of_cols ? ` · ${heat.rows}×${heat.cols} cells` : "";
    const some = sampled < elements ? ` · ${count(sampled)} of ${count(elements)} elements read` : "";
    return `${down}${across}${cells}${some}`;
  }

  readCell(event) {
    const { heat } = this.look ?? {};
    if (!heat || heat.rows === 0) return;
    const box = this.heat.getBoundingClientRect();
    const col = Math.min(heat.cols - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * heat.cols)));
    const row = Math.min(heat.rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * heat.rows)));
    const range = (i, cells, of) => {
      const from = Math.floor((i * of) / cells);
      const to = Math.floor(((i + 1) * of) / cells) - 1;
      return from >= to ? `${from}` : `${from}–${to}`;
    };
    const value = this.cells()[row * heat.cols + col];
    text(this.cell, `[${range(row, heat.rows, heat.of_rows)}, ${range(col, heat.cols, heat.of_cols)}]  ${number(value)}`);
  }

  drawBars() {
    const { low, high, bins } = this.look.histogram;
    const width = this.bars.clientWidth || 300;
    const height = this.bars.clientHeight || 220;
    const [left, right, top, bottom] = [6, 6, 6, 20];
    this.bars.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (bins.length === 0) {
      this.bars.replaceChildren(s("text", { x: width / 2, y: height / 2, class: "none" }, "nothing finite to count"));
      this.tellBars();
      return;
    }
    const fit = this.logBox.checked ? (n) => Math.log10(n + 1) : (n) => n;
    const most = Math.max(...bins.map(fit));
    const step = (width - left - right) / bins.length;
    const base = height - bottom;
    const parts = bins.map((n, i) => {
      const tall = n > 0 ? Math.max(1, (fit(n) / most) * (base - top)) : 0;
      return s("rect", { x: left + i * step, y: base - tall, width: Math.max(0.5, step - 1), height: tall, class: "bin" });
    });
    const x = (v) => left + (high > low ? (v - low) / (high - low) : 0.5) * (width - left - right);
    if (low < 0 && high > 0) parts.push(s("line", { x1: x(0), x2: x(0), y1: top, y2: base, class: "zero" }));
    parts.push(s("line", { x1: left, x2: width - right, y1: base, y2: base, class: "base" }));
    const label = (at, anchor, value) => s("text", { x: at, y: base + 14, class: "x", "text-anchor": anchor }, number(value, 3));
    if (high > low) {
      parts.push(label(left, "start", low), label(width - right, "end", high));
      const middle = low < 0 && high > 0 ? 0 : (low + high) / 2;
      if (x(middle) > width * 0.25 && x(middle) < width * 0.75) parts.push(label(x(middle), "middle", middle));
    } else parts.push(label(width / 2, "middle", low));
    this.bars.setAttribute("aria-label", `Histogram from ${number(low)} to ${number(high)}`);
    this.bars.replaceChildren(...parts);
    this.tellBars();
  }

  readBin(event) {
    const { low, high, bins } = this.look?.histogram ?? { bins: [] };
    if (bins.length === 0) return;
    const box = this.bars.getBoundingClientRect();
    const at = Math.floor(((event.clientX - box.left - 6) / (box.width - 12)) * bins.length);
    const i = Math.min(bins.length - 1, Math.max(0, at));
    const edge = (k) => number(low + ((high - low) * k) / bins.length, 3);
    text(this.bin, `${edge(i)} … ${edge(i + 1)}: ${count(bins[i])}`);
  }

  tellBars() {
    const { bins } = this.look.histogram;
    text(this.bin, bins.length ? `${bins.length} bins · highest ${count(Math.max(...bins))}` : "");
  }

  drawAbout() {
    const { stats, look } = { stats: this.look.stats, look: this.look };
    const rows = [
      ["mean", number(stats.mean, 6)], ["std", number(stats.std, 6)], ["l2 norm", number(stats.l2, 6)],
      ["abs max", number(stats.absmax, 6)], ["min", number(stats.min, 6)], ["max", number(stats.max, 6)],
      ["zeros", share(stats.zero, stats.count)], ["NaN · inf", `${count(stats.nan)} · ${count(stats.inf)}`, stats.nan + stats.inf > 0],
    ];
    this.table.replaceChildren(
      h("caption", {}, look.stats_sampled ? "statistics of the sample" : "statistics"),
      h("tbody", {}, rows.map(([name, value, bad]) => h("tr", { class: bad ? "bad" : null }, h("th", { scope: "row" }, name), h("td", {}, value)))),
    );
    const facts = [
      ["shape", shape(look.shape)], ["dtype", look.dtype], ["bytes", bytes(look.bytes)],
      ["layout", look.rank === null ? (look.layout.length ? look.layout.join("\n") : "one process") : `rank ${look.rank} alone`],
      // Only a gradient is to be divided by it.
      ["dp size", look.dp_size > 1 && /^(backward|grad)/.test(look.kind) ? String(look.dp_size) : null],
      ["parts", partsLine(look.parts)],
      ["revision", Number.isInteger(look.revision) ? `${look.revision} of the hooks` : null],
      ["captured", clock(look.time_ms)],
    ];
    this.facts.replaceChildren(
      ...facts.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", { class: name }, value)]),
    );
  }
}

function partsLine(parts) {
  if (parts.length < 2) return null;
  if (parts.every((p) => shape(p.shape) === shape(parts[0].shape))) return `${parts.length} × ${shape(parts[0].shape)}`;
  const lines = parts.slice(0, 6).map((p) => `rank ${p.rank} ${shape(p.shape)}`);
  return [...lines, ...(parts.length > 6 ? ["…"] : [])].join("\n");
}

function share(n, all) {
  return n === 0 || all === 0 ? "0" : `${count(n)} (${number((100 * n) / all, 3)} %)`;
}
