"""The script of the page, as text: it joins the data, fills the charts and shows where a mark
comes from.
"""

# In a function: Vega's bundle has names of its own.
SCRIPT = """
(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const options = {actions: false, renderer: "svg"};

function rows(columns) {
  const names = Object.keys(columns).filter(n => n !== "grids");
  const read = names.map(n => columns[n].of ? i => columns[n].of[columns[n].at[i]]
                                            : i => columns[n][i]);
  const first = names.length ? columns[names[0]] : [];
  const made = new Array((first.of ? first.at : first).length);
  for (let i = 0; i < made.length; i++) {
    const row = made[i] = {};
    names.forEach((name, k) => { row[name] = read[k](i); });
  }
  return made;
}

const replicas = rows(data.replicas), evaluations = rows(data.evaluations);
for (const r of replicas) {
  const shift = Math.floor((r.replica % 7 + 1) / 2) * (1 - r.replica % 2 * 2);
  r.spread = r.params * 10 ** (0.02 * shift);
  r.shift = shift / 4;
}

// Every evaluation of one metric, joined with its replica; `only` keeps the last of each.
function measured(key, only) {
  const found = data.values[key];
  if (!found) return [];
  const last = new Map(found.last.map((e, i) => [e, i])), made = [];
  data.evaluations.grids[found.grid].forEach((e, i) => {
    const end = last.get(e);
    if (only && end === undefined) return;
    const row = Object.assign({}, replicas[evaluations[e].replica], evaluations[e]);
    row.replica = replicas[evaluations[e].replica].replica;
    Object.assign(row, {key, value: found.v[i], final: end !== undefined});
    if (row.final) {
      row.stderr = found.se[end];
      row.n = Array.isArray(found.n) ? found.n[end] : found.n;
    }
    made.push(row);
  });
  return made;
}

function rungs(key) { return data.rungs[key] ? rows(data.rungs[key]) : []; }

function fill(template, title, datasets) {
  const spec = structuredClone(template);
  if (spec.title) spec.title.text = title;
  spec.config.font = getComputedStyle(document.body).fontFamily;
  spec.datasets = datasets;
  // A layer without data has an infinite extent, and Vega complains of it.
  spec.layer = spec.layer.filter(la => (datasets[(la.data || spec.data).name] || []).length);
  return spec;
}

function curve(task, metric, x, templates, title) {
  const key = task + "/" + metric, known = data.tasks[task];
  if (!data.values[key]) return {layer: []};
  return fill(templates[x], title, {
    seeds: measured(key, x === "params"), rungs: rungs(key),
    onset: known ? known.onset.map(o => metric === "exact_match" ? o : {...o, label: ""}) : [],
    independent: templates === data.middle && metric === "exact_match"
      ? rungs(task + "/independent_match") : [],
    chance: known && metric === "exact_match" && known.chance !== null
      ? [{value: known.chance, label: "chance"}] : [],
    limits: data.rates.includes(metric) ? [{value: 0}, {value: 1}] : [],
  });
}

async function put(figure, spec) {
  const plot = figure.querySelector(".plot");
  if (!spec.layer.length) { plot.innerHTML = "<p class='small'>not measured</p>"; return; }
  const made = await vegaEmbed(plot, spec, options);
  made.view.addEventListener("click", (event, item) => {
    if (!item || !item.datum || item.datum.point === undefined) return;
    const {point, replica, key} = item.datum;  // a line has the rows of a whole training
    origin(item.mark.marktype === "line" ? {point, replica, key} : item.datum);
  });
}

// Where a mark comes from: the replica, the evaluation, the file, the command.
function origin(row) {
  const own = replicas.find(r => r.point === row.point && r.replica === row.replica);
  const step = row.step ?? Math.max(...evaluations.filter(
    e => replicas[e.replica] === own).map(e => e.step));
  const e = evaluations.find(v => replicas[v.replica] === own && v.step === step) || {};
  const number = v => v === null || v === undefined ? "–" : String(+Number(v).toPrecision(6));
  const metric = row.key ? row.key.split("/").pop() : "value";
  const value = row.value === undefined ? null
    : number(row.value) + (row.stderr ? " ± " + number(row.stderr) : "")
      + (row.n ? " (n = " + row.n + ")" : "");
  const commits = data.attempts[own.cell] || [];
  const answers = own.cell + "/answers/" + String(step).padStart(8, "0")
    + "-" + own.point + "-" + own.replica + ".npz";
  const here = location.protocol === "file:"
    ? decodeURIComponent(location.pathname).replace(/[/][^/]*$/, "") : data.folder;
  const quoted = /^[\\w.,/+-]+$/.test(here) ? here : "'" + here.replaceAll("'", "'\\\\''") + "'";
  const ability = row.key ? row.key.split("/").slice(0, 2).join("/") : "";
  const facts = [
    ["what", ability.replace("/", " ").replaceAll("_", " ")],
    [metric.replaceAll("_", " "), value],
    ["point", own.point + ", replica " + own.replica + " (" + own.role + ")"],
    ["size", own.layers + " layers × " + own.width + ", " + own.params.toLocaleString("en")
      + " parameters"],
    ["seeds", "init " + own.seed_init + ", data " + own.seed_data + ", dropout "
      + own.seed_dropout + ", eval " + own.seed_eval],
    ["learning rate", number(own.learning_rate)],
    ["step", step.toLocaleString("en")], ["tokens", e.tokens?.toLocaleString("en")],
    ["text loss", e.text_loss === null ? null : number(e.text_loss)],
    ["cell", own.cell + ", attempt " + (e.attempt ?? "–")],
    ["commit", commits[(e.attempt ?? 1) - 1]],
    ["answers", row.key && data.tasks[ability] ? answers : null],
  ];
  const list = $("origin").querySelector("dl");
  list.replaceChildren();
  for (const [name, text] of facts) {
    if (!text || text === "–") continue;
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = text;
    list.append(dt, dd);
  }
  $("origin").querySelector("code").textContent = "lm explain " + quoted + " " + own.point;
  $("origin").hidden = false;
}

async function drawCurves() {
  if (!$("metric")) return;
  const metric = $("metric").value, x = $("x").value;
  document.body.dataset.drawn = "";
  document.body.dataset.x = x === "params" ? "size" : "path";
  $("against").textContent = $("metric").selectedOptions[0].textContent + " against "
    + $("x").selectedOptions[0].textContent;
  for (const figure of document.querySelectorAll("figure.curve")) {
    await put(figure, curve(figure.dataset.task, metric, x, data.compact, ""));
  }
  document.body.dataset.drawn = metric + " " + x;
}

async function drawCloser() {
  const select = $("ability");
  if (!select) return;
  const task = select.value, known = data.tasks[task];
  document.body.dataset.closer = "";
  for (const part of document.querySelectorAll(".of")) part.hidden = part.dataset.task !== task;
  for (const figure of document.querySelectorAll("figure.closer")) {
    const {chart, metric} = figure.dataset;
    const spec = closer(task, known, chart, metric, figure);
    // Of an answer of one token there is no edit similarity.
    figure.hidden = chart === "mirage" && !spec.layer.length;
    await put(figure, spec);
  }
  document.body.dataset.closer = task;
}

function closer(task, known, chart, metric, figure) {
  const exact = task + "/exact_match", unit = [{value: 0}, {value: 1}];
  if (chart === "mirage") return curve(task, metric, "params", data.middle, "");
  if (chart === "collapse") {
    return curve(task, "exact_match", figure.dataset.x, data.large, "exact match");
  }
  if (chart === "strip") {
    const strip = measured(exact, true).filter(r => r.role === "ladder" && r.value !== null);
    const mark = known.mark;
    const groups = [];
    for (const r of strip) r.through = mark !== null && r.value > mark;
    for (const {params, groups: means} of known.shares) {
      for (const value of means) groups.push({params, value, shift: 0});
    }
    return fill(data.closer.strip, "exact match of every seed",
      {strip, groups, mark: mark === null ? [] : [{value: mark}], limits: unit});
  }
  if (chart === "share") {
    return fill(data.closer.share, "share of seeds that broke through", {rungs: known.shares});
  }
  if (chart === "survival") {
    return fill(data.closer.survival, "share that has emerged by then",
      {curves: known.curves, censored: known.censored});
  }
  const shown = known.predictions[known.predictions.length - 1];
  if (!shown) return {layer: []};
  const all = measured(exact, true).filter(r => r.role === "ladder" && r.value !== null);
  const came = all.filter(r => shown.bands.some(b => b.params === r.params));
  for (const r of came) r.registered = !shown.late.includes(r.params);
  return fill(data.closer.prediction, "exact match: predicted, and what came", {
    seen: all.filter(r => shown.seen.includes(r.params)), bands: shown.bands, came, limits: unit});
}

async function start() {
  for (const id of ["metric", "x"]) $(id)?.addEventListener("change", drawCurves);
  if ($("ability")) $("ability").addEventListener("change", drawCloser);
  for (const link of document.querySelectorAll("[data-open]")) {
    link.addEventListener("click", () => {
      $("ability").value = link.dataset.open;
      drawCloser();
    });
  }
  const close = () => { $("origin").hidden = true; };
  $("origin").querySelector("button").addEventListener("click", close);
  document.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
  await drawCurves();
  await drawCloser();
  for (const figure of document.querySelectorAll("figure.path")) {
    const {task, metric} = figure.dataset;
    const title = data.losses[task.split("/")[0]];
    await put(figure, curve(task, metric, "tokens", data.large, title));
  }
  for (const figure of document.querySelectorAll("figure.score")) {
    const {task, level, metric, title, chance} = data.scores[figure.dataset.index];
    const spec = curve(task + "/" + level, metric, "params", data.large, title);
    await put(figure, fill(data.large.params, title, {...spec.datasets, chance}));
  }
  for (const figure of document.querySelectorAll("figure.law")) await put(figure, data.law);
  document.body.dataset.ready = "yes";
}

start();
})();
"""
