"""The stylesheet of the page, for the screen and for paper, as text."""

CSS = """
:root { --ink: #1c1c1c; --soft: #5c5c5c; --line: #dddddd; --blue: #0059a6; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.5 "Source Sans 3", "Source Sans Pro", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 0 0 .7rem; padding-top: 1.3rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
h4 { font-size: .95rem; margin: 1.1rem 0 .3rem; color: var(--soft); font-weight: 600; }
section { margin-top: 2.4rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; white-space: pre-line; }
.small { color: var(--soft); font-size: .875rem; }
.note { border-left: 3px solid #d55e00; padding-left: .7rem; }
.counts { margin: 1.1rem 0 .2rem; display: flex; flex-wrap: wrap; gap: .4rem 1.1rem; }
.headlines { list-style: none; margin: .6rem 0 0; padding: 0; }
.headlines li { padding: .2rem 0; max-width: 62rem; }
.badge { color: #fff; border-radius: 3px; padding: .08rem .45rem; font-size: .78rem;
  white-space: nowrap; }
.toolbar { position: sticky; top: 0; z-index: 2; background: #fffffff2; display: flex;
  gap: .4rem 1.5rem; flex-wrap: wrap; align-items: center; padding: .6rem 0; margin: .4rem 0 0;
  border-bottom: 1px solid var(--line); }
.toolbar label { color: var(--soft); font-size: .9rem; }
select, button { font: inherit; color: var(--ink); padding: .2rem .4rem; border: 1px solid #999;
  border-radius: 4px; background: #fff; max-width: 22rem; }
select { margin-left: .3rem; }
:is(select, button, a, summary):focus-visible { outline: 2px solid var(--blue);
  outline-offset: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; color: var(--soft);
  font-size: .85rem; margin: .6rem 0 0; align-items: center; }
.legend svg { vertical-align: -2px; margin-right: .3rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%;
  margin-right: .3rem; vertical-align: -1px; }
body[data-x="path"] .bysize, body:not([data-x="path"]) .bypath { display: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr));
  gap: .9rem .8rem; }
.mirages { grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 1rem 1.2rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .875rem; font-weight: 600; display: flex; gap: .45rem; align-items: center;
  line-height: 1.3; margin-bottom: .1rem; }
figcaption .badge { font-weight: 400; font-size: .66rem; padding: .05rem .3rem; }
.curve { display: flex; flex-direction: column; justify-content: flex-end; }
.curve figcaption { font-size: .82rem; gap: .35rem; }
figcaption small { color: var(--soft); font-weight: 400; }
.plot svg { max-width: 100%; height: auto; display: block; }
.plot path, .plot .mark-symbol path { cursor: default; }
.plot .mark-symbol path { cursor: pointer; }
.curve .plot, .mirage .plot { min-height: 140px; }
.pair .plot { min-height: 310px; }
.vega-embed { display: block !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .32rem .8rem .32rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tr.titles th, thead th { color: var(--soft); font-weight: 400; vertical-align: bottom;
  line-height: 1.25; }
tr.group th { padding-top: .9rem; color: var(--soft); font-weight: 600; border-bottom-color: #999; }
td.nr, th.nr { text-align: right; white-space: nowrap; }
td.nw { white-space: nowrap; }
td.why { min-width: 10rem; color: var(--soft); line-height: 1.3; }
.verdicts { width: 100%; }
.verdicts th a { color: inherit; text-decoration: none; border-bottom: 1px dotted #999; }
.verdicts th a:hover { color: var(--blue); border-color: var(--blue); }
.verdicts { font-size: .82rem; }
.verdicts td, .verdicts th { white-space: nowrap; padding-right: .55rem; }
.verdicts :is(td, th):last-child { padding-right: 0; }
.verdicts td.why { white-space: normal; }
td small { color: var(--soft); font-size: .75rem; }
.shares td { padding: .28rem .5rem; text-align: center; line-height: 1.2; }
.shares th + th { text-align: center; padding-right: 0; }
.shares small { display: block; }
.two { font-weight: 600; color: #a34700; }
.numbers td { text-align: right; padding-left: .9rem; }
.sum th, .sum td { border-top: 1px solid #888; }
.facts td { overflow-wrap: anywhere; }
.bar { display: inline-block; height: .6rem; background: #0072b2; vertical-align: 0; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--blue); }
pre { white-space: pre-wrap; font-size: .8rem; background: #f7f7f7; padding: 1rem;
  border-radius: 4px; overflow-x: auto; }
code { font-size: .85em; background: #f3f3f3; padding: .05rem .3rem; border-radius: 3px; }
#origin { position: fixed; right: 1rem; bottom: 1rem; z-index: 5; width: min(27rem, 94vw);
  background: #fff; border: 1px solid #bbb; border-radius: 6px; padding: .8rem 1rem;
  box-shadow: 0 6px 24px #0003; font-size: .85rem; }
[hidden] { display: none; }
#origin header { display: flex; justify-content: space-between; align-items: center; margin: 0; }
#origin button { border: 0; font-size: 1.1rem; line-height: 1; padding: .2rem .45rem; }
#origin dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: .4rem 0; }
#origin dt { color: var(--soft); }
#origin dd { margin: 0; overflow-wrap: anywhere; }
#origin code { display: block; user-select: all; padding: .35rem .5rem; overflow-wrap: anywhere; }
@page { size: A4; margin: 14mm 13mm; }
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 9.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h1 { font-size: 20pt; }
  h2, h3, h4, tr.group, h3 + .of { break-after: avoid; }
  .small { font-size: 8pt; }
  .toolbar, details, #origin, .screen { display: none; }
  section { margin-top: 1.4rem; }
  figure, tr, li, .of, .legend { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 7.4pt; }
  th, td { padding: .18rem .5rem .18rem 0; }
  .verdicts td, .verdicts th { padding-right: .4rem; }
  .verdicts .badge { font-size: 6.8pt; }
  .verdicts td.why { min-width: 3.2cm; }
  .verdicts th a { border: 0; }
  .shares td { padding: .15rem .3rem; }
  .panels { grid-template-columns: repeat(4, 1fr); gap: .5rem; }
  .mirages { grid-template-columns: repeat(3, 1fr); }
  .pair { grid-template-columns: 1fr 1fr; }
  .curve .plot, .mirage .plot, .pair .plot { min-height: 0; }
  figcaption { font-size: 8pt; flex-wrap: wrap; gap: .2rem; }
  .facts, .cost { break-inside: auto; }
  .paper { display: block; }
}
@media screen { .paper { display: none; } }
"""
