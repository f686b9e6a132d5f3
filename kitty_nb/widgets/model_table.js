// Front end of ModelTable: models to filter and choose from.

const COLUMNS = [
  ["", "star"],
  ["Model", "name"],
  ["Quantization", "quantization"],
  ["Size", "size"],
  ["Context", "context"],
  ["Memory", "fits"],
  ["Last used", "used"],
  ["Load time", "load"],
];
const TONES = { fits: "good", tight: "warn", "will not fit": "bad" };
const DAY = 24 * 60 * 60 * 1000;
const [CLOCK, DATE, LONG_AGO] = [
  { hour: "2-digit", minute: "2-digit" },
  { day: "numeric", month: "short" },
  { day: "numeric", month: "short", year: "numeric" },
].map((options) => new Intl.DateTimeFormat([], options));

function receive(store, message) {
  if (message.kind === "rows") store.rows = message.rows;
  else if (message.kind === "fits") Object.assign(store.fits, message.fits);
  else if (message.kind === "chosen") store.chosen = message.id;
  else return;
  store.views.forEach((view) => view[message.kind]());
}

function choose(store, id) {
  receive(store, { kind: "chosen", id }); // at once, without waiting for the kernel's answer
  store.send({ kind: "choose", id });
}

function when(seconds) {
  if (seconds === null) return "";
  const then = new Date(seconds * 1000);
  const now = new Date();
  if (then.toDateString() === now.toDateString()) return CLOCK.format(then);
  if (then.toDateString() === new Date(now - DAY).toDateString()) return "yesterday";
  return (then.getFullYear() === now.getFullYear() ? DATE : LONG_AGO).format(then);
}

function drawStar(row, store) {
  const star = element("button", "kitty-star", { type: "button", tabIndex: -1 });
  const show = () => {
    star.textContent = row.favourite ? "★" : "☆";
    star.ariaPressed = String(row.favourite);
    star.ariaLabel = `Favourite: ${row.name}`;
    star.title = row.favourite ? "Remove from favourites (f)" : "Add to favourites (f)";
  };
  star.addEventListener("click", (event) => {
    event.stopPropagation();
    row.favourite = !row.favourite;
    show();
    store.send({ kind: "mark", id: row.id, favourite: row.favourite });
  });
  show();
  return star;
}

function drawName(row) {
  const name = element("span", "kitty-row-name", { textContent: row.name, title: row.name });
  if (!row.store) return [name];
  return [name, element("span", "kitty-row-store", { textContent: row.store, title: row.store })];
}

function drawRow(row, store) {
  const line = element("div", row.family ? "kitty-row kitty-row-member" : "kitty-row", {
    role: "row",
    tabIndex: -1,
  });
  line.dataset.id = row.id;
  for (const [, key] of COLUMNS) {
    const cell = element("div", `kitty-col-${key}`, { role: "gridcell" });
    if (key === "star") cell.append(drawStar(row, store));
    else if (key === "name") cell.append(...drawName(row));
    else if (key !== "fits") cell.textContent = key === "used" ? when(row.used) : row[key];
    line.append(cell);
  }
  line.title = row.problem;
  return line;
}

function render(el, store) {
  const filter = element("input", "kitty-filter", {
    type: "search",
    placeholder: "Search by name, family, quantization, architecture",
    ariaLabel: "Filter the models",
  });
  const count = element("span", "kitty-muted", { ariaLive: "polite" });
  const bar = element("div", "kitty-table-bar");
  bar.append(filter, count);
  // Not a <table>: rows out of sight cost nothing only if they are boxes of their own.
  const table = element("div", "kitty-table", { role: "grid", ariaLabel: "Models" });
  const head = element("div", "kitty-row-head", { role: "row" });
  for (const [title, key] of COLUMNS) {
    const cell = element("div", `kitty-col-${key}`, { role: "columnheader", textContent: title });
    if (key === "star") cell.ariaLabel = "Favourite";
    head.append(cell);
  }
  const body = element("div", "", { role: "rowgroup" });
  table.append(head, body);
  const scroller = element("div", "kitty-table-scroll");
  const empty = element("div", "kitty-table-empty", { hidden: true });
  scroller.append(table, empty);
  keepKeys(el);
  el.append(bar, scroller);

  let lines = []; // of rows: [line, words]
  let families = []; // [heading, lines]
  const byId = new Map();
  let brought = false; // whether the chosen row has been scrolled into view

  const visible = () => lines.filter(([line]) => !line.hidden).map(([line]) => line);
  const applyFilter = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [line, text] of lines) {
      line.hidden = !words.every((word) => text.includes(word));
      if (!line.hidden) shown += 1;
    }
    for (const [heading, members] of families) heading.hidden = members.every((line) => line.hidden);
    const all = `${lines.length.toLocaleString("en")} model${lines.length === 1 ? "" : "s"}`;
    count.textContent = words.length ? `${shown.toLocaleString("en")} of ${all}` : all;
    empty.hidden = shown > 0;
    empty.textContent = lines.length ? "No model matches." : "No models yet.";
    table.hidden = shown === 0;
  };
  const focusOn = (line) => {
    body.querySelectorAll("[tabindex='0']").forEach((other) => (other.tabIndex = -1));
    if (line) line.tabIndex = 0;
  };
  const view = {
    rows() {
      const focused = body.contains(document.activeElement) && document.activeElement.dataset.id;
      const fragment = document.createDocumentFragment();
      lines = [];
      families = [];
      byId.clear();
      let last = "";
      for (const row of store.rows) {
        if (row.family && row.family !== last) {
          const heading = element("div", "kitty-family", { role: "row" });
          heading.append(element("div", "", { role: "rowheader", textContent: row.family }));
          fragment.append(heading);
          families.push([heading, []]);
        }
        last = row.family;
        const line = drawRow(row, store);
        if (row.family) families.at(-1)[1].push(line);
        lines.push([line, row.words]);
        byId.set(row.id, [line, row]);
        fragment.append(line);
      }
      body.replaceChildren(fragment);
      view.fits();
      applyFilter();
      view.chosen();
      if (focused) byId.get(Number(focused))?.[0].focus();
    },
    fits() {
      for (const [id, [line, row]] of byId) {
        const fits = row.state || store.fits[id] || "";
        const cell = line.querySelector(".kitty-col-fits");
        cell.textContent = fits;
        cell.className = `kitty-col-fits kitty-${row.state ? "idle" : TONES[fits] || "idle"}`;
      }
    },
    chosen() {
      for (const [id, [line]] of byId) {
        if (id === store.chosen) line.ariaSelected = "true";
        else line.removeAttribute("aria-selected");
      }
      const line = byId.get(store.chosen)?.[0];
      focusOn(line || lines[0]?.[0]);
      if (line && !brought) scroller.scrollTop = line.offsetTop - scroller.clientHeight / 2;
      brought ||= Boolean(line);
    },
  };

  filter.addEventListener("input", applyFilter);
  filter.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown") return;
    event.preventDefault();
    visible()[0]?.focus();
  });
  body.addEventListener("click", (event) => {
    const line = event.target.closest(".kitty-row");
    if (line) choose(store, Number(line.dataset.id));
  });
  body.addEventListener("keydown", (event) => {
    const line = event.target.closest(".kitty-row");
    if (!line || event.ctrlKey || event.metaKey || event.altKey) return;
    const shown = visible();
    const at = shown.indexOf(line);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: shown.length - 1 };
    if (event.key in moves) {
      if (moves[event.key] < 0) filter.focus();
      else (shown[moves[event.key]] || line).focus();
    } else if (event.target === line && (event.key === "Enter" || event.key === " ")) {
      choose(store, Number(line.dataset.id));
    } else if (event.key === "f") line.querySelector(".kitty-star").click();
    else return;
    event.preventDefault();
  });
  body.addEventListener("focusin", (event) => focusOn(event.target.closest(".kitty-row")));

  if (store.rows.length) view.rows();
  store.ask("table");
  return view;
}

export default stored(() => ({ rows: [], fits: {}, chosen: null }), receive, render);
