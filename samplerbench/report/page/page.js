"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const AXES = { nfe: "NFE", steps: "steps", seconds_per_image: "seconds per image" };
  const { colours, symbols, dashes } = data.style;
  const narrow = matchMedia("(max-width: 900px)");
  const state = { group: 0, metric: "", x: "nfe", hidden: new Set(), words: [], sort: "", down: false };

  // Names come from files: they become text nodes, never markup.
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "onclick") element.addEventListener("click", value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const metricTitle = (name) => group().metrics[name].title;
  const arrow = (name) => (lower(name) ? "↓" : "↑");
  // A long name may be broken after its punctuation.
  const breakable = (name) => name.split(/(?<=[:=,/;+])/).flatMap((part) => [part, make("wbr")]);
  // Plotly reads a few tags in its texts.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const group = () => data.groups[state.group];
  const labels = () => [...new Set(group().records.map((r) => r.label))];
  const look = (label) => {
    const i = labels().indexOf(label);
    const colour = colours[i % colours.length];
    return { colour: dark() && colour === "#4D4D4D" ? "#C4C4C4" : colour, symbol: symbols[i % symbols.length], dash: dashes[i % dashes.length] };
  };
  // A word of the filter is a part of a name, a number that the cell has, or the first digits of its key.
  const matches = (r, word) => {
    const names = [r.label, r.spacing_label, r.guidance ?? ""].join(" ").toLowerCase();
    const numbers = [r.steps_label, nfe(r), String(r.budget ?? ""), ...Object.values(r.metrics).map((e) => number(e.value))];
    if (numbers.includes(word) || (word.length > 3 && r.protocol.startsWith(word))) return true;
    return /^[\d.]+$/.test(word) ? names.split(/[^\d.]+/).includes(word) : names.includes(word);
  };
  const isShown = (r) => !state.hidden.has(r.label) && state.words.every((word) => matches(r, word));
  const shown = () => group().records.filter(isShown);
  const number = (v) => {
    if (v === null || v === undefined) return "nan";
    const a = Math.abs(v);
    if (a > 0 && a < 0.001) return v.toExponential(1);
    return v.toFixed(a < 0.1 ? 4 : a < 1 ? 3 : a < 100 ? 2 : 1);
  };
  // Over blocks; for a metric of the data in a single block, over images.
  const deviation = (e) => e.sd ?? (e.of === "data" ? e.standard_error : null);
  // The standard deviation has the decimals of the value, as in the other tables.
  const spread = (e) => {
    const sd = deviation(e);
    if (sd === null || sd === undefined) return "";
    const value = number(e.value);
    return ` ± ${value.includes("e") ? number(sd) : sd.toFixed((value.split(".")[1] ?? "").length)}`;
  };
  const cost = (v) => (v === null || v === undefined ? "" : v < 0.01 ? v.toPrecision(2) : number(v));
  const nfe = (r) => (Number.isInteger(r.nfe) ? String(r.nfe) : r.nfe.toFixed(1));
  // "10 steps", "own steps" of an adaptive solver; nothing for a generator, which has no steps.
  const isGenerator = (r) => r.steps_label === "–";
  const withSteps = (r) => (isGenerator(r) ? "" : `${r.steps_label} step${r.steps === 1 ? "" : "s"}`);
  const titled = (r) => [r.label, withSteps(r)].filter(Boolean).join(", ");
  const lower = (metric) => group().metrics[metric].better === "lower";
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function segments(id, options, current, choose) {
    $(id).replaceChildren(...options.map(([value, name]) =>
      make("button", { type: "button", "data-value": value, "aria-pressed": String(value === current), onclick: () => choose(value) }, name)));
  }

  // The sampler's mark as in the plot, so that a name is found without its colour.
  function swatch(label) {
    const { colour, symbol } = look(label);
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    for (const [k, v] of Object.entries({ width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" })) svg.setAttribute(k, v);
    const path = document.createElementNS(space, "path");
    path.setAttribute("d", data.style.paths[symbol]);
    path.setAttribute("fill", colour);
    svg.append(path);
    return svg;
  }

  function drawControls() {
    $("group-choice").hidden = data.groups.length < 2;
    $("protocol").textContent = group().description + (group().title ? "; " + group().title : "") + (group().times ? "; times: " + group().times : "");
    const names = Object.keys(group().metrics);
    segments("metrics", names.map((m) => [m, `${metricTitle(m)} ${arrow(m)}`]), state.metric, (m) => { state.metric = m; draw(); });
    segments("axes", Object.entries(AXES), state.x, (x) => { state.x = x; draw(); });
    $("samplers").replaceChildren(...labels().map((label) =>
      make("button", {
        type: "button", "data-label": label, "aria-pressed": String(!state.hidden.has(label)), onclick: () => {
          if (!state.hidden.delete(label)) state.hidden.add(label);
          draw();
          [...$("samplers").children].find((b) => b.dataset.label === label).focus();
        },
      }, swatch(label), label)));
  }

  function drawStory() {
    const metric = state.metric;
    const table = group().tables.find((t) => t.metric === metric);
    const bests = [];
    if (table) table.columns.forEach((column, j) => {
      const best = table.rows.find((row) => row.cells[j] && row.cells[j].best);
      const ties = table.rows.filter((row) => row.cells[j] && row.cells[j].tied).length;
      if (best && !["own", "–"].includes(column)) bests.push({ column, best, text: best.cells[j].text, ties });
    });
    const word = (lower(metric) ? "Lowest" : "Highest") + ` ${metricTitle(metric)}${group().records.every(isShown) ? "" : " of all rows"}: `;
    const parts = [];
    const unit = table && table.axis === "nfe" ? "NFE" : "steps";
    bests.slice(-5).forEach(({ column, best, text, ties }, i) => {
      parts.push(i ? " · " : word, make("span", { class: "part" }, `${column} ${unit} `, make("b", {}, `${best.label} ${text.split(" ±")[0]}`), ties ? ` (${ties} tied)` : ""));
    });
    $("story").replaceChildren(...parts);
  }

  function drawPlot() {
    const metric = state.metric;
    const traces = [];
    // Where only data was measured, nothing was sampled: the evaluations are those of the metric.
    const sampled = (r) => (r.nfe ? r : { ...r, nfe: r.metrics[metric].nfe ?? r.nfe });
    const visible = shown().filter((r) => r.metrics[metric] && r.metrics[metric].value !== null).map(sampled);
    // A generator has no evaluations and no steps: its value is a horizontal line over the range of the others.
    const across = state.x === "seconds_per_image" ? [] : visible.filter((r) => !isGenerator(r) && r[state.x] !== null).map((r) => r[state.x]);
    const flat = (r) => isGenerator(r) && across.length > 0;
    for (const label of labels()) {
      const rows = visible.filter((r) => r.label === label && (flat(r) || r[state.x] !== null)).flatMap((r) => (flat(r)
        ? [{ ...r, [state.x]: Math.min(...across) }, { ...r, [state.x]: Math.max(...across) }] : [r]));
      rows.sort((a, b) => a[state.x] - b[state.x]);
      if (!rows.length) continue;
      const { colour, symbol, dash } = look(label);
      traces.push({
        type: "scatter", mode: rows.some(flat) ? "lines" : "lines+markers", name: plain(label), x: rows.map((r) => r[state.x]), y: rows.map((r) => r.metrics[metric].value),
        error_y: { type: "data", array: rows.map((r) => deviation(r.metrics[metric]) ?? 0), visible: rows.some((r) => deviation(r.metrics[metric])), thickness: 1, width: 3 },
        line: { color: colour, width: 2, dash }, marker: { color: colour, symbol, size: 8 },
        customdata: rows.map((r) => [number(r.metrics[metric].value), spread(r.metrics[metric]), [withSteps(r), `${nfe(r)} NFE`, r.seconds_per_image === null ? "" : `${cost(r.seconds_per_image)} s per image`].filter(Boolean).join(", ")]),
        hovertemplate: `<b>${plain(label)}</b><br>${plain(metricTitle(metric))} %{customdata[0]}%{customdata[1]}<br>%{customdata[2]}<extra></extra>`,
      });
    }
    const ys = traces.flatMap((t) => t.y);
    const xs = traces.flatMap((t) => t.x);
    const log = (values) => values.length > 0 && values.every((v) => v > 0);
    // Around a single value, Plotly's own logarithmic axis has several decades.
    const single = (values, isLog) => (isLog && new Set(values).size === 1 ? { range: [Math.log10(values[0] / 2), Math.log10(values[0] * 2)] } : {});
    const ticks = (values, isLog) => {
      const range = values.length ? Math.max(...values) / Math.min(...values) : 1;
      if (!isLog || range > 1000) return {};
      const base = range < 4 ? [1, 1.5, 2, 3, 4, 5, 6, 8] : range < 30 ? [1, 2, 3, 5] : [1, 2, 5];
      const all = [];
      for (let e = -8; e < 7; e++) base.forEach((b) => all.push(Number((b * 10 ** e).toPrecision(3))));
      return { tickmode: "array", tickvals: all, ticktext: all.map((v) => String(v)) };
    };
    const line = { gridcolor: css("--rule"), linecolor: css("--quiet"), zeroline: false, showline: true, ticks: "outside", tickcolor: css("--rule"), automargin: true };
    const logX = log(xs), logY = lower(metric) && log(ys);
    const layout = {
      margin: { l: 10, r: 12, t: 12, b: 10 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
      font: { family: "system-ui, sans-serif", size: 12, color: css("--quiet") }, hoverlabel: { bgcolor: css("--paper"), font: { color: css("--ink") }, align: "left" },
      annotations: traces.length ? [] : [{ text: "no values to show", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
      xaxis: { ...line, ...ticks(xs, logX), ...single(xs, logX), visible: traces.length > 0, type: logX ? "log" : "linear", title: { text: AXES[state.x] === "NFE" ? "network evaluations per image (NFE)" : AXES[state.x] } },
      yaxis: { ...line, ...ticks(ys, logY), visible: traces.length > 0, type: logY ? "log" : "linear", title: { text: plain(`${metricTitle(metric)} ${arrow(metric)}`) } },
    };
    $("plot").setAttribute("aria-label", `${metricTitle(metric)} against ${AXES[state.x]}; the table below holds the same numbers`);
    Plotly.react("plot", traces, layout, { displaylogo: false, responsive: true, displayModeBar: false });
  }

  function drawMatrix() {
    const table = group().tables.find((t) => t.metric === state.metric);
    const visible = new Map(shown().map((r) => [r.protocol, r]));
    const has = (cell) => cell !== null && visible.has(cell.protocol);
    const without = (row) => table.no_value.includes(row.label) && shown().some((r) => r.label === row.label);
    const rows = table.rows.filter((row) => row.cells.some(has) || without(row));
    const kept = table.columns.map((_, j) => j).filter((j) => rows.some((row) => has(row.cells[j])));
    const body = rows.map((row) => make("tr", {},
      make("th", { scope: "row" }, ...breakable(row.label)),
      ...kept.map((j) => row.cells[j]).map((cell) => {
        if (!has(cell)) return make("td", {}, without(row) ? "–" : "");
        const [value, sd] = cell.text.split(" ± ");
        const record = visible.get(cell.protocol);
        const mark = cell.tied ? "≈ " : "";
        return make("td", cell.best ? { class: "best" } : {},
          make("button", { type: "button", title: "Protocol and command", onclick: () => details(record) }, mark + value, ...(sd ? [make("span", { class: "sd" }, ` ± ${sd}`)] : [])));
      })));
    $("matrix").replaceChildren(
      make("caption", {}, `${metricTitle(state.metric)} ${arrow(state.metric)} `, make("small", {}, table.measured_in)),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, `sampler \\ ${table.axis === "nfe" ? "NFE" : "steps"}`), ...kept.map((j) => make("th", { scope: "col" }, table.columns[j])))),
      make("tbody", {}, ...(rows.length ? body : [make("tr", {}, make("th", { scope: "row" }, "no cell matches"))])));
    const best = table.rows.some((row) => row.cells.some((c) => c && c.best)) ? ["bold: the best of its column"] : [];
    const partly = best.length && !group().records.every(isShown) ? ["hidden rows are compared too"] : [];
    $("notes").textContent = rows.length ? [...best, ...partly, ...table.notes].join("; ") : "";
  }

  // A phone shows about three columns: the sampler, its evaluations and the chosen metric.
  const columns = () => {
    const sampler = ["sampler", "Sampler", (r) => r.label, (r) => r.label];
    const spacing = ["spacing", "Spacing", (r) => r.spacing_label, (r) => r.spacing_label];
    const count = ["steps", "Steps", (r) => r.steps ?? Infinity, (r) => r.steps_label];
    const evaluations = ["nfe", "NFE", (r) => r.nfe, nfe];
    const metric = (m) => [`metric:${m}`, `${metricTitle(m)} ${arrow(m)}`, (r) => r.metrics[m]?.value ?? null,
      (r) => (r.metrics[m] ? number(r.metrics[m].value) + spread(r.metrics[m]) : "")];
    const seconds = ["seconds", "s / image", (r) => r.seconds_per_image, (r) => cost(r.seconds_per_image)];
    const metrics = Object.keys(group().metrics);
    if (!narrow.matches) return [sampler, spacing, count, evaluations, ...metrics.map(metric), seconds];
    return [sampler, evaluations, metric(state.metric), count, spacing, ...metrics.filter((m) => m !== state.metric).map(metric), seconds];
  };

  function drawCells() {
    const all = columns();
    const rows = shown();
    const sorted = all.find((c) => c[0] === state.sort);
    if (sorted) rows.sort((a, b) => {
      const [x, y] = [sorted[2](a), sorted[2](b)];
      if (x === null || y === null) return x === y ? 0 : x === null ? 1 : -1;
      const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x === y ? 0 : x < y ? -1 : 1;
      return state.down ? -order : order;
    });
    const head = make("tr", {}, ...all.map(([key, name]) => make("th", { scope: "col", class: key === "spacing" ? "text" : null, "aria-sort": key === state.sort ? (state.down ? "descending" : "ascending") : "none" },
      make("button", {
        type: "button", "data-sort": key, onclick: () => {
          state.down = state.sort === key && !state.down;
          state.sort = key;
          drawCells();
          [...$("cells").querySelectorAll("thead button")].find((b) => b.dataset.sort === key).focus();
        },
      }, name))), make("th", { scope: "col" }, "Reproduce"));
    const body = rows.map((r) => make("tr", {}, ...all.map((c, i) => (i ? make("td", { class: c[0] === "spacing" ? "text" : null }, c[3](r)) : make("th", { scope: "row" }, ...breakable(c[3](r))))),
      make("td", {}, make("button", { type: "button", class: "open", "aria-label": `Protocol and command of ${titled(r)}`, onclick: () => details(r) }, "Details"))));
    $("cells").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
    $("count").textContent = `${rows.length} of ${group().records.length} cells`;
  }

  function drawGrids() {
    const rows = shown().filter((r) => data.pictures[r.protocol]);
    $("grids-section").hidden = !rows.length;
    const cell = (r) => {
      if (!r) return make("td");
      const name = `${data.restored.includes(r.protocol) ? "Truth, observation and restored images" : "Samples"} of ${titled(r)}`;
      return make("td", {}, make("button", { type: "button", "aria-label": `${name}: enlarge`, onclick: () => details(r) }, make("img", { src: data.pictures[r.protocol], alt: name, loading: "lazy" })));
    };
    const restored = rows.some((r) => data.restored.includes(r.protocol));
    $("grids-about").replaceChildren(...(restored
      ? ["Each picture has three rows: the truth, the observation, and the restored images. The same column has the same image in every picture."]
      : ["The same position in every picture has the same noise ", make("i", {}, "x", make("sub", {}, "T")), " and the same label."]), " Press a picture to enlarge it.");
    fillPictures($("grids"), rows, cell);
  }

  // Rows are samplers, columns the evaluations or steps. Where two results of a row are in one column, the one with
  // more evaluations is shown, as in the table.
  function fillPictures(table, rows, cell) {
    const places = new Map([...rows].sort((a, b) => a.nfe - b.nfe).map((r) => [JSON.stringify([r.label, r.column]), r]));
    const heads = group().columns.filter((c) => rows.some((r) => r.column === c));
    const corner = `sampler \\ ${group().axis === "nfe" ? "NFE" : "steps"}`;
    const head = heads.map((c) => make("th", { scope: "col" }, c));
    const lines = [...new Set(rows.map((r) => r.label))].map((label) => [label, heads.map((c) => cell(places.get(JSON.stringify([label, c]))))]);
    // On a phone the name stands above its pictures, so that they have the whole width.
    table.replaceChildren(...(narrow.matches
      ? [make("thead", {}, make("tr", {}, make("th", { class: "corner", colspan: String(heads.length) }, corner)), make("tr", {}, ...head)),
        ...lines.map(([label, cells]) => make("tbody", {}, make("tr", {}, make("th", { scope: "rowgroup", colspan: String(heads.length) }, make("span", {}, make("span", {}, ...breakable(label))))), make("tr", {}, ...cells)))]
      : [make("thead", {}, make("tr", {}, make("th", { class: "corner", scope: "col" }, corner), ...head)),
        make("tbody", {}, ...lines.map(([label, cells]) => make("tr", {}, make("th", { scope: "row" }, ...breakable(label)), ...cells)))]));
  }

  // Sample i has the same noise in every cell, and the same prompt or label: one table for each sample.
  function drawSame() {
    const rows = shown();
    const name = (r) => `${titled(r)}, ${nfe(r)} NFE`;
    const samples = data.same[state.group].map((s) => [s, rows.filter((r) => s.tiles[r.protocol])]).filter(([, cells]) => cells.length);
    $("same-section").hidden = !samples.length;
    const tasks = samples.some(([s]) => s.truth);
    $("same-title").textContent = tasks ? "Restorations of the same observation" : "Same prompt and noise";
    const about = tasks ? "Each table is one sample: the truth and its observation, and what every cell makes of it from the same noise."
      : "Each table is one sample: the same noise, and the same prompt or label, in every cell.";
    $("same-about").textContent = [about, data.same_note].filter(Boolean).join(" ");
    $("same").replaceChildren(...samples.map(([sample, cells], i) => {
      const table = make("table", { class: "pictures", "aria-labelledby": `same-${i}` });
      fillPictures(table, cells, (r) => (r
        ? make("td", {}, make("img", { src: sample.tiles[r.protocol], alt: name(r), title: name(r), class: sample.small ? "small" : "large" }))
        : make("td")));
      const given = ["truth", "observation"].filter((name) => sample[name]).map((name) => make("figure", {},
        make("img", { src: sample[name], alt: `${name} of ${sample.heading}`, class: sample.small ? "small" : "large" }), make("figcaption", {}, name)));
      return make("article", {}, make("h3", { id: `same-${i}` }, sample.heading), make("p", { class: "quiet" }, sample.note),
        ...(given.length ? [make("div", { class: "observed" }, ...given)] : []),
        make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${sample.heading}, scrolls sideways` }, table));
    }));
  }

  function details(r) {
    const copy = make("button", {
      type: "button", onclick: async () => {
        try { await navigator.clipboard.writeText(r.command); copy.textContent = "Copied"; } catch {
          getSelection().selectAllChildren($("command"));
          copy.textContent = "Selected: copy with the keyboard";
        }
      },
    }, "Copy");
    const facts = [["Finished", r.finished ?? "unknown"], ["On", [r.device, r.threads && `${r.threads} thread${r.threads === 1 ? "" : "s"}`, `batches of ${r.batch_size ?? "?"}`].filter(Boolean).join(", ")],
      ["Time", `${number(r.seconds)} s sampling, ${number(r.metric_seconds)} s metrics`], ["Versions", Object.entries(r.versions).map((v) => v.join(" ")).join(", ")],
      ["Blocks", Object.entries(r.metrics).filter((m) => m[1].blocks).map(([m, e]) => `${metricTitle(m)}: ${e.blocks.map(number).join(", ")}`).join("; ") || "one"], ["Hash", r.protocol]];
    $("details-title").textContent = titled(r);
    $("details-body").replaceChildren(
      ...(data.pictures[r.protocol] ? [make("img", { src: data.pictures[r.protocol], alt: `Samples of ${r.label}` })] : []),
      make("h3", {}, "How to reproduce"), make("pre", { class: "command", id: "command" }, r.command), ...(r.command.startsWith("#") ? [] : [copy]),
      make("dl", {}, ...facts.flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)])),
      make("h3", {}, "Protocol"), make("pre", { class: "json", tabindex: "0" }, JSON.stringify(r.protocol_fields, null, 1)));
    $("details").showModal();
    $("details").scrollTop = 0;
  }

  function draw() {
    const names = Object.keys(group().metrics);
    if (!names.includes(state.metric)) state.metric = names[0];
    const focused = document.activeElement?.dataset?.value;
    drawControls(); drawStory(); drawMatrix(); drawPlot(); drawCells(); drawSame(); drawGrids();
    if (focused) [...document.querySelectorAll(".segments button")].find((b) => b.dataset.value === focused)?.focus();
  }

  const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; $("theme").setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`); };
  narrow.addEventListener("change", () => draw());
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; nameTheme(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { nameTheme(); draw(); });
  $("group").append(...data.groups.map((g, i) => make("option", { value: String(i) }, `${g.title || g.description} (${g.records.length} cells)`)));
  $("group").addEventListener("change", () => { state.group = Number($("group").value); state.hidden.clear(); state.x = group().axis; draw(); });
  $("filter").addEventListener("input", () => { state.words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean); draw(); });
  $("close").addEventListener("click", () => $("details").close());
  $("details").addEventListener("click", (event) => { if (event.target === $("details")) $("details").close(); });
  state.x = group().axis;
  nameTheme();
  draw();
  // The table beside it decides how wide the plot is, so the window's own resize event is not enough.
  new ResizeObserver(() => Plotly.Plots.resize("plot")).observe($("plot"));
})();
