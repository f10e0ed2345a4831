"""The stylesheet and the script of the page, as text."""

CSS = """
:root { --ink: #1c1c1c; --soft: #5c5c5c; --line: #dddddd; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; line-height: 1.5;
  font: 16px/1.5 "Source Sans 3", "Source Sans Pro", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
section { margin-top: 2.2rem; }
.toolbar + section { margin-top: 1.2rem; }
.toolbar + section h2 { border-top: 0; padding-top: 0; }
p { max-width: 44rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; white-space: pre-line; }
.small { color: var(--soft); font-size: .875rem; }
.note { border-left: 3px solid #d55e00; padding-left: .7rem; }
.headlines { list-style: none; margin: 1.4rem 0 0; padding: 0; }
.headlines li { padding: .35rem 0; max-width: 50rem; }
.badge { color: #fff; border-radius: 3px; padding: .05rem .45rem; margin: 0 .15rem;
  font-size: .8rem; white-space: nowrap; }
.toolbar { position: sticky; top: 0; z-index: 2; background: #fffffff2; display: flex; gap: 1.5rem;
  flex-wrap: wrap; padding: .7rem 0; margin-top: 1.4rem; border-bottom: 1px solid var(--line); }
.toolbar label { color: var(--soft); font-size: .9rem; }
select { font: inherit; color: var(--ink); padding: .25rem .4rem; margin-left: .3rem;
  border: 1px solid #999; border-radius: 4px; background: #fff; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(450px, 100%), 1fr));
  gap: 1.2rem 1rem; }
figure { margin: 0; overflow-x: auto; }
.plot { min-height: 310px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tr:first-child th:not(.key), thead th { color: var(--soft); font-weight: 400; white-space: nowrap; }
.shares td { padding: .3rem .55rem; text-align: center; }
.shares small { display: block; color: var(--soft); font-size: .72rem; }
.numbers td { text-align: right; padding-left: .9rem; }
.sum th, .sum td { border-top: 1px solid #888; }
.facts td { overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #0059a6; }
pre { white-space: pre-wrap; font-size: .8rem; background: #f7f7f7; padding: 1rem;
  border-radius: 4px; overflow-x: auto; }
@media print {
  main { max-width: none; padding: 0; }
  .toolbar, summary { display: none; }
  figure, tr, li { break-inside: avoid; }
  body { font-size: 11pt; }
}
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function rows(columns) {
  const names = Object.keys(columns);
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

function grouped(table) {
  const groups = new Map();
  for (const row of table) {
    const key = [row.task, row.level, row.metric].join("/");
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  return groups;
}

const seeds = grouped(rows(data.seeds)), rungs = grouped(rows(data.rungs));
const options = {actions: false, renderer: "svg"};

function filled(task, level, metric, x) {
  const key = [task, level, metric].join("/");
  const known = data.onsets.find(o => o.task === task && o.level === level);
  const spec = structuredClone(data.templates[x]);
  spec.title.text = known ? known.label + ": " + data.metrics[metric] : data.titles[task];
  spec.config.font = getComputedStyle(document.body).fontFamily;
  spec.datasets = {
    seeds: seeds.get(key) || [], rungs: rungs.get(key) || [],
    onset: known ? known.onset : [],
    chance: known && metric === "exact_match" ? [{value: known.chance}] : [],
    limits: data.rates.includes(metric) ? [{value: 0}, {value: 1}] : [],
  };
  // A layer without data has an infinite extent, and Vega complains of it.
  spec.layer = spec.layer.filter(layer => spec.datasets[layer.data.name].length);
  return spec;
}

async function put(figure, spec) {
  const plot = figure.querySelector(".plot");
  if (spec.layer.length) await vegaEmbed(plot, spec, options);
  else plot.textContent = spec.title.text + ": not measured";
}

async function draw() {
  const metric = document.getElementById("metric").value;
  const x = document.getElementById("x").value;
  document.body.dataset.drawn = "";
  for (const figure of document.querySelectorAll("figure.curve")) {
    const {task, level} = figure.dataset;
    await put(figure, filled(task, level, metric, x));
  }
  document.body.dataset.drawn = metric + " " + x;
}

async function start() {
  for (const id of ["metric", "x"]) document.getElementById(id).addEventListener("change", draw);
  await draw();
  for (const figure of document.querySelectorAll("figure.path")) {
    const {task, level, metric} = figure.dataset;
    await put(figure, filled(task, level, metric, "tokens"));
  }
  for (const figure of document.querySelectorAll("figure.law")) {
    await put(figure, data.law);
  }
  document.body.dataset.ready = "yes";
}

start();
"""
