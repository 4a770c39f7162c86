"use strict";
// Brings a page to life: draws its Bokeh figures in the colours of page.css and answers its controls.
// Nothing here builds HTML from strings, and no value of a run is ever evaluated.
const Page = (() => {
  const page = JSON.parse(document.getElementById("figures").textContent);
  let figures;  // the Bokeh document
  const models = (type) => [...figures.all_models].filter((model) => model.type === type);
  const named = (name) => figures.get_model_by_name(name);
  const all = (selector) => [...document.querySelectorAll(selector)];

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paper = new CSSStyleSheet();
  document.adoptedStyleSheets = [paper];

  // Charts cannot be drawn anew while the browser prints: the page takes the width they have, the printer scales.
  function pageAsWideAsTheScreen() {
    const width = Math.max(innerWidth, 640) + 96;
    return `@page { size: ${width}px ${Math.round(width * 1.414)}px; margin: 48px; }`;
  }

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // Bokeh draws on a canvas, so the colours of the style sheet have to be copied into its models.
  function paint() {
    if (matchMedia("print").matches) return;
    document.documentElement.dataset.painted = dark.matches ? "dark" : "light";
    for (const axis of [...models("LinearAxis"), ...models("LogAxis"), ...models("CategoricalAxis")]) {
      axis.setv({axis_label_text_color: colour("quiet"), major_label_text_color: colour("quiet"),
        axis_line_color: colour("rule"), major_tick_line_color: colour("rule")});
    }
    for (const grid of models("Grid")) grid.grid_line_color = colour("grid");
    for (const bar of models("ColorBar")) bar.major_label_text_color = colour("quiet");
    for (const span of models("Span")) span.line_color = colour("rule");
    for (const renderer of models("GlyphRenderer")) {
      const [role] = renderer.tags;
      for (const glyph of role ? [renderer.glyph, renderer.muted_glyph] : []) {
        for (const part of ["line_color", "fill_color", "text_color"]) {
          if (glyph && part in glyph.properties) glyph[part] = {value: colour(role)};
        }
      }
    }
    for (const also of Page.painted) also();
  }

  // A number as the cards write it: Bokeh's own letters are b and t, and m for a thousandth.
  function written(value, letters) {
    const size = Math.abs(value);
    if (size && (size >= 1e12 || size < 1e-4)) return Number(value.toPrecision(8)).toExponential().replace("e+", "e");
    const [unit, letter] = letters && [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([unit]) => size >= unit) || [1, ""];
    return Number((value / unit).toPrecision(8)).toLocaleString("en", {maximumFractionDigits: 12}) + letter;
  }

  // Along an axis that stays below 10,000 every number fits without a letter.
  function writeAmounts() {
    for (const formatter of models("NumeralTickFormatter")) {
      if (!formatter.tags.includes("amounts")) continue;
      formatter.doFormat = (ticks) => ticks.map((tick) => written(tick, ticks.some((one) => Math.abs(one) >= 1e4)));
    }
  }

  const equal = (a, b) => a.length === b?.length && a.every((value, index) => Object.is(value, b[index]));

  // The columns x, left and right hold the position on the chosen axis; x_step, left_step ... all positions.
  function chooseAxis(name, keep = false) {
    const {label, end} = page.axes[name];
    for (const source of models("ColumnDataSource")) {
      const chosen = {};
      for (const column of ["x", "left", "right"]) {
        const wanted = source.data[`${column}_${name}`];
        if (wanted && !equal(wanted, source.data[column])) chosen[column] = wanted;
      }
      if (Object.keys(chosen).length) source.data = {...source.data, ...chosen};
    }
    for (const axis of models("LinearAxis")) if (axis.name === "x") axis.axis_label = label;
    for (const ticker of models("BasicTicker")) {
      if (ticker.name === "x") ticker.min_interval = name === "time" ? 0 : 1;
    }
    reach(...end, keep);
  }

  // What there is to see reaches from start to end; a part that somebody has zoomed to stays, unless all of it is to be shown.
  function reach(start, end, keep = false) {
    const range = models("Range1d").find((candidate) => candidate.name === "x");
    const whole = !range || page.start == null || range.start === page.start && range.end === page.end;
    Object.assign(page, {start, end});
    if (whole || !keep) show(start, end);
  }

  function show(start, end) {
    for (const range of models("Range1d")) if (range.name === "x") range.setv({start, end});
  }

  const moves = {
    closer: (start, width) => [start + width / 4, start + width * 3 / 4],
    wider: (start, width) => [start - width / 2, start + width * 3 / 2],
    earlier: (start, width) => [start - width / 4, start + width * 3 / 4],
    later: (start, width) => [start + width / 4, start + width * 5 / 4],
    reset: () => [page.start, page.end],
  };

  function move(kind) {
    const range = models("Range1d").find((candidate) => candidate.name === "x");
    if (!range) return;
    const [start, end] = moves[kind](range.start, range.end - range.start);
    const width = end - start;
    if (width > (page.end - page.start) * (1 - 1e-9)) return show(page.start, page.end);  // all of it, not all but a rounding error
    // At an edge the window stops as a whole: were its ends held back one by one, it would shrink.
    const left = Math.max(page.start, Math.min(start, page.end - width));
    show(left, left + width);
  }

  const keys = {"+": "closer", "-": "wider", ArrowLeft: "earlier", ArrowRight: "later", Escape: "reset"};

  // A chart that has the focus is moved by keys; with Ctrl and the like they are the browser's.
  function press(event) {
    const kind = keys[event.key];
    if (!kind || !event.target.closest(".plot") || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(kind);
  }

  function mute(button) {
    const muted = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!muted));
    for (const renderer of models("GlyphRenderer")) {
      if (renderer.tags[1] === button.dataset.series) renderer.muted = muted;
    }
  }

  function sort(button) {
    const header = button.closest("th");
    const table = header.closest("table");
    const upwards = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const key = (row) => row.cells[header.cellIndex].dataset.sort ?? row.cells[header.cellIndex].textContent;
    const compare = (a, b) => header.classList.contains("number")
      ? (a === "" ? -Infinity : Number(a)) - (b === "" ? -Infinity : Number(b))
      : a.localeCompare(b, undefined, {numeric: true});
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => (upwards ? 1 : -1) * compare(key(a), key(b)));
    table.tBodies[0].append(...rows);
  }

  async function copy(button) {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source);
    await navigator.clipboard?.writeText(source.textContent).then(() => { button.textContent = "Copied"; }, () => {});
  }

  function chooseFigure(select) {
    for (const option of select.options) {
      document.getElementById(option.value).closest("figure").hidden = !option.selected;
    }
  }

  const answers = {
    "[data-move]": (button) => move(button.dataset.move),
    "[data-series]": mute,
    "th button": sort,
    "[data-copy]": copy,
  };

  // Parts of a page may be replaced while it is followed: the page listens, not the part.
  function listen() {
    document.addEventListener("click", ({target}) => {
      for (const [selector, answer] of Object.entries(answers)) {
        const found = target.closest(selector);
        if (found) answer(found);
      }
    });
    document.addEventListener("change", ({target}) => {
      if (target.matches("input[name=axis]")) chooseAxis(target.value);
      if (target.matches("select[data-figures]")) chooseFigure(target);
    });
    document.addEventListener("keydown", press);
    for (const plot of all(".plot")) plot.addEventListener("dblclick", () => move("reset"));
    dark.addEventListener("change", paint);
    addEventListener("beforeprint", () => paper.replaceSync(pageAsWideAsTheScreen()));
  }

  async function start() {
    figures = await Page.document();
    // A finger that drags over a chart wants to scroll the page; the buttons zoom.
    if (matchMedia("(pointer: coarse)").matches) for (const bar of models("Toolbar")) bar.active_drag = null;
    const chosen = document.querySelector("input[name=axis]:checked");
    if (chosen && page.axes[chosen.value]) chooseAxis(chosen.value);
    for (const begin of Page.begin) begin();
    paint();
    writeAmounts();
    listen();
    await Bokeh.embed.add_document_standalone(figures, document.body, page.hosts.map((id) => document.getElementById(id)));
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }
  addEventListener("DOMContentLoaded", start);

  return {
    begin: [],  // what else to do once the document is there
    painted: [],  // what else to do when colours change
    document: async () => Bokeh.require("document/index").Document.from_json(page.document),
    answers, page, models, named, colour, all, reach, chooseAxis, move,
  };
})();
