"use strict";
// The comparison: answers the filters and choices of the page, fills its charts and tables from the rows of the runs.
// Texts of runs only ever become text nodes and option values.
(() => {
  const GOALS = {test: "test top-1 (%)", best: "best validation top-1 (%)", last: "last validation top-1 (%)"};
  const METRICS = {val_top1: "Validation top-1 (%)", train_top1: "Train top-1 (%)", val_loss: "Validation loss",
    train_loss: "Train loss", lr: "Learning rate"};
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2, 1, 2, 1, 2], [1, 2], [12, 3, 2, 3, 2, 3]];
  const SHAPES = ["circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "hex", "star"];
  const ENLARGED = {diamond: 1.5, plus: 1.2, star: 1.5};  // Bokeh draws these smaller than the others
  const COLOURS = 8, MOST_KEYS = 40, ROWS = 100, MARKS = 8;
  const {valueOf, unique, known, inOrder} = Comparison;
  const find = (id) => document.getElementById(id);
  const filters = [];  // [key, value]
  const muted = new Set();
  const first = {results: 0, settings: 0};
  const order = {results: {column: 2, upwards: false}, settings: {column: 0, upwards: true}};
  let runs = [], base = {}, keys = [], groups = [], styles = new Map();

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.map((child) => child instanceof Node ? child : String(child)));
    return made;
  }

  function drawing(tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  const plain = (value) => {
    if (value === null || value === undefined) return "—";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e4) return String(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= unit) return `${(value / (letter === "k" ? 1e3 : unit)).toPrecision(3)} ${letter}`;
    }
    return String(Number(value.toPrecision(4)));
  };
  const bytes = (value) => {
    if (value === null) return "—";
    const power = value >= 1 ? Math.min(Math.floor(Math.log2(value) / 10), 4) : 0;
    return `${Number((value / 1024 ** power).toPrecision(3))} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
  };
  const ofCost = (key, value) => /bytes|memory/.test(key) ? bytes(value) : plain(value);
  // Bytes and counts choose their prefix in every cell.
  function inTable(key) {
    const {title, unit} = Page.page.costs[key];
    const rest = unit.replace(/^([KM]iB|.*illions) ?/, "");
    return rest ? `${title} (${rest})` : title;
  }
  const spread = ({n, mean, sd}, all) => mean === null ? "—"
    : `${mean.toFixed(2)}${sd === null ? "" : ` ± ${sd.toFixed(2)}`}${n < all ? ` (${n} of ${all})` : ""}`;

  // A choice keeps its value when what there is to choose from changes.
  function choices(select, entries, usual) {
    const before = select.value || usual;
    select.replaceChildren(...entries.map(([value, label]) => element("option", {value}, label)));
    select.value = entries.some(([value]) => value === before) ? before : usual;
  }

  function read() {
    const {data, tags} = Page.named("runs");
    runs = [...data.run].map((row) => JSON.parse(row)).filter((run) => run.id);  // live: some are not read yet
    base = JSON.parse(tags[0]);
    keys = Comparison.differingKeys(runs.filter((run) => run.state !== "broken"), base);
    const byKey = keys.map((key) => [key, key]);
    choices(find("filter-key"), [["state", "state"], ...byKey], keys[0] ?? "state");
    choices(find("colour-key"), [["", "configuration"], ...byKey], "");
    choices(find("dash-key"), [["", "as colour"], ...byKey], "");
    const goals = Object.keys(GOALS).filter((goal) => runs.some((run) => run.reached[goal] !== null));
    choices(find("goal"), (goals.length ? goals : ["best"]).map((goal) => [goal, GOALS[goal]]), goals[0] ?? "best");
    offerValues();
    broken();
  }

  function offerValues() {
    const key = find("filter-key").value;
    const values = unique(runs.map((run) => valueOf(run, key, base))).sort(inOrder);
    const count = (value) => runs.filter((run) => valueOf(run, key, base) === value).length;
    choices(find("filter-value"), [["", "choose a value"],
      ...values.map((value) => [JSON.stringify(value), `${value ?? "— (no such key)"} (${count(value)})`])], "");
  }

  function broken() {
    const lost = runs.filter((run) => run.state === "broken");
    find("broken").hidden = !lost.length;
    find("broken-count").textContent = `${lost.length} folder${lost.length === 1 ? "" : "s"} could not be read as runs`;
    find("broken-list").replaceChildren(...lost.slice(0, 200).map((run) =>
      element("li", {}, element("a", {href: run.link}, run.name), `: ${run.problems.join("; ")}`)));
  }

  // Values of one key are alternatives, keys have to be met all.
  function chosenRuns() {
    const wanted = new Map();
    for (const [key, value] of filters) wanted.set(key, [...wanted.get(key) ?? [], value]);
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    return runs.filter((run) => run.state !== "broken"
      && [...wanted].every(([key, values]) => values.includes(valueOf(run, key, base)))
      && words.every((word) => run.name.toLowerCase().includes(word)));
  }

  function refresh() {
    const chosen = chosenRuns();
    groups = Comparison.grouped(chosen, keys, base).map(Comparison.withFigures);
    const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
    const again = chosen.length - groups.reduce((sum, group) => sum + group.runs.length, 0);
    find("count").textContent = runs.length ? `${count(chosen.length, "run")} of ${runs.length.toLocaleString("en")}, `
      + `${count(groups.length, "configuration")}${again ? `, ${count(again, "run")} left out, as another has the same seed` : ""}; `
      + "mean ± standard deviation over seeds" : "No run yet: the first one appears here.";
    find("chips").replaceChildren(...filters.map(([key, value], index) => element("button",
      {type: "button", "data-unfilter": index, "aria-label": `Remove the filter ${key} = ${value}`}, `${key} = ${value ?? "—"} ✕`)));
    chooseStyles();
    draw();
    results();
    settings();
  }

  function chooseStyles() {
    const [byColour, byDash] = [find("colour-key").value, find("dash-key").value];
    const of = (key, group) => key === "" ? group.label : key === "seed" ? group.runs.map((run) => run.seed).join(", ")
      : String(group.values[key] ?? "—");
    const colours = unique(groups.map((group) => of(byColour, group))).sort(inOrder);
    const dashes = byDash ? unique(groups.map((group) => of(byDash, group))).sort(inOrder) : [];
    styles = new Map(groups.map((group) => {
      const [category, dashed] = [of(byColour, group), byDash ? of(byDash, group) : null];
      const index = colours.indexOf(category);
      const second = byDash ? dashes.indexOf(dashed) : index + Math.floor(index / COLOURS);
      return [group.id, {category, dashed, colour: index % COLOURS + 1, dash: second % DASHES.length}];
    }));
    legend("colour", colours, (style) => style.category);
    legend("dash", dashes, (style) => style.dashed);
  }

  function legend(kind, categories, ofStyle) {
    const entries = categories.slice(0, MOST_KEYS).map((category) => {
      const style = [...styles.values()].find((candidate) => ofStyle(candidate) === category);
      const name = `${kind}:${category}`;
      return element("button", {type: "button", "aria-pressed": String(!muted.has(name)), "data-category": name},
        sample(kind, style), category);
    });
    const rest = categories.length - MOST_KEYS;
    find(`legend-${kind}`).replaceChildren(...entries, ...rest > 0 ? [element("span", {class: "small quiet"}, `and ${rest} more, in the table`)] : []);
  }

  function sample(kind, {colour, dash}) {
    const ink = kind === "colour" ? `var(--s${colour})` : "var(--single)";
    const image = drawing("svg", {viewBox: "0 0 36 12", "aria-hidden": "true", stroke: ink, fill: ink});
    const dashed = kind === "colour" && find("dash-key").value ? [] : DASHES[dash];
    image.append(drawing("path", {d: "M0 6h36", "stroke-width": 2.2, "stroke-dasharray": dashed.join(" ")}),
      ...kind === "colour" && find("dash-key").value ? [] : [shape(SHAPES[dash])]);
    return image;
  }

  function shape(name) {
    const paths = {hex: "M13 6l2.5 -4.5h5l2.5 4.5l-2.5 4.5h-5z", square: "M14 2h8v8h-8z",
      star: "M18 0l1.6 4.2h4.4l-3.5 2.7l1.3 4.3l-3.8 -2.6l-3.8 2.6l1.3 -4.3l-3.5 -2.7h4.4z", triangle: "M18 1l5 9h-10z", diamond: "M18 0.5l5 5.5l-5 5.5l-5 -5.5z",
      inverted_triangle: "M18 11l5 -9h-10z", plus: "M18 1v10M13 6h10"};
    return name === "circle" ? drawing("circle", {cx: 18, cy: 6, r: 4}) : drawing("path", {d: paths[name], "stroke-width": 2});
  }

  const empty = (names) => Object.fromEntries(names.split(" ").map((name) => [name, []]));
  const add = (columns, row) => { for (const [name, value] of Object.entries(row)) columns[name].push(value); };

  const opacity = ({category, dashed}) => muted.has(`colour:${category}`) || muted.has(`dash:${dashed}`) ? 0.08 : 1;
  const drawn = (style) => ({colour: Page.colour(`s${style.colour}`), alpha: opacity(style), marker: SHAPES[style.dash],
    size: ENLARGED[SHAPES[style.dash]] ?? 1});
  const chosenAxis = () => document.querySelector("input[name=compared]:checked").value;

  function draw() {
    drawCurves(find("metric").value, chosenAxis());
    for (const axis of Page.models("LinearAxis")) if (axis.name === "reached") axis.axis_label = GOALS[find("goal").value];
    for (const model of Page.models("ColumnDataSource")) {
      if (model.name?.startsWith("points-")) drawCosts(model.name.slice(7), model, find("goal").value);
    }
    const charts = Page.all(".costs figure:not([hidden])").length;
    find("costs-none").hidden = charts > 0;
    document.querySelector(".costs").dataset.charts = charts;
  }

  function drawCurves(metric, axis) {
    const curves = new Map(groups.map((group) => [group, Comparison.curveOf(group, metric, axis)]));
    const longest = Math.max(0, ...[...curves.values()].map((points) => points.at(-1)?.x ?? 0));
    const [unit, symbol] = axis !== "time" ? [1, ""] : longest >= 7200 ? [3600, "h"] : longest >= 120 ? [60, "min"] : [1, "s"];
    const label = {epoch: "epochs completed", step: "optimizer steps", time: `time spent (${symbol})`}[axis];
    const [lines, bands, marks] = ["xs ys colour dash alpha label n axis", "xs ys colour alpha", "x y colour marker size alpha"].map(empty);
    for (const [group, points] of curves) {
      if (!points.length) continue;
      const style = styles.get(group.id);
      const {colour, alpha, marker, size} = drawn(style);
      const xs = points.map((point) => point.x / unit);
      add(lines, {xs, ys: points.map((point) => point.mean), colour, dash: DASHES[style.dash], alpha, label: group.label,
        n: group.runs.length, axis: label});
      if (group.runs.length > 1) {
        const edge = [...points.map((point) => point.high), ...points.map((point) => point.low).toReversed()];
        add(bands, {xs: [...xs, ...xs.toReversed()], ys: edge, colour, alpha: 0.12 * alpha});
      }
      const every = Math.max(1, Math.ceil(points.length / MARKS));
      for (const point of points.filter((_, index) => index % every === (points.length - 1) % every)) {
        add(marks, {x: point.x / unit, y: point.mean, colour, marker, size: 7 * size, alpha});
      }
    }
    const count = lines.xs.length;
    // A chart of nothing would have no ranges.
    if (!count) add(lines, {xs: [0, 1], ys: [0, 1], colour: "black", dash: [], alpha: 0, label: "", n: 0, axis: label});
    Page.named("lines").data = lines;
    Page.named("bands").data = bands;
    Page.named("marks").data = marks;
    for (const model of Page.models("LinearAxis")) if (model.name === "x") model.axis_label = label;
    find("plot-curves").closest("figure").querySelector("h3").textContent = METRICS[metric];
    find("plot-curves").setAttribute("aria-label",
      `Curves of ${METRICS[metric]} over ${label} for ${count} configurations. What they reached is in the table of results.`);
    Page.reach(0, longest / unit * 1.03 || 1, true);
  }

  function drawCosts(key, source, goal) {
    const points = groups.map((group) => ({group, x: group.costs[key].mean, y: group.reached[goal].mean, sd: group.reached[goal].sd ?? 0}))
      .filter((point) => point.x !== null && point.y !== null);
    const {title, scale} = Page.page.costs[key];
    const box = find(`plot-cost-${key}`);
    box.closest("figure").hidden = unique(points.map((point) => point.x)).length < 2;
    if (box.closest("figure").hidden) return;
    const columns = empty("x y low high colour alpha marker size label n shown_x shown_y cost goal");
    for (const {group, x, y, sd} of points) {
      const look = drawn(styles.get(group.id));
      add(columns, {...look, size: 11 * look.size, x: x / scale, y, low: y - sd, high: y + sd, label: group.label, n: group.runs.length,
        shown_x: ofCost(key, x), shown_y: spread(group.reached[goal], group.runs.length), cost: title, goal: GOALS[goal]});
    }
    source.data = columns;
    const fronts = Comparison.paretoFronts(points.filter(({group}) => opacity(styles.get(group.id)) === 1));
    // Where no number is, the line is broken.
    Page.named(`front-${key}`).data = {x: fronts.flatMap((front) => [...front.map((point) => point.x / scale), NaN]),
      y: fronts.flatMap((front) => [...front.map((point) => point.y), NaN])};
    const ticker = Page.named(`ticks-${key}`);
    if (ticker) ticker.ticks = Comparison.roundValues(points.map((point) => point.x / scale), key === "weight_bits");
    box.setAttribute("aria-label", `${GOALS[goal]} against ${title} for ${points.length} configurations. `
      + `On the Pareto front: ${fronts.flat().map((point) => point.group.label).join("; ") || "none"}. The numbers are in the table of results.`);
  }

  // A table: headings that sort, a page of rows at a time, so that ten thousand runs are no burden.
  function table(name, columns, rows) {
    const {column, upwards} = order[name];
    const {key, numeric} = columns[column] ?? columns[0];
    const missing = (value) => value === null || value === undefined || value === "";
    const sorted = [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (missing(x) || missing(y)) return missing(x) - missing(y);
      return (upwards ? 1 : -1) * (numeric ? x - y : inOrder(x, y));
    });
    first[name] = Math.min(first[name], Math.max(0, Math.floor((rows.length - 1) / ROWS)) * ROWS);
    const shown = sorted.slice(first[name], first[name] + ROWS);
    const head = columns.map(({heading, numeric: right}, index) => element("th", {scope: "col", class: right ? "number" : null,
      "aria-sort": index === column ? upwards ? "ascending" : "descending" : null},
      element("button", {type: "button", "data-sort": `${name}:${index}`}, heading)));
    const body = shown.map((row) => element("tr", {}, ...columns.map(({cell, numeric: right}, index) =>
      element(index ? "td" : "th", {scope: index ? null : "row", class: right ? "number" : null}, ...[cell(row)].flat()))));
    const place = find(name);
    const focused = document.activeElement?.dataset?.sort;
    place.tHead.replaceChildren(element("tr", {}, ...head));
    place.tBodies[0].replaceChildren(...body);
    if (focused?.startsWith(`${name}:`)) place.querySelector(`[data-sort="${focused}"]`)?.focus();
    const last = Math.min(first[name] + ROWS, rows.length);
    find(`${name}-pages`).hidden = rows.length <= ROWS;
    find(`${name}-where`).textContent = `${(first[name] + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  }

  function links(group) {
    const shown = group.runs.slice(0, 12).flatMap((run) => [" ", element("a", {href: run.link,
      "aria-label": `${run.name}, ${run.state}`, title: `${run.name}: ${run.state}${run.reason ? `, ${run.reason}` : ""}`},
      `${run.seed || "run"}${{done: "", running: "\u00a0…"}[run.state] ?? ` (${run.state})`}`)]);
    return group.runs.length > 12 ? [...shown, ` and ${group.runs.length - 12} more`] : shown.slice(1);
  }

  function results() {
    const reached = Object.keys(GOALS).filter((goal) => groups.some((group) => group.reached[goal].mean !== null));
    const costs = Object.keys(Page.page.costs).filter((key) => groups.some((group) => group.costs[key].mean !== null));
    const progress = (group) => group.runs.some((run) => run.state === "running");
    table("results", [
      {heading: "configuration", key: (group) => group.label, cell: (group) => group.label},
      {heading: "n", numeric: true, key: (group) => group.runs.length, cell: (group) => group.runs.length},
      ...reached.map((goal) => ({heading: GOALS[goal], numeric: true, key: (group) => group.reached[goal].mean,
        cell: (group) => spread(group.reached[goal], group.runs.length)})),
      {heading: "runs by seed", key: (group) => group.runs.map((run) => run.seed).join(" "), cell: links},
      {heading: "epochs", numeric: true, key: (group) => group.epochs, cell: (group) => progress(group)
        ? `${group.epochs} of ${group.runs[0].planned ?? "?"}` : plain(group.epochs)},
      ...costs.map((key) => ({heading: inTable(key), numeric: true, key: (group) => group.costs[key].mean,
        cell: (group) => ofCost(key, group.costs[key].mean)})),
    ], groups);
  }

  function settings() {
    const own = Comparison.differingKeys(groups.flatMap((group) => group.runs), base).filter((key) => key !== "seed");
    find("settings-none").hidden = own.length > 0 || !groups.length;
    find("settings-box").hidden = own.length === 0;
    // Whatever there is more of goes downwards.
    const across = own.length > groups.length;
    const [rows, columns] = across ? [own, groups] : [groups, own];
    const named = (one) => one.label ?? one;
    const value = (row, column) => across ? column.values[row] : row.values[column];
    table("settings", [
      {heading: across ? "key" : "configuration", key: across ? (row) => rows.indexOf(row) : named, cell: named},
      ...columns.map((column) => ({heading: named(column), key: (row) => value(row, column), cell: (row) => value(row, column) ?? "—"})),
    ], rows);
  }

  const tables = {results, settings};

  const answers = {
    "[data-unfilter]": (button) => { filters.splice(Number(button.dataset.unfilter), 1); refresh(); find("filter-key").focus(); },
    "[data-category]": (button) => {
      const name = button.dataset.category;
      if (!muted.delete(name)) muted.add(name);
      button.setAttribute("aria-pressed", String(!muted.has(name)));
      draw();
    },
    "[data-sort]": (button) => {
      const [name, column] = button.dataset.sort.split(":");
      const same = order[name].column === Number(column);
      order[name] = {column: Number(column), upwards: same ? !order[name].upwards : true};
      first[name] = 0;
      tables[name]();
    },
    "[data-page]": (button) => {
      const [name, way] = button.dataset.page.split(":");
      first[name] = Math.max(0, first[name] + Number(way) * ROWS);
      tables[name]();
    },
  };

  function changed({target}) {
    if (target.id === "filter-key") offerValues();
    else if (target.id === "filter-value" && target.value) {
      const filter = [find("filter-key").value, JSON.parse(target.value)];
      if (!filters.some((other) => String(other) === String(filter))) filters.push(filter);
      target.value = "";
      refresh();
    } else if (["colour-key", "dash-key"].includes(target.id)) { muted.clear(); chooseStyles(); draw(); }
    else if (target.name === "compared") { Object.assign(Page.page, {start: null}); Page.reach(0, 1); draw(); Page.move("reset"); }
    else if (["metric", "goal"].includes(target.id)) draw();
  }

  Page.begin.push(() => {
    delete Page.answers["th button"];
    Object.assign(Page.answers, answers);
    read();
    refresh();
    document.addEventListener("change", changed);
    find("search").addEventListener("input", refresh);
    Page.painted.push(draw);
    const source = Page.named("runs");
    for (const signal of [source.properties.data.change, source.patching, source.streaming]) {
      source.connect(signal, () => { read(); refresh(); });
    }
  });
})();
