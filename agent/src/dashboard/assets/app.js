// The page: keeps in step with the agent, and puts header, tree and panel together.

import { get, h, text, throttle } from "./dom.js";
import { bytes, count, inJobs, natural, number, ofJob } from "./format.js";
import { ModulePanel } from "./module.js";
import { Tree, shown } from "./tree.js";

const byId = (id) => document.getElementById(id);
const STATES = {
  waiting: "waiting for the job", live: "live", idle: "ranks have left", finished: "finished", lost: "agent lost",
};
/** Rates are taken over this many milliseconds. */
const RATE_WINDOW = 4000;
const MOST_ROWS = 300;

const series = new Map();
const history = [];
let state = "connecting";
let delta = null;
let panel = null;
let overview = null;
let directory = "RUN";

const tree = new Tree(byId("tree"), byId("filter"), byId("tapped"), (model, module) => go(model, module));

// ---- header ----

const tiles = new Map();
for (const [key, label, title] of [
  ["step", "step", "Largest optimizer step seen"],
  ["records", "records", "Whole tensors captured"],
  ["bytes", "bytes", "Tensor bytes stored"],
  ["rate", "rate", "Over the last seconds"],
  ["dropped", "dropped", "Parts lost: slab full, agent absent, disk full"],
  ["refused", "refused", "Tensors refused for a named reason: see the notices"],
  ["divergences", "divergences", "Replicas that should be equal and are not"],
]) {
  const value = h("dd", {}, "–");
  tiles.set(key, value);
  byId("tiles").append(h("div", { title, "data-tile": key }, h("dt", {}, label), value));
}

function setState(next) {
  if (state === next) return;
  state = next;
  panel?.drawTab();
  const pill = byId("state");
  text(pill, STATES[next] ?? next);
  pill.dataset.state = next;
  drawBanner();
}

/** What to do once nobody answers any more. */
function drawBanner() {
  const banner = byId("banner");
  const read = [" What is on this page stays; read on with ", h("code", {}, `flexmodel show ${directory} MODULE`), " or ", h("code", {}, `flexmodel.open("${directory}")`), "."];
  const exit = delta?.exit_code ?? null;
  const over = exit === null ? "The run is over" : `The command ended with exit code ${exit}`;
  const finished = delta?.shown_again ? [`${over}. This page shows what it captured.`] : [`${over}, and its agent has ended.`, ...read];
  const said = {
    finished,
    lost: ["The agent does not answer; if it comes back, this page goes on by itself.", ...read],
  }[state];
  banner.hidden = said === undefined;
  banner.classList.toggle("lost", state === "lost");
  banner.replaceChildren(...(said ?? []));
}

function drawTiles() {
  const { totals, step } = delta;
  const now = performance.now();
  history.push({ now, records: totals.records, bytes: totals.bytes });
  while (history.length > 2 && now - history[1].now > RATE_WINDOW) history.shift();
  const tile = (key, value, alarm = false) => {
    text(tiles.get(key), value);
    tiles.get(key).parentElement.classList.toggle("alarm", alarm);
  };
  tile("step", totals.records > 0 ? count(step) : "–");
  tile("records", count(totals.records));
  tile("bytes", bytes(totals.bytes));
  tile("dropped", count(totals.dropped), totals.dropped > 0);
  tile("refused", count(totals.refused), totals.refused > 0);
  tile("divergences", count(totals.divergences), totals.divergences > 0);
  drawRate();
}

function drawRate() {
  const [first, last] = [history[0], history[history.length - 1]];
  const quiet = !last || performance.now() - last.now > RATE_WINDOW || state === "finished" || state === "lost";
  if (quiet || last.now - first.now < 500) {
    text(tiles.get("rate"), "–");
    return;
  }
  const seconds = (last.now - first.now) / 1000;
  text(tiles.get("rate"), `${number((last.records - first.records) / seconds, 3)}/s · ${bytes((last.bytes - first.bytes) / seconds)}/s`);
}

// ---- run, notices, ranks ----

const loadRun = throttle(1000, async () => {
  const run = await get("/api/run");
  const command = run.info.command.join(" ");
  directory = run.dir;
  const newest = run.revisions[run.revisions.length - 1];
  text(byId("hooks"), newest ? newest.words : run.info.hooks ? `hooks  ${run.info.hooks}` : "");
  byId("hooks").title = [`hooks: ${run.info.hooks}`, ...run.revisions.map((r) => `${r.words}${ofJob(r)}`)].join("\n");
  text(byId("command"), command);
  byId("command").title = `${command}\nhooks: ${run.info.hooks}\ntorch ${run.info.torch || "?"}, Python ${run.info.python || "?"}, ${run.info.wrapper || "no wrapper known"}, world ${run.info.world}`;
  document.title = `FlexModel${run.info.command.length ? ` · ${command.slice(0, 60)}` : ""}`;
  const lines = [
    ...run.divergences.map((d) => ["bad", `Rank ${d.rank} differs from rank ${d.against}: ${d.record}`]),
    ...run.refusals.map((r) => ["warn", `${shown(r.module)} ${r.kind} ${r.path}: ${r.reason} (${count(r.count)}×)`]),
    ...run.notices.map((n) => ["", n]),
  ];
  text(byId("notice-count"), String(lines.length));
  byId("notices").classList.toggle("some", lines.length > 0);
  byId("notice-list").replaceChildren(...(lines.length ? lines.map(([kind, line]) => h("p", { class: `note ${kind}` }, line)) : [h("p", { class: "empty" }, "Nothing to report.")]));
  const on = run.ranks.filter((r) => r.attached).length;
  text(byId("rank-count"), `${on} of ${Math.max(run.info.world, run.ranks.length)}`);
  const head = h("thead", {}, h("tr", {}, ["rank", "pid", "parts", "bytes", "lost"].map((name) => h("th", { scope: "col" }, name))));
  const rows = run.ranks.slice(0, MOST_ROWS).map((r) => h(
    "tr", { class: r.attached ? "" : "off", title: r.attached ? "attached" : "has left" },
    h("td", {}, String(r.rank)), h("td", {}, r.pid ? String(r.pid) : "–"), h("td", {}, count(r.parts)),
    h("td", {}, bytes(r.bytes)), h("td", { class: r.dropped > 0 ? "bad" : "" }, count(r.dropped)),
  ));
  byId("rank-list").replaceChildren(rows.length ? h("table", { class: "ranks" }, head, h("tbody", {}, rows)) : h("p", { class: "empty" }, "No rank attached yet."));
});

// ---- modules ----

const loadModules = throttle(500, async () => {
  const answer = await get("/api/modules");
  for (const one of answer.series) {
    const known = series.get(one.id);
    if (known && known.clock > answer.clock) Object.assign(one, { count: known.count, bytes: known.bytes, bad: known.bad, last: known.last, clock: known.clock });
    else one.clock = answer.clock;
    series.set(one.id, one);
  }
  tree.load(answer.models, [...series.values()]);
  if (!panel) drawOverview();
});

function takeSeries(changes, clock) {
  let unknown = false;
  for (const [id, next] of changes) {
    const one = series.get(id);
    if (!one) {
      unknown = true;
      continue;
    }
    tree.add(one.model, one.module, next.count - one.count, next.bad - one.bad);
    Object.assign(one, next, { clock });
    if (panel && one.model === panel.model && one.module === panel.module) panel.refresh();
  }
  if (unknown) loadModules();
  if (!panel && changes.length > 0) drawOverview();
}

// ---- overview ----

const drawOverview = throttle(500, () => {
  if (panel) return;
  if (!overview) overview = buildOverview();
  if (byId("panel").firstElementChild !== overview.element) byId("panel").replaceChildren(overview.element);
  overview.draw();
});

function buildOverview() {
  const body = h("tbody");
  const more = h("p", { class: "quiet" });
  const hint = h("p", { class: "empty" }, "Nothing captured yet. Records appear here as soon as a tapped module runs.");
  const names = ["module", "what", "mode", "records", "step", "mean", "std", "l2 norm", "abs max"];
  const table = h("table", { class: "overview" },
    h("thead", {}, h("tr", {}, names.map((name, i) => h("th", { scope: "col", class: i > 2 ? "n" : "" }, name)))), body);
  const rows = new Map();
  const row = (one) => {
    const cells = names.map((_, i) => h("td", { class: i > 2 ? "n" : "" }));
    const link = h("a", { href: address(one.model, one.module, `${one.kind} ${one.path}`) }, shown(one.module));
    cells[0].append(link);
    cells[1].append(one.kind.replace("_", " "), " ", h("code", {}, one.path));
    cells[2].append(one.train ? "train" : "eval", ofJob(one));
    return { line: h("tr", {}, cells), cells };
  };
  const draw = () => {
    const all = [...series.values()].sort((a, b) => inJobs(b, a) || a.model - b.model || natural(a.module, b.module) || natural(a.kind, b.kind) || natural(a.path, b.path) || Number(b.train) - Number(a.train));
    const lines = all.slice(0, MOST_ROWS).map((one) => {
      if (!rows.has(one.id)) rows.set(one.id, row(one));
      const { line, cells } = rows.get(one.id);
      const [step, values] = one.last ?? [null, [null, null, null, null]];
      [count(one.count), step === null ? "–" : count(step), ...values.map((v) => number(v))].forEach((value, i) => text(cells[i + 3], value));
      line.classList.toggle("bad", one.bad > 0);
      line.title = one.bad > 0 ? `NaN or infinity in ${count(one.bad)} records` : "";
      return line;
    });
    if (body.children.length !== lines.length || lines.some((line, i) => body.children[i] !== line)) body.replaceChildren(...lines);
    text(more, all.length > MOST_ROWS ? `and ${count(all.length - MOST_ROWS)} more: choose a module on the left` : "");
    table.hidden = all.length === 0;
    hint.hidden = all.length > 0;
  };
  const title = h("div", { class: "title" }, h("h2", {}, "Everything captured"), h("span", { class: "quiet" }, "the newest record of each tensor"));
  return { element: h("div", { class: "module" }, title, table, more, hint), draw };
}

// ---- where we are ----

function address(model, module, tab) {
  return `#/${[model, module, tab].filter((part) => part !== undefined).map(encodeURIComponent).join("/")}`;
}

function go(model, module) {
  location.hash = address(model, module);
}

function route() {
  const parts = location.hash.startsWith("#/") ? location.hash.slice(2).split("/").map(decodeURIComponent) : [];
  if (parts.length < 2) {
    panel?.close();
    panel = null;
    tree.mark(null, null);
    drawOverview();
    return;
  }
  const [model, module, tab] = [Number(parts[0]), parts[1], parts[2]];
  if (panel?.model === model && panel.module === module) {
    if (tab) panel.select(tab);
    return;
  }
  panel?.close();
  const isLive = () => state === "live" || state === "waiting" || state === "connecting";
  panel = new ModulePanel(model, module, tab, isLive, (key) => window.history.replaceState(null, "", address(model, module, key)));
  byId("panel").replaceChildren(panel.element);
  tree.mark(model, module);
}

addEventListener("hashchange", route);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  event.preventDefault();
  byId("filter").focus();
});

// ---- the stream ----

let opened = 0;
const stream = new EventSource("/events");
stream.addEventListener("open", () => {
  opened += 1;
  if (opened === 1) return;
  // Another agent may answer now: its series have numbers of their own.
  series.clear();
  overview = null;
  history.length = 0;
  panel?.restart();
  loadModules();
});
stream.addEventListener("message", (event) => {
  delta = JSON.parse(event.data);
  setState(delta.state);
  drawTiles();
  takeSeries(delta.series, delta.clock);
  if (delta.state === "finished") {
    // The agent is about to end.
    panel?.refresh.now();
    loadModules.now();
    loadRun.now();
    return;
  }
  if (delta.run) loadRun();
  if (delta.models) loadModules();
});
stream.addEventListener("error", () => {
  if (state !== "finished" || delta?.shown_again) setState("lost");
});
setInterval(drawRate, 1000);
addEventListener("unhandledrejection", (event) => {
  // A request that fails because the agent is gone is told by the state, once.
  if (event.reason instanceof TypeError) event.preventDefault();
});

loadRun();
loadModules();
route();
