// Line charts over steps: four small multiples that share their x axis, their hover line and the chosen step.

import { h, s, text } from "./dom.js";
import { number, ticks } from "./format.js";

const MEASURES = [
  { key: "mean", label: "mean", title: "Arithmetic mean of the finite elements", positive: false },
  { key: "std", label: "std", title: "Population standard deviation of the finite elements", positive: true },
  { key: "l2", label: "l2 norm", title: "Square root of the sum of squares", positive: true },
  { key: "absmax", label: "abs max", title: "Largest magnitude of a finite element", positive: true },
];
const WIDTH = 300;
const HEIGHT = 150;
const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;

/** Groups points by step: the mean of each step's values, and how far they spread. */
function bySteps(points, key) {
  const out = [];
  for (const point of points) {
    const value = point[key];
    let last = out[out.length - 1];
    if (!last || last.step !== point.step) {
      last = { step: point.step, sum: 0, n: 0, low: Infinity, high: -Infinity, bad: 0 };
      out.push(last);
    }
    last.bad += point.bad > 0 ? 1 : 0;
    if (value === null) continue;
    last.sum += value;
    last.n += 1;
    last.low = Math.min(last.low, value);
    last.high = Math.max(last.high, value);
  }
  for (const group of out) group.value = group.n > 0 ? group.sum / group.n : null;
  return out;
}

export class Charts {
  /** `pick(step)` is called when the user clicks on a step. */
  constructor(pick) {
    this.pick = pick;
    this.lines = [];
    this.hover = null;
    this.chosen = null;
    this.log = false;
    this.logBox = h("input", { type: "checkbox", onchange: () => this.setLog() });
    this.legend = h("span", { class: "legend" });
    this.plots = MEASURES.map((measure) => this.plot(measure));
    this.element = h(
      "section", { class: "charts", "aria-label": "Statistics over steps" },
      h("div", { class: "bar" }, this.legend, h("label", { class: "quiet" }, this.logBox, "log scale")),
      h("div", { class: "multiples" }, this.plots.map((plot) => plot.figure)),
    );
  }

  setLog() {
    this.log = this.logBox.checked;
    this.draw();
  }

  plot(measure) {
    const svg = s("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", class: "chart", "data-measure": measure.key,
    });
    const readout = h("output", { class: "readout" });
    const figure = h(
      "figure", { class: "plot" },
      h("figcaption", { title: measure.title }, h("b", {}, measure.label), readout), svg,
    );
    svg.addEventListener("pointermove", (event) => this.point(event, svg));
    svg.addEventListener("pointerleave", () => this.setHover(null));
    svg.addEventListener("click", () => this.hover !== null && this.pick(this.hover));
    return { measure, svg, readout, figure, overlay: s("g", { class: "overlay" }), x: null, y: null, groups: [] };
  }

  /** `lines`: `{ name, train, points }`, points in order. */
  load(lines) {
    this.lines = lines;
    this.draw();
  }

  /** Marks the step of the record that is shown below. */
  choose(step) {
    this.chosen = step;
    this.plots.forEach((plot) => this.drawOverlay(plot));
  }

  draw() {
    this.legend.replaceChildren(
      ...this.lines.map((line) => h("span", { class: line.train ? "key train" : "key eval" }, line.name)),
    );
    // Drawn in the element's own pixels, so that text keeps its shape.
    const width = this.plots[0].svg.clientWidth || WIDTH;
    const height = this.plots[0].svg.clientHeight || HEIGHT;
    this.plots.forEach((plot) => this.drawPlot(plot, width, height));
  }

  drawPlot(plot, width, height) {
    const { key, positive } = plot.measure;
    const log = this.log && positive;
    plot.groups = this.lines.map((line) => ({ train: line.train, steps: bySteps(line.points, key) }));
    const all = plot.groups.flatMap((group) => group.steps);
    const usable = all.filter((g) => g.value !== null && (!log || g.low > 0));
    plot.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (all.length === 0 || usable.length === 0) {
      plot.x = null;
      const why = all.length === 0 ? "no records yet" : log ? "nothing above zero" : "no numbers: see the records below";
      plot.svg.replaceChildren(s("text", { x: width / 2, y: height / 2, class: "none" }, why));
      text(plot.readout, "");
      return;
    }
    const fit = log ? Math.log10 : (v) => v;
    let [first, last] = extent(all.map((g) => [g.step, g.step]));
    let [low, high] = extent(usable.map((g) => [fit(g.low), fit(g.high)]));
    if (first === last) [first, last] = [first - 1, last + 1];
    const pad = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
    [low, high] = [positive && !log && low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
    plot.x = { of: (v) => LEFT + ((v - first) / (last - first)) * (width - LEFT - RIGHT), first, last, width };
    plot.y = { of: (v) => TOP + (1 - (fit(v) - low) / (high - low)) * (height - TOP - BOTTOM), height, log };
    const parts = [this.axes(plot, low, high, log)];
    for (const group of plot.groups) parts.push(...this.line(plot, group, log));
    plot.overlay = s("g", { class: "overlay" });
    plot.svg.setAttribute("aria-label", `${plot.measure.label} over steps ${all[0].step} to ${last}`);
    plot.svg.replaceChildren(...parts, plot.overlay);
    this.drawOverlay(plot);
  }

  axes(plot, low, high, log) {
    const { x, y } = plot;
    const base = y.height - BOTTOM;
    const axis = s("g", { class: "axis" });
    let values = ticks(low, high, 4);
    if (log) {
      const whole = values.filter((v) => Math.abs(v - Math.round(v)) < 1e-6);
      values = whole.length >= 2 ? whole.map((v) => 10 ** v) : ticks(10 ** low, 10 ** high, 4);
    }
    // One more digit where the range is narrow beside its values.
    const narrow = Math.abs(high - low) < 0.02 * Math.max(Math.abs(high), Math.abs(low));
    for (const value of values) {
      const at = y.of(value);
      axis.append(s("line", { x1: LEFT, x2: x.width - RIGHT, y1: at, y2: at, class: "grid" }));
      axis.append(s("text", { x: LEFT - 5, y: at + 3.5, class: "y" }, number(value, narrow ? 4 : 3)));
    }
    const wide = Math.max(1, Math.floor((x.width - LEFT) / 48));
    for (const step of ticks(x.first, x.last, wide).filter(Number.isInteger)) {
      if (step < 0) continue;
      axis.append(s("line", { x1: x.of(step), x2: x.of(step), y1: base, y2: base + 3, class: "tick" }));
      axis.append(s("text", { x: x.of(step), y: base + 14, class: "x" }, String(step)));
    }
    axis.append(s("line", { x1: LEFT, x2: x.width - RIGHT, y1: base, y2: base, class: "base" }));
    return axis;
  }

  line(plot, group, log) {
    const { x, y } = plot;
    const name = group.train ? "train" : "eval";
    const drawable = (g) => g.value !== null && (!log || g.low > 0);
    const steps = group.steps.filter(drawable);
    const out = [];
    if (steps.some((g) => g.high > g.low)) {
      const up = steps.map((g) => `${x.of(g.step).toFixed(1)},${y.of(g.high).toFixed(1)}`);
      const down = steps.map((g) => `${x.of(g.step).toFixed(1)},${y.of(g.low).toFixed(1)}`).reverse();
      out.push(s("polygon", { points: [...up, ...down].join(" "), class: `band ${name}` }));
    }
    let path = "";
    let pen = "M";
    for (const g of group.steps) {
      if (drawable(g)) {
        path += `${pen}${x.of(g.step).toFixed(1)},${y.of(g.value).toFixed(1)}`;
        pen = "L";
      } else pen = "M";
    }
    out.push(s("path", { d: path, class: `line ${name}` }));
    if (steps.length <= 40) {
      for (const g of steps) out.push(s("circle", { cx: x.of(g.step), cy: y.of(g.value), r: 2, class: `dot ${name}` }));
    }
    const base = y.height - BOTTOM;
    for (const g of group.steps.filter((one) => one.bad > 0)) {
      const at = x.of(g.step);
      const mark = s("path", { d: `M${at - 3},${base}L${at},${base - 6}L${at + 3},${base}Z`, class: "badmark" });
      mark.append(s("title", {}, `step ${g.step}: NaN or infinity in ${g.bad} record(s)`));
      out.push(mark);
    }
    return out;
  }

  drawOverlay(plot) {
    const { x, y } = plot;
    if (!x) return;
    const marks = [];
    const vertical = (step, name) =>
      s("line", { x1: x.of(step), x2: x.of(step), y1: TOP, y2: y.height - BOTTOM, class: name });
    if (this.chosen !== null && this.chosen >= x.first && this.chosen <= x.last) marks.push(vertical(this.chosen, "chosen"));
    const at = this.hover ?? this.chosen;
    if (this.hover !== null) marks.push(vertical(this.hover, "cross"));
    const readings = [];
    for (const group of plot.groups) {
      const name = group.train ? "train" : "eval";
      const step = at === null ? group.steps[group.steps.length - 1] : group.steps.find((g) => g.step === at);
      if (!step || step.value === null) continue;
      const spread = step.high > step.low ? `from ${number(step.low)} to ${number(step.high)} over ${step.n} records` : name;
      readings.push(h("span", { class: `reading ${name}`, title: `step ${step.step}, ${name}: ${spread}` }, number(step.value)));
      if (this.hover !== null && (!y.log || step.low > 0)) {
        marks.push(s("circle", { cx: x.of(step.step), cy: y.of(step.value), r: 3.5, class: `spot ${name}` }));
      }
    }
    if (readings.length > 0 && at !== null) readings.push(`@${at}`);
    plot.readout.replaceChildren(...readings);
    plot.overlay.replaceChildren(...marks);
  }

  point(event, svg) {
    const plot = this.plots.find((one) => one.svg === svg);
    if (!plot?.x) return;
    const box = svg.getBoundingClientRect();
    const px = ((event.clientX - box.left) / box.width) * plot.x.width;
    let best = null;
    for (const group of plot.groups) {
      for (const { step } of group.steps) {
        const distance = Math.abs(plot.x.of(step) - px);
        if (best === null || distance < best.distance) best = { step, distance };
      }
    }
    this.setHover(best?.step ?? null);
  }

  setHover(step) {
    if (this.hover === step) return;
    this.hover = step;
    this.plots.forEach((plot) => this.drawOverlay(plot));
  }
}

function extent(pairs) {
  return pairs.reduce(([low, high], [a, b]) => [Math.min(low, a), Math.max(high, b)], [Infinity, -Infinity]);
}
