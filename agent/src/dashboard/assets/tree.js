// The module tree on the left: built from dotted names, live counts, arrow keys.

import { h, text } from "./dom.js";
import { brief, count } from "./format.js";

const ROOT_NAME = "(root)";
/** Larger models start with only their tapped modules shown. */
const SMALL = 80;

/** The name as people see it; the model itself has none. */
export function shown(module) {
  return module === "" ? ROOT_NAME : module;
}

export class Tree {
  /** `choose(model, module)` is called when the user picks a module. */
  constructor(element, filter, tapped, choose) {
    this.element = element;
    this.filter = filter;
    this.tapped = tapped;
    this.choose = choose;
    this.roots = [];
    this.nodes = new Map();
    this.open = new Map();
    this.chosen = null;
    this.cursor = null;
    this.settled = false;
    filter.addEventListener("input", () => this.draw());
    filter.addEventListener("keydown", (event) => this.fromFilter(event));
    tapped.addEventListener("change", () => {
      this.settled = true;
      this.draw();
    });
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("click", (event) => this.click(event));
  }

  /** Takes the trees and series of `/api/modules`. */
  load(models, series) {
    const old = this.nodes;
    this.nodes = new Map();
    this.roots = [];
    const numbers = new Set([...models.map((m) => m.model), ...series.map((x) => x.model)]);
    for (const model of [...numbers].sort((a, b) => a - b)) {
      const known = models.find((m) => m.model === model)?.modules ?? [];
      const root = this.node(model, "", null);
      root.label = numbers.size > 1 ? `${ROOT_NAME} · model ${model}` : ROOT_NAME;
      this.roots.push(root);
      for (const { name, class: kind, kinds } of known) {
        const node = this.place(model, name);
        node.class = kind;
        node.kinds = kinds;
        node.taps ||= kinds.length > 0;
      }
    }
    for (const one of series) {
      const node = this.place(one.model, one.module);
      node.class ||= one.class;
      node.taps = true;
      node.own += one.count;
      node.bad += one.bad;
    }
    for (const node of this.nodes.values()) node.row = old.get(node.key)?.row ?? null;
    this.roots.forEach((root) => this.total(root));
    if (!this.settled) this.tapped.checked = this.nodes.size > SMALL && this.roots.some((r) => r.tapsBelow);
    this.draw();
  }

  node(model, name, parent) {
    const key = `${model}/${name}`;
    const label = name.slice(name.lastIndexOf(".") + 1);
    const node = {
      key, model, name, label, parent, children: [], class: "", kinds: [], taps: false,
      tapsBelow: false, own: 0, bad: 0, all: 0, row: null,
      depth: parent ? parent.depth + 1 : 0, inner: [], level: 0, lead: "",
    };
    this.nodes.set(key, node);
    parent?.children.push(node);
    return node;
  }

  place(model, name) {
    const known = this.nodes.get(`${model}/${name}`);
    if (known) return known;
    const dot = name.lastIndexOf(".");
    return this.node(model, name, this.place(model, dot < 0 ? "" : name.slice(0, dot)));
  }

  total(node) {
    node.children.forEach((child) => this.total(child));
    node.all = node.children.reduce((sum, child) => sum + child.all, node.own);
    node.tapsBelow = node.taps || node.children.some((child) => child.tapsBelow);
  }

  /** `more` records came of a series of this module. */
  add(model, module, more, bad) {
    const node = this.nodes.get(`${model}/${module}`);
    if (!node) return;
    node.own += more;
    node.bad += bad;
    for (let up = node; up; up = up.parent) {
      up.all += more;
      this.badge(up);
    }
  }

  isOpen(node) {
    if (this.words().length > 0) return true;
    return this.open.get(node.key) ?? (node.depth < 1 || (node.inner.some((child) => child.tapsBelow) && this.nodes.size <= 4 * SMALL));
  }

  words() {
    return this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  }

  /** The rows to show, in order; sets each node's `inner` (children that may show), `level` and `lead`. */
  visible() {
    const words = this.words();
    const only = this.tapped.checked;
    const matches = (node) => {
      const hay = `${shown(node.name)} ${node.class}`.toLowerCase();
      return words.every((word) => hay.includes(word)) && (!only || node.taps);
    };
    const keep = (node) => {
      node.inner = node.children.filter(keep);
      return node.inner.length > 0 || matches(node);
    };
    const out = [];
    const walk = (node, level, lead) => {
      const [child] = node.inner;
      // A module that is there only to hold one other shares its line.
      if (only && node.parent && !node.taps && node.inner.length === 1) {
        walk(child, level, `${lead}${node.label}.`);
        return;
      }
      Object.assign(node, { level, lead });
      out.push(node);
      if (this.isOpen(node)) node.inner.forEach((one) => walk(one, level + 1, ""));
    };
    this.roots.filter(keep).forEach((root) => walk(root, 0, ""));
    return out;
  }

  draw() {
    const nodes = this.visible();
    const focused = this.element.contains(document.activeElement);
    if (!nodes.includes(this.cursor)) {
      this.cursor = nodes.find((node) => node.key === this.chosen) ?? nodes[0] ?? null;
    }
    const rows = nodes.map((node) => this.row(node));
    if (rows.length === 0) {
      const why = this.nodes.size === 0 ? "No model yet: its modules appear when it is first used." : "No module matches.";
      rows.push(h("p", { class: "empty" }, why));
    }
    this.element.replaceChildren(...rows);
    if (focused && this.cursor) this.cursor.row.focus();
  }

  row(node) {
    if (!node.row) {
      node.row = h(
        "div", { role: "treeitem", class: "row" },
        h("span", { class: "twist", "aria-hidden": "true" }), h("span", { class: "name" }),
        h("span", { class: "class" }), h("span", { class: "badge" }),
      );
    }
    const row = node.row;
    const [twist, name, kind] = row.children;
    const leaf = node.inner.length === 0;
    row.dataset.key = node.key;
    row.style.setProperty("--depth", node.level);
    row.tabIndex = node === this.cursor ? 0 : -1;
    row.setAttribute("aria-level", node.level + 1);
    row.setAttribute("aria-selected", node.key === this.chosen);
    if (leaf) row.removeAttribute("aria-expanded");
    else row.setAttribute("aria-expanded", this.isOpen(node));
    row.classList.toggle("taps", node.taps);
    row.title = `${shown(node.name)}${node.kinds.length ? ` — tapped: ${node.kinds.join(", ")}` : ""}`;
    text(twist, leaf ? "" : "▸");
    text(name, node.lead + (node.label || ROOT_NAME));
    text(kind, node.class);
    this.badge(node);
    return row;
  }

  badge(node) {
    if (!node.row) return;
    const badge = node.row.lastElementChild;
    const n = node.taps ? node.own : node.all;
    text(badge, node.taps || n > 0 ? brief(n) : "");
    badge.classList.toggle("own", node.taps);
    badge.classList.toggle("bad", node.bad > 0);
    badge.setAttribute("aria-label", `${count(n)} records${node.bad > 0 ? `, ${node.bad} with NaN or infinity` : ""}`);
  }

  /** Marks the module that the panel shows, and opens the way to it. */
  mark(model, module) {
    this.chosen = model === null ? null : `${model}/${module}`;
    const node = this.nodes.get(this.chosen);
    for (let up = node?.parent; up; up = up.parent) if (!this.isOpen(up)) this.open.set(up.key, true);
    if (node) this.cursor = node;
    this.draw();
    node?.row?.scrollIntoView({ block: "nearest" });
  }

  toggle(node, open = !this.isOpen(node)) {
    this.open.set(node.key, open);
    this.draw();
  }

  click(event) {
    const row = event.target.closest(".row");
    const node = row && this.nodes.get(row.dataset.key);
    if (!node) return;
    this.cursor = node;
    if (event.target.classList.contains("twist") || (!node.taps && node.inner.length > 0)) this.toggle(node);
    else this.choose(node.model, node.name);
  }

  fromFilter(event) {
    if (event.key === "ArrowDown" && this.cursor) {
      event.preventDefault();
      this.cursor.row.focus();
    } else if (event.key === "Escape") {
      this.filter.value = "";
      this.draw();
    }
  }

  key(event) {
    const nodes = this.visible();
    const at = nodes.indexOf(this.cursor);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const node = this.cursor;
    const go = (to) => {
      if (!to) return;
      this.cursor = to;
      this.draw();
      to.row.focus();
    };
    const inner = node.inner.length > 0;
    const outer = nodes.slice(0, at).findLast((one) => one.level < node.level);
    const actions = {
      ArrowDown: () => go(nodes[at + 1]),
      ArrowUp: () => go(nodes[at - 1]),
      Home: () => go(nodes[0]),
      End: () => go(nodes[nodes.length - 1]),
      ArrowRight: () => (inner && !this.isOpen(node) ? this.toggle(node, true) : inner && go(nodes[at + 1])),
      ArrowLeft: () => (inner && this.isOpen(node) ? this.toggle(node, false) : go(outer)),
      Enter: () => this.choose(node.model, node.name),
      " ": () => this.choose(node.model, node.name),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}
