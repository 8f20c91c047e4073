"use strict";
// What is shown is in `state`; every control changes it and calls `draw`. Text from the run reaches
// the page as text nodes, or through `plain` where plotly would read tags.
const $ = id => document.getElementById(id);
const COLOURS = ["#4477AA", "#EE6677", "#228833", "#BBA020", "#66CCEE", "#AA3377", "#DD8844", "#888888"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const state = { run: 0, stage: 0, number: "largest", chosen: [], axis: "symlog", view: "density",
  normalised: false, definition: "", pair: null, sort: ["", -1], filter: "", first: 0, second: 1 };
let data, store, steps, later = 0;

function inflated(id) { // text that was deflated, in base64
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
}
async function unpack() {
  const all = new Uint8Array(await inflated("data").arrayBuffer());
  const length = new DataView(all.buffer).getUint32(0, true);
  const planes = all.subarray(4 + length), count = planes.length / 2, numbers = new Int16Array(count);
  for (let i = 0; i < count; i++)
    numbers[i] = (i ? numbers[i - 1] : 0) + planes[i] + 256 * planes[count + i];
  return [JSON.parse(new TextDecoder().decode(all.subarray(4, 4 + length))), numbers];
}

// Reading -----------------------------------------------------------------------------------------
const plain = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = value => value === null || value === undefined || Number.isNaN(value) ? "not known"
  : value === 0 ? "0" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(2)
    : String(Number(value.toPrecision(3)));
// A value with the digits that its error allows, at most five, and the error.
function plusMinus(value, error) {
  if (error === null) return short(value) + " ± not known";
  const digits = error > 0 && value ? Math.floor(Math.log10(Math.abs(value) / error)) + 2 : 5;
  const kept = Number(value.toPrecision(Math.min(Math.max(digits, 2), 5)));
  return (Math.abs(kept) < 1e-3 || Math.abs(kept) >= 1e6 ? kept.toExponential() : String(kept)) + " ± "
    + (error && error < 1e-3 ? error.toExponential(1) : Number(error.toPrecision(2)));
}
const thisRun = () => data.runs[state.run];
const stageOf = run => run.steps.indexOf(steps[state.stage]);
// What a stage is called: by its step, or by its checkpoint; several runs may call a place differently.
const called = (step, some = data.runs) => [...new Set(some.flatMap(run => run.steps.includes(step) ? [run.called[run.steps.indexOf(step)]] : []))].join(" / ");
const brief = (step, some) => called(step, some).replace(/^(step|stage) /, "");
const blockOf = (run, name) => run.blocks.findIndex(block => block.name === name);
const parts = run => run.blocks.filter(block => block.kind !== "full");
const at = (run, number, part, block, stage) =>
  stage < 0 || block < 0 ? null : run.numbers[number][part][block][stage];

function written(run, number, block, stage) {
  const value = at(run, number, "value", block, stage);
  if (value === null) return "–";
  const error = at(run, number, "error", block, stage), sample = at(run, number, "data", block, stage);
  return (number === "error" ? short(value) : plusMinus(value, error)) + (sample === null ? "" : `; data ± ${short(sample)}`);
}

function curve(run, block, stage) {
  const { points, number, heads, density, density_error, tail, tail_low, tail_high } = run.curves;
  const k = stage < 0 || block < 0 ? -1 : number[block][stage];
  if (k < 0) return null;
  const [linear, low, high, top] = heads[k], { decade, unit, deepest } = data.scales;
  const read = (place, of) => Array.from(store.subarray(place + k * points, place + (k + 1) * points), of);
  const share = v => v <= -deepest * decade ? 0 : 10 ** (v / decade);
  const numel = run.blocks[block].numel, ends = ["largest", "smallest"];
  const norm = Math.max(...ends.map(end => Math.abs(at(run, end, "value", block, stage)))) || 1;
  const [x, density_unit, unit_count] = state.normalised ? [1 / norm, norm, 1 / numel] : [1, 1, 1];
  return { linear: linear * x,
    x: read(density, (v, i) => x * linear * Math.sinh(low + (high - low) * i / (points - 1))),
    ...heights(state.view) };
  function heights(view) {
    if (view === "tail") {
      const [y, low, high] = [tail, tail_low, tail_high].map(place => read(place, v => unit_count * (v <= -decade ? 0 : 10 ** (v / decade))));
      return { y, low, high };
    }
    const y = read(density, v => density_unit * share(v) * 10 ** top), error = read(density_error, v => v / unit);
    return { y, low: y.map((v, i) => v * (1 - error[i])), high: y.map((v, i) => v * (1 + error[i])) };
  }
}

// Plots -------------------------------------------------------------------------------------------
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const coarse = matchMedia("(pointer: coarse)").matches; // a finger scrolls; it does not zoom
// Sentences and tables come first: plotly is a second's work. A figure is drawn where it can be seen.
const waiting = new Map(), near = new Set();
function paint(id, anyhow) {
  const draw = waiting.get(id);
  if (!draw || !window.Plotly || !(anyhow || near.has(id))) return;
  waiting.delete(id);
  draw();
}
const watcher = new IntersectionObserver(changes => changes.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) near.add(target.id); else near.delete(target.id);
  paint(target.id);
}), { rootMargin: "300px" });
async function loadFigures() {
  performance.mark("figures");
  document.body.append(element("script", { textContent: await inflated("plotly").text() }));
  document.querySelectorAll(".plot").forEach(figure => watcher.observe(figure));
  addEventListener("beforeprint", () => [...waiting.keys()].forEach(id => paint(id, true)));
  requestAnimationFrame(() => setTimeout(() => {
    document.documentElement.dataset.ready = "true";
    [...waiting.keys()].forEach(id => setTimeout(() => paint(id, true), 500)); // once; then where it is seen
  }));
}
function afterFirstPaint(act) {
  const once = () => { clearTimeout(patience); act(); act = () => {}; }, patience = setTimeout(once, 3000);
  new PerformanceObserver(seen => { if (seen.getEntriesByName("first-contentful-paint").length) once(); })
    .observe({ type: "paint", buffered: true });
}
function plot(id, traces, layout, rows, drawn = () => {}) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  const base = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 }, hovermode: "closest",
    margin: { l: 10, r: 10, t: coarse ? 10 : 34, b: 10 }, showlegend: false, dragmode: coarse ? false : "zoom",
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--pale"), activecolor: css("--ink") }, ...layout };
  if (layout.height) $(id).style.height = `${layout.height}px`;
  base.xaxis = { ...axis, ...layout.xaxis };
  base.yaxis = { ...axis, ...layout.yaxis };
  waiting.set(id, () => {
    Plotly.react($(id), traces, base, { responsive: true, displaylogo: false,
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], displayModeBar: coarse ? false : "hover",
      doubleClickDelay: traces[0]?.type === "heatmap" ? 0 : 300, // two quick clicks are two cells
      toImageButtonOptions: { format: "svg", filename: id } });
    drawn();
  });
  $(id).rows = rows;
  paint(id);
}

const decades = value => `10<sup>${Math.round(Math.log10(value))}</sup>`.replace("-", "−");
function symlogAxis(linear, low, high) {
  const place = x => Math.asinh(x / linear), far = Math.max(Math.abs(low), Math.abs(high), linear);
  const last = Math.floor(Math.log10(far)), first = Math.ceil(Math.log10(linear));
  const stride = Math.max(1, Math.ceil((last - first + 1) / 4)), tickvals = [0], ticktext = ["0"];
  const room = .07 * (place(high) - place(low)); // labels nearer to that of zero would lie over it
  for (let e = last; e >= first; e -= stride)
    for (const [sign, mark] of [[1, ""], [-1, "−"]])
      if (sign * 10 ** e >= low && sign * 10 ** e <= high && place(10 ** e) > room) {
        tickvals.push(place(sign * 10 ** e));
        ticktext.push(mark + decades(10 ** e));
      }
  return { place, axis: { tickvals, ticktext, range: [place(low), place(high)] } };
}

// Curves: [{run, block, stage, colour, dash, label}]
function drawCurves(id, wanted) {
  const found = wanted.map(one => ({ ...one, ...curve(one.run, one.block, one.stage) })).filter(c => c.x);
  const tails = state.view === "tail", log = tails || state.axis === "log", traces = [], rows = [];
  const top = Math.max(...found.map(c => Math.max(...c.y))), linear = Math.min(...found.map(c => c.linear));
  const least = tails && !state.normalised ? 0.5 : top * 1e-9;
  const ends = [Math.min(...found.map(c => c.x[0])), Math.max(...found.map(c => c.x.at(-1)))];
  const symlog = symlogAxis(linear, ...ends);
  const place = log ? Math.abs : state.axis === "symlog" ? symlog.place : x => x;
  for (const c of found)
    for (const side of log ? [1, -1] : [0]) {
      const some = [...c.x.keys()].filter(i => (side ? c.x[i] * side > 0 : true) && c.y[i] >= least);
      if (!some.length) continue;
      const x = some.map(i => place(c.x[i])), y = some.map(i => c.y[i]);
      const up = some.map(i => c.high[i]), down = some.map(i => Math.max(c.low[i], least));
      const name = c.label + (side < 0 ? " (negative)" : "");
      const dash = side < 0 ? "dot" : c.dash, shape = tails ? "hv" : "linear", colour = c.colour;
      traces.push({ x: [...x, ...x.toReversed()], y: [...up, ...down.toReversed()], fill: "toself", mode: "none",
        fillcolor: colour + "44", hoverinfo: "skip", line: { shape } });
      traces.push({ x, y, mode: "lines", name: plain(name), line: { color: colour, dash, width: 2, shape },
        hoverinfo: "text", text: some.map((i, j) =>
          `${plain(name)}<br>at ${short(c.x[i])}: ${short(y[j])}, band ${short(c.low[i])} to ${short(c.high[i])}`) });
      some.forEach((i, j) => rows.push([c.label, c.x[i], y[j], c.low[i], c.high[i]]));
    }
  const eigenvalue = (log ? "magnitude of the " : "") + (state.normalised ? "eigenvalue / largest magnitude" : data.units.eigenvalue);
  const label = !tails ? (state.normalised ? "density (no unit)" : data.units.density)
    : (state.normalised ? "share" : "number") + " of eigenvalues beyond";
  plot(id, traces, { xaxis: { title: { text: eigenvalue }, type: log ? "log" : "linear", exponentformat: "power",
    ...(state.axis === "symlog" && !log ? symlog.axis : {}) },
  yaxis: { title: { text: label }, type: "log", exponentformat: "power", dtick: 2 } },
  [["block", "eigenvalue", label, "lower end of the band", "upper end"], ...rows]);
}

// A colour scale for numbers of any sign over many decades: blue and red are told apart by all.
function colours(values) {
  const known = values.filter(v => v !== null), far = Math.max(...known.map(Math.abs), 0) || 1;
  const signed = known.some(v => v < 0);
  const sizes = known.map(Math.abs).filter(v => v > 0);
  const linear = Math.max(Math.min(...sizes, far), far * 1e-5);
  const place = v => v === null ? null : Math.asinh(v / linear), end = place(far);
  const first = Math.ceil(Math.log10(linear)), last = Math.floor(Math.log10(far)), ticks = [[0, "0"]];
  for (let e = last; e >= first; e -= Math.max(1, Math.ceil((last - first) / 4)))
    for (const sign of signed ? [1, -1] : [1]) ticks.push([sign * place(10 ** e), (sign < 0 ? "−" : "") + decades(10 ** e)]);
  const low = signed ? -end : Math.max(0, place(Math.min(...known)));
  const shown = ticks.filter(([v]) => v >= low);
  return { place, zmin: low, zmax: end > low ? end : low + 1, colorscale: signed ? "RdBu" : "Viridis", reversescale: false,
    colorbar: { tickvals: shown.map(t => t[0]), ticktext: shown.map(t => t[1]), thickness: 12, outlinewidth: 0 } };
}

// A heat map that is used by mouse and by keyboard. `z` may hold null; `tell(row, column)` is text.
function drawMap(id, rows, columns, z, look, tell, act, table) {
  const div = $(id), text = z.map((line, i) => line.map((v, j) => v === null ? "" : plain(tell(i, j)).replaceAll("\n", "<br>")));
  const left = Math.min(11, Math.max(6, 900 / rows.length));
  plot(id, [{ type: "heatmap", z, text, hoverinfo: "text", xgap: 1, ygap: 1, ...look,
    x: columns.map((_, j) => j), y: rows.map((_, i) => i) }],
  { height: Math.max(320, Math.min(18 * rows.length, 900) + 130), xaxis: { tickvals: columns.map((_, j) => j), ticktext: columns.map(plain),
    showgrid: false, zeroline: false, tickangle: columns.length > 12 ? -90 : 0, tickfont: { size: columns.length > 12 ? left : 12 } },
  yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map(plain), autorange: "reversed", showgrid: false, zeroline: false,
    tickfont: { size: left } },
  shapes: div.cursor ? [{ type: "rect", x0: div.cursor[1] - .5, x1: div.cursor[1] + .5, y0: div.cursor[0] - .5,
    y1: div.cursor[0] + .5, line: { color: css("--ink"), width: 2 } }] : [] }, table, () => {
    if (!div.listens) div.on("plotly_click", event => div.act(event.points[0].y, event.points[0].x));
    div.listens = true;
  });
  div.act = (i, j) => { if (z[i]?.[j] !== null && z[i]?.[j] !== undefined) { div.cursor = [i, j]; act(i, j); } };
  div.move = (di, dj) => {
    const [i, j] = div.cursor || [0, 0], inside = (v, n) => Math.min(Math.max(v, 0), n - 1);
    div.cursor = [inside(i + di, rows.length), inside(j + dj, columns.length)];
    $(id + "-cell").textContent = tell(...div.cursor).replaceAll("\n", ", ");
    drawMap(id, rows, columns, z, look, tell, act, table);
  };
  if (div.ready) return;
  div.ready = true;
  div.addEventListener("keydown", event => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) div.move(...move);
    else if (event.key === "Enter" && div.cursor) div.act(...div.cursor);
    else return;
    event.preventDefault();
  });
}

function drawBlocks() {
  const run = thisRun(), rows = run.blocks.map(block => block.short), values = run.numbers[state.number].value;
  const scale = colours(values.flat()), { place, ...look } = scale;
  const tell = (i, j) => `${rows[i]}, ${run.called[j]}\n${data.numbers[state.number]}: ${written(run, state.number, i, j)}`;
  $("map-title").textContent = `${data.numbers[state.number]} of all blocks at all stages`;
  drawMap("map", rows, run.steps.map(step => brief(step, [run])), values.map(line => line.map(place)), look, tell, (i, j) => {
    state.stage = steps.indexOf(run.steps[j]);
    choose(run.blocks[i].name, true);
    $("map-cell").textContent = tell(i, j).replaceAll("\n", ", ");
    show("density");
  }, [["block", "step", state.number, "error", "data error"], ...run.blocks.flatMap((b, i) => run.steps.map((s, j) =>
    [b.name, s, ...["value", "error", "data"].map(part => at(run, state.number, part, i, j))]))]);
}

const pairPlace = (i, j) => { const [a, b] = i > j ? [i, j] : [j, i]; return a * (a - 1) / 2 + b; };
function distance(run, kind, i, j) {
  const n = parts(run).length, count = n * (n - 1) / 2, stage = stageOf(run), places = run.distances[state.definition];
  if (!places || stage < 0 || i < 0 || j < 0) return null;
  if (i === j) return 0;
  const value = store[places[kind] + stage * count + pairPlace(i, j)];
  return value < 0 ? null : value / data.scales.nat;
}
function apart(run, i, j) {
  const [value, corrected, error] = ["values", "corrected", "errors"].map(kind => distance(run, kind, i, j));
  return value === null ? "not known" : `${short(value)} nats`
    + (corrected === null ? "" : `; ${plusMinus(corrected, error)} nats with the noise of probes taken off`);
}
function drawDistances() {
  const run = thisRun(), blocks = parts(run), rows = blocks.map(block => block.short);
  if (!run.distances[state.definition]) {
    $("pairs-cell").textContent = "This run has no map of distances: it has fewer than 2 blocks, or more than 150.";
    return;
  }
  const z = rows.map((_, i) => rows.map((_, j) => j < i ? distance(run, "values", i, j) : null));
  const tell = (i, j) => j < i ? `${rows[i]} and ${rows[j]}\n${apart(run, i, j)}` : `${rows[i]}, ${rows[j]}`;
  drawMap("pairs", rows, rows, z, { zmin: 0, zmax: Math.LN2, colorscale: "Viridis", reversescale: true,
    colorbar: { thickness: 12, outlinewidth: 0 } }, tell, (i, j) => {
    state.pair = [blocks[i].name, blocks[j].name];
    drawPair();
    show("pair");
  }, [["block", "other", "distance in nats", "with noise taken off", "standard error"], ...rows.flatMap((_, i) => rows.slice(0, i).map((_, j) =>
    [blocks[i].name, blocks[j].name, ...["values", "corrected", "errors"].map(kind => distance(run, kind, i, j))]))]);
}
function drawPair() {
  const run = thisRun(), places = (state.pair || []).map(name => blockOf(run, name)).filter(place => place >= 0);
  drawCurves("pair", places.map((block, k) => ({ run, block, stage: stageOf(run), label: run.blocks[block].short,
    colour: COLOURS[k], dash: DASHES[k] })));
  const named = places.map(place => run.blocks[place].short);
  $("pair-note").textContent = places.length === 2
    ? `${named[0]} (blue, solid) and ${named[1]} (red, dashed) at ${called(steps[state.stage])}. Distance: ${apart(run, ...places)}.`
    : "No pair is chosen.";
}

function drawDensity() {
  const several = data.runs.length > 1;
  drawCurves("density", state.chosen.flatMap((name, k) => data.runs.map((run, r) => ({ run, block: blockOf(run, name), stage: stageOf(run),
    label: label(name) + (several ? ` (${run.name})` : ""), colour: colour(name, k), dash: DASHES[r % 5] }))));
  const missing = data.runs.filter(run => stageOf(run) < 0).map(run => run.name);
  const dashes = several ? ` Lines: ${data.runs.map((run, r) => `${DASHES[r % 5]} ${run.name}`).join(", ")}.` : "";
  $("density-note").textContent = `At ${called(steps[state.stage])}. ` + (state.view === "tail"
    ? "How many eigenvalues lie beyond x, seen from zero. Band: 95 %, of steps and probes, and of the data where their error is known."
    : "Band: ± 1 standard error over probes, and over the data where that is known. A flat top is what the Lanczos steps do not resolve.") + `${state.view === "tail" || state.axis === "log" ? " Dotted: negative eigenvalues." : ""}${dashes}`
    + (missing.length ? ` Not measured at this step: ${missing.join(", ")}.` : "");
}

function drawCourse() {
  const traces = state.chosen.flatMap((name, k) => data.runs.map((run, r) => {
    const block = blockOf(run, name), of = part => steps.map(step => at(run, state.number, part, block, run.steps.indexOf(step)));
    const x = steps.map(step => plain(brief(step))), y = of("value"), error = of("error");
    return { x, y, mode: "lines+markers", connectgaps: true, line: { color: colour(name, k), dash: DASHES[r % 5] }, marker: { symbol: k },
      error_y: { array: error.map(e => e ?? 0), thickness: 1 }, hoverinfo: "text",
      text: steps.map(step => plain(`${label(name)} (${run.name}), ${called(step, [run])}: `) + written(run, state.number, block, run.steps.indexOf(step))),
      rows: steps.map((step, i) => [run.name, name, step, y[i], error[i]]) };
  }));
  const known = traces.flatMap(trace => trace.y).filter(v => v !== null);
  const log = known.every(v => v > 0) && Math.max(...known) > 30 * Math.min(...known);
  $("course-title").textContent = `${data.numbers[state.number]} along training`;
  plot("course", traces, { height: 260, xaxis: { type: "category", title: { text: $("stage-word").textContent.toLowerCase() } },
    yaxis: { type: log ? "log" : "linear", exponentformat: "power", title: { text: data.numbers[state.number] } },
    shapes: [{ type: "line", x0: state.stage, x1: state.stage, y0: 0, y1: 1, yref: "paper", line: { color: css("--pale"), dash: "dot" } }] },
  [["run", "block", "step", state.number, "error"], ...traces.flatMap(trace => trace.rows)]);
}

// Tables ------------------------------------------------------------------------------------------
function element(tag, attributes, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}
// Columns: [title, value(row) for sorting, text(row)]. The first column is the block, as a button.
function drawTable(id, columns, rows) {
  const [by, sign] = state.sort, column = columns.find(c => c[0] === by);
  const far = v => v === null || v === undefined ? -Infinity : v;
  if (column) rows = [...rows].sort((a, b) => {
    const [x, y] = [far(column[1](a)), far(column[1](b))];
    return x < y ? -sign : x > y ? sign : 0;
  });
  const head = columns.map(([title]) => {
    const cell = element("th", { scope: "col" }, element("button", { type: "button", onclick: () => {
      state.sort = [title, by === title ? -sign : -1];
      drawTables();
    } }, title + (by === title ? (sign > 0 ? " ▲" : " ▼") : "")));
    if (by === title) cell.ariaSort = sign > 0 ? "ascending" : "descending";
    return cell;
  });
  const body = rows.map(row => element("tr", {}, ...columns.map((c, k) => element("td", {}, k ? c[2](row)
    : element("button", { type: "button", className: "link", title: row.block.name, onclick: () => { choose(row.block.name); show("density"); } }, c[2](row))))));
  $(id).replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  $(id).rows_ = [columns.map(c => c[0]), ...rows.map(row => columns.map((c, k) => k ? c[1](row) : row.block.name))];
}
const described = [["block", row => row.block.short, row => row.block.short], ["kind", row => row.block.kind, row => row.block.kind],
  ["layer", row => row.block.layer, row => row.block.layer ?? ""], ["parameters", row => row.block.numel, row => row.block.numel.toLocaleString("en")]];
const wanted = blocks => blocks.map(block => ({ block })).filter(row => row.block.name.toLowerCase().includes(state.filter));
function drawTables() {
  const run = thisRun(), stage = stageOf(run), of = (number, part, row) => at(run, number, part, blockOf(run, row.block.name), stage);
  const numbers = Object.entries(data.numbers).filter(([name]) => name !== "error").map(([name, title]) =>
    [title, row => of(name, "value", row), row => written(run, name, blockOf(run, row.block.name), stage)]);
  const errors = [["error of the estimate", "error", "value"], ["error of the data", "error", "data"], ["error, both", "total", "value"]]
    .map(([title, name, part]) => [title, row => of(name, part, row), row => short(of(name, part, row))]);
  $("table-step").textContent = called(steps[state.stage]) + (data.runs.length > 1 ? `, ${run.name}` : "");
  $("table-note").textContent = "Largest and smallest: ± residual, an eigenvalue lies that near. Mean, trace, rank: ± 1 standard error over "
    + "probes. Error of the estimate: with 95 % confidence the spectrum is that near to the true one of the given batches (Wasserstein-1).";
  drawTable("table", [...described, ...numbers, ...errors], wanted(run.blocks));
  if (data.runs.length > 1) drawDifferences();
}
function drawDifferences() {
  const [a, b] = [data.runs[state.first], data.runs[state.second]], title = data.numbers[state.number];
  const of = (run, part, row) => at(run, state.number, part, blockOf(run, row.block.name), stageOf(run));
  const difference = row => { const [x, y] = [of(a, "value", row), of(b, "value", row)]; return x === null || y === null ? null : y - x; };
  const error = row => { const [x, y] = [of(a, "error", row), of(b, "error", row)]; return x === null || y === null ? null : Math.hypot(x, y); };
  const rows = wanted(a.blocks).filter(row => blockOf(b, row.block.name) >= 0);
  const one = (run, k) => [`${k}: ${run.name}`, row => of(run, "value", row), row => written(run, state.number, blockOf(run, row.block.name), stageOf(run))];
  const ratio = row => difference(row) === null ? null : of(b, "value", row) / of(a, "value", row);
  drawTable("differences", [...described.slice(0, 2), one(a, "first"), one(b, "second"), ["second − first", difference,
    row => difference(row) === null ? "–" : state.number === "error" ? short(difference(row)) : plusMinus(difference(row), error(row))],
  ["second / first", ratio, row => ratio(row) === null ? "–" : short(ratio(row))]], rows);
  $("compare-note").textContent = `${title} at ${called(steps[state.stage])}, of the ${rows.length} blocks that both runs have. The number and the step are chosen above.`;
  const values = [a, b].flatMap(run => rows.map(row => of(run, "value", row))).filter(v => v !== null);
  const log = values.length && values.every(v => v > 0);
  plot("beside", [a, b].map((run, k) => ({ x: rows.map(row => of(run, "value", row)), y: rows.map(row => plain(row.block.short)), mode: "markers",
    name: plain(run.name), marker: { color: COLOURS[k], symbol: ["circle", "diamond-open"][k], size: 9 },
    error_x: { array: rows.map(row => of(run, "error", row) ?? 0), thickness: 1 } })),
  { height: 18 * rows.length + 140, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    xaxis: { type: log ? "log" : "linear", exponentformat: "power", title: { text: title } }, yaxis: { autorange: "reversed", dtick: 1 } }, []);
}

// Choosing ----------------------------------------------------------------------------------------
const label = name => data.runs.flatMap(run => run.blocks).find(block => block.name === name).short;
const isFull = name => data.runs.some(run => run.blocks.some(block => block.name === name && block.kind === "full"));
const colour = (name, k) => isFull(name) ? css("--ink") : COLOURS[k % COLOURS.length];
function choose(name, keep) {
  if (!state.chosen.includes(name)) state.chosen = [...state.chosen.slice(-7), name];
  else if (!keep) state.chosen = state.chosen.filter(other => other !== name);
  draw();
}
function show(id) {
  const box = $(id).getBoundingClientRect();
  if (box.top < 0 || box.top > innerHeight * .6) $(id).scrollIntoView({ block: "center" });
}
function drawChips() {
  const chips = state.chosen.map((name, k) => element("button", { type: "button", className: "chip", title: `leave out ${name}`,
    onclick: () => choose(name) }, element("i", { style: `border-color:${colour(name, k)}` }), `${label(name)} ×`));
  const clear = element("button", { type: "button", onclick: () => { state.chosen = []; draw(); } }, "clear");
  $("chips").replaceChildren(...chips, ...(chips.length ? [clear] : ["Choose a block: in the map, in the list, or in the table."]));
  document.querySelectorAll("#tree input").forEach(box => { box.checked = state.chosen.includes(box.value); });
}
function buildTree() {
  const run = thisRun(), branch = (title, ...inside) => element("details", {}, element("summary", {}, title), ...inside);
  const leaf = block => element("label", {}, element("input", { type: "checkbox", value: block.name, onchange: () => choose(block.name) }),
    ` ${block.short} (${data.kinds[block.kind] ?? block.kind}, ${block.numel.toLocaleString("en")})`);
  const groups = (blocks, key) => Object.values(Object.groupBy(blocks, key));
  const layers = groups(run.blocks, block => block.layer ?? "outside").map(blocks => branch(
    blocks[0].layer === null ? `outside the layers (${blocks.length} blocks)` : `layer ${blocks[0].layer} (${blocks.length} blocks)`,
    ...groups(blocks, block => "kind " + block.kind).flatMap(some => some.length > 2
      ? [branch(`${data.kinds[some[0].kind] ?? some[0].kind} (${some.length})`, ...some.map(leaf))] : some.map(leaf))));
  if (layers[0]) layers[0].open = true;
  $("tree").replaceChildren($("tree").firstElementChild, ...layers);
}
function draw() {
  $("stage").value = state.stage;
  $("step").textContent = `${brief(steps[state.stage])} (${state.stage + 1} of ${steps.length})`;
  for (const name of ["run", "number", "axis", "view", "definition", "first", "second"]) $(name).value = state[name];
  $("axis").disabled = state.view === "tail";
  for (const some of [drawChips, drawBlocks, drawDensity, drawCourse]) some();
  clearTimeout(later); // what lies further down follows when nothing else is asked for
  later = setTimeout(() => {
    for (const some of [drawDistances, drawPair, drawTables]) some();
    later = 0;
  }, 60);
}

function download(id) {
  const rows = $(id).rows_ || $(id).rows || [];
  const cell = value => { const text = String(value ?? ""); return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
  const link = element("a", { download: `${id}.csv`, href: URL.createObjectURL(new Blob([rows.map(row => row.map(cell).join(",")).join("\n") + "\n"],
    { type: "text/csv" })) });
  link.click();
  URL.revokeObjectURL(link.href);
}
function fill(id, options) {
  $(id).replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}
async function start() {
  [data, store] = await unpack();
  steps = [...new Set(data.runs.flatMap(run => run.steps))].sort((a, b) => a - b);
  const names = data.runs.map((run, k) => [k, run.name]);
  for (const id of ["run", "first", "second"]) fill(id, names);
  fill("number", Object.entries(data.numbers));
  const definitions = Object.keys(thisRun().distances);
  fill("definition", definitions.map(name => [name, name === "resolved" ? "Jensen-Shannon, at the coarser resolution" : "Jensen-Shannon divergence"]));
  const run = thisRun(), last = run.steps.length - 1, largest = b => at(run, "largest", "value", run.blocks.indexOf(b), last) ?? -Infinity;
  const first = parts(run).length ? parts(run) : run.blocks, top = first.reduce((a, b) => largest(b) > largest(a) ? b : a);
  const pair = ["query", "key"].map(kind => parts(run).find(block => block.kind === kind)).filter(Boolean);
  Object.assign(state, { stage: steps.indexOf(run.steps[last]), definition: definitions[0] || "", chosen: [top.name],
    pair: (pair.length === 2 ? pair : parts(run).slice(0, 2)).map(block => block.name) });
  $("stage").max = steps.length - 1;
  if (data.runs.some(run => run.called[0].startsWith("stage "))) $("stage-word").textContent = "Stage";
  const set = (id, event, change) => $(id).addEventListener(event, () => { change($(id)); draw(); });
  set("stage", "input", input => { state.stage = Number(input.value); });
  for (const id of ["number", "axis", "view", "definition"]) set(id, "change", input => { state[id] = input.value; });
  for (const id of ["first", "second"]) set(id, "change", input => { state[id] = Number(input.value); });
  set("run", "change", input => { state.run = Number(input.value); buildTree(); });
  set("normalised", "change", input => { state.normalised = input.checked; });
  set("filter", "input", input => { state.filter = input.value.toLowerCase(); });
  set("theme", "click", () => {
    const dark = css("--paper") !== "#fff";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.querySelectorAll("[data-csv]").forEach(button => button.addEventListener("click", () => download(button.dataset.csv)));
  document.querySelectorAll(".answer button").forEach(button => button.addEventListener("click", () => {
    const lists = [...document.querySelectorAll(".answer")];
    state.run = lists.indexOf(button.closest(".answer"));
    const { block, pair } = button.dataset, here = thisRun();
    state.stage = steps.indexOf(here.steps.at(-1));
    if (pair) state.pair = pair.split(",").map(place => here.blocks[place].name);
    else if (!state.chosen.includes(here.blocks[block].name)) state.chosen.push(here.blocks[block].name);
    draw();
    show(pair ? "pair" : "density");
  }));
  buildTree();
  drawTables();
  performance.mark("tables");
  draw();
  afterFirstPaint(loadFigures);
}
start();
