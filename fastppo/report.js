"use strict";
// All text comes from the run and is set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#30638e", "#d1495b", "#00798c", "#a05195", "#66a182", "#b07d62"];
const PAGE = 50;

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value; else if (name.startsWith("on")) node.addEventListener(name.slice(2), value); else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

// Curves

function points(metric) {
  const values = data.metrics[metric] || [];
  return values.map((value, index) => [data.steps[index], value]).filter(([, value]) => value !== null);
}
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) found.push(+tick.toPrecision(12));
  return found;
}
function chart(panel) {
  const lines = panel.lines.map(([metric, label], index) => ({ metric, label, colour: COLOURS[index % COLOURS.length], points: points(metric) })).filter((line) => line.points.length);
  if (!lines.length) return null;
  const W = 360, H = 190, left = 46, right = 8, top = 8, bottom = 20;
  const xs = lines.flatMap((line) => line.points.map((point) => point[0])), ys = lines.flatMap((line) => line.points.map((point) => point[1]));
  let x0 = xs.reduce((a, b) => Math.min(a, b)), x1 = xs.reduce((a, b) => Math.max(a, b));
  let y0 = ys.reduce((a, b) => Math.min(a, b)), y1 = ys.reduce((a, b) => Math.max(a, b)), cut = "";
  if (panel.limits && y0 < panel.limits[0]) { [y0, y1] = panel.limits; cut = `, cut at ${short(y0)}`; }
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  if (y0 === y1) { const pad = Math.abs(y0) * 0.1 || 1; y0 -= pad; y1 += pad; }
  const x = (step) => left + ((step - x0) / (x1 - x0)) * (W - left - right);
  const y = (value) => top + (1 - (Math.max(y0, Math.min(y1, value)) - y0) / (y1 - y0)) * (H - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": panel.title });
  for (const tick of ticks(y0, y1, 4)) {
    svg.append(draw("line", { class: "gridline", x1: left, x2: W - right, y1: y(tick), y2: y(tick) }), draw("text", { x: left - 5, y: y(tick) + 3, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of ticks(x0, x1, 5).filter(Number.isInteger)) svg.append(draw("text", { x: x(tick), y: H - 6, "text-anchor": "middle" }, String(tick)));
  for (const line of lines) {
    const path = line.points.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(draw("path", { d: path, fill: "none", stroke: line.colour, "stroke-width": 1.5 }));
    if (line.points.length === 1 || line.metric.startsWith("eval/")) {
      for (const [step, value] of line.points) svg.append(draw("circle", { cx: x(step), cy: y(value), r: 2.5, fill: line.colour }));
    }
  }
  const cursor = draw("line", { class: "cursor", x1: 0, x2: 0, y1: top, y2: H - bottom, visibility: "hidden" });
  svg.append(cursor);
  const key = make("div", { class: "key" });
  const say = (step) => {
    const texts = lines.map((line) => {
      const at = step === null ? null : line.points.find((point) => point[0] === step);
      const swatch = make("i"); swatch.style.background = line.colour;
      return make("span", {}, swatch, line.label + (at ? `: ${short(at[1])}` : ""));
    });
    key.replaceChildren(...(step === null ? [] : [make("span", { class: "soft" }, `step ${step}`)]), ...texts);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = x0 + (((event.clientX - box.left) / box.width) * W - left) / (W - left - right) * (x1 - x0);
    const step = xs.reduce((best, other) => (Math.abs(other - at) < Math.abs(best - at) ? other : best));
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible"); say(step);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); say(null); });
  say(null);
  return make("div", { class: "card chart" }, make("h3", {}, panel.title, make("span", { class: "soft" }, panel.unit ? ` (${panel.unit}${cut})` : cut)), svg, key);
}
function showCurves() {
  document.getElementById("panels").append(...data.panels.map(chart).filter(Boolean));
  const select = document.getElementById("metric");
  select.append(...Object.keys(data.metrics).sort().map((name) => make("option", {}, name)));
  const show = () => document.getElementById("single").replaceChildren(...[chart({ title: select.value, unit: "", lines: [[select.value, select.value]] })].filter(Boolean));
  select.addEventListener("change", show);
  if (select.value) show();
}

// Samples

const MEASURES = { logprobs: "log-prob", advantages: "advantage", values: "value" };
const view = { text: "", ended: "", step: [null, null], score: [null, null], order: "index", down: false, shown: PAGE, open: new Set(), colour: "logprobs" };
const inside = ([low, high], value) => (low === null && high === null) || (value !== null && (low === null || value >= low) && (high === null || value <= high));

function matching() {
  const wanted = view.text.toLowerCase();
  const found = data.samples.filter((sample) =>
    inside(view.step, sample.step) && inside(view.score, sample.score) && (!view.ended || sample.ended === view.ended) &&
    (!wanted || `${sample.prompt}\n${sample.completion}`.toLowerCase().includes(wanted)));
  const side = view.down ? -1 : 1, of = (sample) => sample[view.order];
  return found.sort((a, b) => (of(a) === of(b) ? a.index - b.index : of(a) === null ? 1 : of(b) === null ? -1 : of(a) < of(b) ? -side : side));
}
const LEAST_LIKELY = -6; // nats: what has the darkest colour
function colourOf(measure, value, largest) {
  if (value === null || value === undefined) return "transparent";
  if (measure === "logprobs") return `rgba(237, 137, 32, ${(0.75 * Math.min(1, value / LEAST_LIKELY)).toFixed(3)})`;
  const strength = (0.7 * Math.min(1, Math.abs(value) / (largest || 1))).toFixed(3);
  return value < 0 ? `rgba(209, 73, 91, ${strength})` : `rgba(48, 110, 170, ${strength})`;
}
function largestOf(numbers) { return (numbers || []).reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0); }
function scale(measure, largest) {
  const bar = make("i"), [low, high] = measure === "logprobs" ? [LEAST_LIKELY, 0] : [-largest, largest];
  const stops = [0, 0.25, 0.5, 0.75, 1].map((part) => colourOf(measure, low + part * (high - low), largest));
  bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  return make("span", { class: "scale" }, short(low) + (measure === "logprobs" ? " or less" : ""), bar, short(high));
}
function tokensOf(sample) {
  const numbers = sample[view.colour], largest = largestOf(numbers);
  const reading = make("div", { class: "reading" }, "point at a token to read its numbers");
  const spans = sample.tokens.map((text, place) => {
    const known = Object.entries(MEASURES).filter(([name]) => (sample[name] || [])[place] !== undefined && sample[name][place] !== null);
    const says = `${place + 1}: ${JSON.stringify(text)}  ` + known.map(([name, label]) => `${label} ${short(sample[name][place])}`).join("  ");
    const span = make("span", { class: "token", title: says, onpointerenter: () => { reading.textContent = says; } });
    span.append(...(text === "" ? [make("span", { class: "mark" }, "\u25ab")] : text.split(/(\n)/).filter(Boolean).flatMap((part) => (part === "\n" ? [make("span", { class: "mark" }, "\u23ce"), "\n"] : [part]))));
    span.style.background = colourOf(view.colour, (numbers || [])[place], largest);
    return span;
  });
  const name = MEASURES[view.colour];
  return [numbers ? scale(view.colour, largest) : make("span", { class: "scale" }, `no ${name}s: the sample was not learned from`), make("pre", {}, ...spans), reading];
}
function detail(sample) {
  const rewards = Object.entries(sample.rewards || {}).map(([name, score]) => `${name} ${score === null ? "invalid" : short(score)}`).join(", ");
  const cell = make("td", { colspan: 6, class: "detail" }, make("b", {}, "prompt"), make("pre", {}, asText(sample.prompt)), make("b", {}, "completion "));
  cell.append(...(sample.length ? tokensOf(sample) : [make("pre", {}, sample.completion)]));
  if (rewards) cell.append(make("div", { class: "soft" }, `rewards: ${rewards}`));
  return make("tr", {}, cell);
}
function asText(prompt) { return typeof prompt === "string" ? prompt : JSON.stringify(prompt, null, 1); }
function cut(text) { const line = text.replace(/\s+/g, " "); return line.length > 160 ? line.slice(0, 160) + "\u2026" : line; }
function rowsOf(sample) {
  const open = view.open.has(sample.index);
  const toggle = () => { if (open) view.open.delete(sample.index); else view.open.add(sample.index); showTable(); };
  const row = make("tr", { class: open ? "row open" : "row", tabindex: 0, onclick: toggle, onkeydown: (event) => { if (event.key === "Enter") toggle(); } },
    make("td", { class: "number" }, String(sample.step)), make("td", { class: "number" }, sample.score === null ? "invalid" : short(sample.score)),
    make("td", { class: "number" }, sample.length === null ? "" : String(sample.length)), make("td", {}, sample.ended || ""),
    make("td", { class: "text" }, cut(asText(sample.prompt))), make("td", { class: "text" }, cut(sample.completion)));
  return open ? [row, detail(sample)] : [row];
}
const COLUMNS = [["step", "step"], ["score", "score"], ["length", "tokens"], ["ended", "ended"], ["prompt", "prompt"], ["completion", "completion"]];
let table, count, more;
function showTable() {
  const found = matching();
  const head = COLUMNS.map(([key, label], place) => {
    const sort = () => { view.down = view.order === key ? !view.down : false; view.order = key; showTable(); };
    const arrow = view.order === key ? (view.down ? " \u2193" : " \u2191") : "";
    return make("th", place < 3 ? { class: "number" } : {}, make("button", { onclick: sort }, label + arrow));
  });
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...found.slice(0, view.shown).flatMap(rowsOf)));
  const left = data.samples_written - data.samples.length;
  count.textContent = `${found.length} of ${data.samples.length} samples` + (left ? ` (${left} more are in samples.jsonl)` : "");
  more.hidden = found.length <= view.shown;
}
function field(label, ...inputs) { return make("label", {}, label + " ", ...inputs); }
function range(name) {
  return [0, 1].map((side) => make("input", { type: "number", step: "any", placeholder: side ? "to" : "from", "aria-label": `${name} ${side ? "to" : "from"}`, oninput: (event) => {
    view[name][side] = event.target.value === "" ? null : Number(event.target.value); view.shown = PAGE; showTable();
  } }));
}
function choice(name, options, label) {
  return make("select", { "aria-label": label, onchange: (event) => { view[name] = event.target.value; view.shown = PAGE; showTable(); } }, ...options.map(([value, text]) => make("option", { value }, text)));
}
function showSamples() {
  const host = document.getElementById("samples");
  if (!data.samples.length) { host.append(make("p", { class: "soft" }, "This run has logged no samples.")); return; }
  const endings = [...new Set(data.samples.map((sample) => sample.ended).filter(Boolean))].sort();
  count = make("span", { class: "soft" });
  table = make("table");
  more = make("button", { onclick: () => { view.shown += PAGE; showTable(); } }, "show more");
  const search = make("input", { type: "search", placeholder: "text in prompt or completion", "aria-label": "text", oninput: (event) => { view.text = event.target.value; view.shown = PAGE; showTable(); } });
  host.append(make("div", { class: "filters" }, field("step", ...range("step")), field("score", ...range("score")),
    field("ended", choice("ended", [["", "any"], ...endings.map((ending) => [ending, ending])], "ended")), search,
    field("colour by", choice("colour", Object.entries(MEASURES), "colour by")), count), make("div", { class: "card scroll" }, table), make("p", {}, more));
  showTable();
}

// The rest

function showFindings() {
  const host = document.getElementById("findings");
  for (const { name, seen, advice } of data.findings) {
    host.append(make("div", { class: "card finding" }, make("b", {}, name), `: ${seen}`, make("ul", {}, ...advice.map((text) => make("li", {}, text)))));
  }
}
function tree(values) {
  return Object.entries(values).map(([key, value]) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) return make("details", { open: "" }, make("summary", {}, key), ...tree(value));
    return make("div", { class: "setting" }, `${key}: ${JSON.stringify(value)}`);
  });
}
function showSettings() {
  document.getElementById("settings").append(...(data.settings ? tree(data.settings) : ["The run folder holds no settings."]));
  for (const { step, time, changes } of data.history) {
    document.getElementById("history").append(make("p", { class: "soft" }, `${time || ""} from step ${step}: ${changes.join("; ") || (step ? "resumed" : "started")}`));
  }
}
document.title = `${data.name} \u2013 fastppo`;
document.getElementById("name").textContent = data.name;
document.getElementById("state").textContent = data.state;
data.samples.forEach((sample, index) => { sample.index = index; sample.length = sample.tokens.length || null; });
showFindings();
showCurves();
showSamples();
showSettings();
