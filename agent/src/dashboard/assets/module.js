// The panel of one module: a tab for each kind and leaf, its charts, and the records to look at one by one.

import { Charts } from "./charts.js";
import { get, h, text, throttle } from "./dom.js";
import { bytes, count, inJobs, ofJob } from "./format.js";
import { Picture } from "./picture.js";
import { shown } from "./tree.js";

/** More than the agent keeps of a series. */
const MOST_POINTS = 4096;

export class ModulePanel {
  /** `isLive()`: parts may still come. `onTab(key)`: the user looks at another kind or leaf. */
  constructor(model, module, wanted, isLive, onTab) {
    Object.assign(this, { model, module, wanted, isLive, onTab });
    this.series = new Map();
    // Meanings of kinds, in order.
    this.kinds = new Map();
    this.clock = 0;
    this.tab = null;
    this.records = [];
    this.at = -1;
    this.follow = true;
    this.charts = new Charts((step) => this.pickStep(step));
    this.picture = new Picture();
    this.tabs = h("div", { class: "tabs", role: "tablist", "aria-label": "Kinds and leaves", onkeydown: (e) => this.tabKey(e) });
    this.about = h("span", { class: "quiet" });
    this.build();
    this.refresh = throttle(250, () => this.fetchSeries());
    this.asked = 0;
    this.look = throttle(120, () => this.fetchTensor());
    // Following costs the agent a read each time: slower, and not for a page that nobody sees.
    this.lookNewest = throttle(1000, () => (document.hidden ? null : this.fetchTensor()));
    this.resized = new ResizeObserver(throttle(100, () => {
      this.charts.draw();
      if (this.picture.look) this.picture.drawBars();
    }));
    this.resized.observe(this.element);
    this.refresh();
  }

  build() {
    this.slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Record", id: "record", oninput: () => this.slide() });
    this.where = h("output", { class: "where", for: "record" });
    const step = (by, label, sign) => h("button", { type: "button", "aria-label": label, title: label, onclick: () => this.pick(this.at + by, false) }, sign);
    this.followBox = h("input", { type: "checkbox", checked: true, onchange: () => this.setFollow() });
    this.rank = h("select", { "aria-label": "Whole tensor or one rank's part", onchange: () => this.look() }, h("option", { value: "" }, "whole"));
    this.status = h("p", { class: "status", role: "status", hidden: true });
    this.below = h("section", { class: "records", "aria-label": "One record" },
      h("div", { class: "picker" }, step(-1, "Previous record", "‹"), this.slider, step(1, "Next record", "›"), this.where,
        this.rank, h("label", { class: "quiet" }, this.followBox, "newest")),
      this.status, this.picture.element);
    this.picture.element.hidden = true;
    this.element = h("div", { class: "module" },
      h("div", { class: "title" }, h("h2", {}, shown(this.module)), this.about), this.tabs, this.charts.element, this.below);
  }

  close() {
    this.resized.disconnect();
    this.gone = true;
  }

  async fetchSeries() {
    if (this.gone) return;
    let answer;
    try {
      answer = await get("/api/series", { model: this.model, module: this.module, since: this.clock });
    } catch (error) {
      if (!(error instanceof TypeError)) this.say(error.message);
      return;
    }
    if (this.gone) return;
    this.clock = answer.clock;
    this.kinds = new Map(answer.kinds);
    let grew = false;
    for (const one of answer.series) {
      const known = this.series.get(one.id) ?? { points: [] };
      grew ||= one.points.step.length > 0;
      this.series.set(one.id, { ...one, points: merge(known.points, one.points) });
    }
    // Steps of an earlier job or attempt are not those of the newest: they are for who reads the run.
    const newest = [...this.series.values()].reduce((a, b) => (a && inJobs(a, b) >= 0 ? a : b), null);
    for (const one of this.series.values()) if (inJobs(one, newest) < 0) this.series.delete(one.id);
    this.drawTabs();
    if (grew) this.drawTab();
  }

  /** The agent came back, perhaps another one: what was known does not count. */
  restart() {
    this.series.clear();
    this.clock = 0;
    this.refresh();
  }

  groups() {
    const out = new Map();
    for (const one of this.series.values()) {
      const key = `${one.kind} ${one.path}`;
      if (!out.has(key)) out.set(key, { key, kind: one.kind, path: one.path, series: [], count: 0, bytes: 0 });
      const group = out.get(key);
      group.series.push(one);
      group.count += one.count;
      group.bytes += one.bytes;
    }
    const known = [...this.kinds.keys()];
    const order = (g) => known.indexOf(g.kind);
    return [...out.values()].sort((a, b) => order(a) - order(b) || (a.path < b.path ? -1 : 1));
  }

  drawTabs() {
    const groups = this.groups();
    const first = [...this.series.values()][0];
    text(this.about, first ? `${first.class}${first.group ? ` · group ${first.group}` : ""} · ${first.dtype}${ofJob(first)}` : "");
    if (groups.length === 0) {
      this.say("Nothing was captured of this module yet.");
      return;
    }
    if (!groups.some((g) => g.key === this.tab)) {
      const preferred = groups.find((g) => g.key === this.wanted) ?? groups.find((g) => g.kind === "forward") ?? groups[0];
      this.select(preferred.key);
    }
    const focused = this.tabs.contains(document.activeElement);
    this.tabs.replaceChildren(...groups.map((g) => h(
      "button", {
        type: "button", role: "tab", class: "tab", "data-key": g.key, title: `${this.kinds.get(g.kind)}: ${count(g.count)} records, ${bytes(g.bytes)}`,
        "aria-selected": String(g.key === this.tab), tabindex: g.key === this.tab ? 0 : -1, onclick: () => this.select(g.key),
      },
      h("span", {}, g.kind.replace("_", " ")), " ", h("code", {}, g.path), " ", h("small", {}, count(g.count)),
    )));
    if (focused) this.tabs.querySelector('[aria-selected="true"]')?.focus();
  }

  tabKey(event) {
    const all = [...this.tabs.children];
    const at = all.findIndex((tab) => tab.dataset.key === this.tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    this.select(all[to].dataset.key);
    this.tabs.querySelector('[aria-selected="true"]')?.focus();
  }

  select(key) {
    if (this.tab === key) return;
    this.tab = key;
    this.at = -1;
    this.records = [];
    for (const tab of this.tabs.children) {
      const on = tab.dataset.key === key;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    }
    this.onTab(key);
    this.drawTab();
  }

  drawTab() {
    const group = this.groups().find((g) => g.key === this.tab);
    if (!group) return;
    const lines = [...group.series].sort((a, b) => Number(b.train) - Number(a.train));
    const live = this.isLive();
    const points = new Map(lines.map((one) => [one, live ? settled(one.points) : one.points]));
    this.charts.load(lines.map((one) => ({ name: one.train ? "train" : "eval", train: one.train, points: points.get(one) })));
    const before = this.records[this.at];
    this.records = lines.flatMap((one) => points.get(one).map((p) => ({ ...p, train: one.train, series: one }))).sort(inOrder);
    this.slider.max = Math.max(0, this.records.length - 1);
    if (this.records.length === 0) return;
    if (this.follow || !before) this.pick(this.records.length - 1, true);
    else {
      const again = this.records.findIndex((r) => inOrder(r, before) === 0);
      if (again < 0) this.pick(Math.min(this.at, this.records.length - 1), this.follow);
      else {
        this.at = again;
        this.slider.value = again;
        this.tell();
      }
    }
  }

  pickStep(step) {
    const at = this.records.findIndex((r) => r.step === step);
    if (at >= 0) this.pick(at, false);
  }

  slide() {
    this.pick(Number(this.slider.value), false);
  }

  setFollow() {
    this.follow = this.followBox.checked;
    if (this.follow) this.pick(this.records.length - 1, true);
  }

  pick(at, follow) {
    if (at < 0 || at >= this.records.length) return;
    this.follow = follow;
    this.followBox.checked = follow;
    const same = this.at === at && this.shownRecord && inOrder(this.shownRecord, this.records[at]) === 0;
    this.at = at;
    this.slider.value = at;
    this.tell();
    this.charts.choose(this.records[at].step);
    if (same && this.shownTab === this.tab) return;
    if (follow && this.isLive() && this.shownTab === this.tab) this.lookNewest();
    else this.look();
  }

  tell() {
    const r = this.records[this.at];
    const words = [`step ${r.step}`, `micro ${r.micro}`, r.call > 0 ? `call ${r.call}` : null, r.repeat > 0 ? `repeat ${r.repeat}` : null,
      r.train ? "train" : "eval", Number.isInteger(r.apart) ? `of rank ${r.apart}` : null].filter(Boolean);
    text(this.where, words.join(" · "));
    this.slider.setAttribute("aria-valuetext", words.join(", "));
  }

  async fetchTensor(tries = 4) {
    const record = this.records[this.at];
    if (this.gone || !record) return;
    const { kind, path } = record.series;
    this.asked += 1;
    const [tab, mine] = [this.tab, this.asked];
    const { step, micro, call, repeat, train } = record;
    const apart = record.apart ?? undefined;
    const { job, attempt } = record.series;
    const rank = this.rank.value === "" ? undefined : this.rank.value;
    try {
      const look = await get("/api/tensor", { job, attempt, model: this.model, module: this.module, kind, path, step, micro, call, repeat, train, apart, rank });
      if (this.gone || this.tab !== tab || this.asked !== mine) return;
      this.shownRecord = record;
      this.shownTab = tab;
      this.say("");
      this.picture.element.hidden = false;
      this.picture.load(look);
      this.offerRanks([...new Set(look.parts.map((p) => p.rank))]);
    } catch (error) {
      if (this.gone || this.asked !== mine) return;
      // The newest record's other parts are on their way.
      if (this.follow && tries > 1 && /incomplete|not yet|sent a checksum/.test(error.message)) {
        await new Promise((done) => setTimeout(done, 250));
        return this.fetchTensor(tries - 1);
      }
      this.shownRecord = null;
      // A failed connection: the page tells of the agent's end once, at its top.
      this.say(error instanceof TypeError ? "Only the agent can read this record, and it has ended." : error.message);
    }
  }

  offerRanks(ranks) {
    const have = [...this.rank.options].slice(1).map((o) => Number(o.value));
    if (have.length === ranks.length && have.every((r, i) => r === ranks[i])) return;
    const chosen = this.rank.value;
    this.rank.replaceChildren(h("option", { value: "" }, "whole"), ...ranks.map((r) => h("option", { value: r }, `rank ${r}`)));
    this.rank.value = ranks.includes(Number(chosen)) && chosen !== "" ? chosen : "";
    this.rank.hidden = ranks.length < 2;
  }

  say(message) {
    text(this.status, message);
    this.status.hidden = message === "";
  }
}

function inOrder(a, b) {
  return a.step - b.step || a.micro - b.micro || a.call - b.call || a.repeat - b.repeat || (a.apart ?? -1) - (b.apart ?? -1)
    || Number(b.train) - Number(a.train);
}

/** Without the newest points whose other ranks' parts are still on their way. */
function settled(points) {
  let end = points.length;
  while (end > 0 && !points[end - 1].complete) end -= 1;
  // Parts that were lost never come.
  return points.length - end > 16 ? points : points.slice(0, end);
}

/** Points that came, column by column, into those that are known. */
function merge(known, columns) {
  const names = Object.keys(columns);
  const fresh = columns.step.map((_, i) => ({ ...Object.fromEntries(names.map((name) => [name, columns[name][i]])), train: true }));
  const out = known;
  for (const point of fresh) {
    let at = out.length;
    while (at > 0 && inOrder(out[at - 1], point) > 0) at -= 1;
    if (at > 0 && inOrder(out[at - 1], point) === 0) out[at - 1] = point;
    else out.splice(at, 0, point);
  }
  if (out.length > MOST_POINTS) out.splice(0, out.length - MOST_POINTS);
  return out;
}
