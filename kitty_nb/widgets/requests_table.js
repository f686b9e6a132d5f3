// Front end of RequestsTable: draws the rows, newest first.

const COLUMNS = [
  ["Time", "at"],
  ["Model", "model"], // of a router
  ["Prompt", "prompt"],
  ["Cached", "cached"],
  ["First token", "first"],
  ["Answer", "answer"],
  ["Speed", "speed"],
  ["Drafts", "accepted"],
  ["Took", "took"],
  ["Ended", "ended"],
];

function receive(store, message) {
  if (message.kind !== "rows") return;
  store.rows = message.rows;
  store.views.forEach((view) => view.draw());
}

function render(el, store) {
  const table = element("table", "kitty-requests-table");
  const head = element("tr", "");
  const body = document.createElement("tbody");
  table.append(document.createElement("thead"), body);
  table.tHead.append(head);
  const empty = element("div", "kitty-muted", { textContent: "No requests yet." });
  const box = element("div", "kitty-requests-box", { tabIndex: 0, role: "region" });
  box.ariaLabel = "Requests";
  box.append(table, empty);
  el.append(box);
  const draw = () => {
    empty.hidden = store.rows.length > 0;
    table.hidden = !store.rows.length;
    const columns = COLUMNS.filter(([, key]) => key !== "model" || store.rows.some((row) => row.model));
    head.replaceChildren(...columns.map(([name]) => element("th", "", { scope: "col", textContent: name })));
    const line = (row) => {
      const shown = { ...row, at: new Date(row.at * 1000).toLocaleTimeString([], { hourCycle: "h23" }) };
      const line = element("tr", row.ended === "error" ? "kitty-bad" : "", { title: row.error });
      line.append(...columns.map(([, key]) => element("td", "", { textContent: shown[key] })));
      return line;
    };
    body.replaceChildren(...store.rows.map(line));
  };
  draw();
  store.ask("rows");
  return { draw };
}

export default stored(() => ({ rows: [] }), receive, render);
