// Front end of FleetPanel: draws the rows that it is given, and reports clicks.

const COLUMNS = ["State", "Model", "Port", "Memory", "Tok/s", ""]; // after that of the names

function button(text, title, onClick) {
  const made = element("button", "jupyter-button kitty-fleet-button", {
    type: "button",
    textContent: text,
    title,
  });
  made.addEventListener("click", onClick);
  return made;
}

function createRow(profile, send) {
  const row = element("tr", "kitty-fleet-row");
  const name = element("th", "kitty-fleet-profile", { scope: "row", textContent: profile });
  const cells = COLUMNS.map((label) => {
    const cell = element("td", `kitty-fleet-${label.toLowerCase().replace("/", "") || "actions"}`);
    cell.dataset.label = label;
    return cell;
  });
  const [state, model, port, memory, pace, actions] = cells;
  const badge = element("span", "kitty-badge", { role: "status" });
  const detail = element("span", "kitty-fact");
  const bar = element("div", "kitty-fleet-bar", {
    role: "progressbar",
    ariaLabel: `Load of ${profile}`,
    ariaValueMin: "0",
    ariaValueMax: "100",
  });
  const filled = bar.appendChild(element("div", ""));
  state.append(badge, " ", detail, bar);
  const start = button("Start", `Start ${profile}`, () => send({ kind: "start", profile }));
  const stop = button("Stop", "", () => send({ kind: "stop", profile }));
  actions.append(start, stop);
  row.append(name, ...cells);
  const problem = element("tr", "kitty-fleet-problem");
  const whole = problem.appendChild(element("td", "", { colSpan: COLUMNS.length + 1 }));
  const text = whole.appendChild(element("div", "", { role: "alert" }));

  const update = (facts) => {
    badge.className = `kitty-badge kitty-${facts.tone}`;
    say(badge, facts.status);
    say(detail, facts.detail);
    bar.hidden = facts.fraction === null;
    filled.style.width = `${100 * (facts.fraction ?? 0)}%`;
    bar.ariaValueNow = String(Math.round(100 * (facts.fraction ?? 0)));
    bar.ariaValueText = facts.detail;
    say(model, facts.model);
    model.title = facts.model;
    say(port, String(facts.port ?? "\u2013"));
    say(memory, facts.memory);
    say(pace, facts.pace);
    start.disabled = !facts.start;
    stop.disabled = !facts.stop;
    start.hidden = stop.hidden = facts.routed;
    say(stop, facts.attached ? "Detach" : facts.status === "Restarting" ? "Cancel" : "Stop");
    stop.title = `${stop.textContent} ${profile}`;
    say(text, facts.problem);
    problem.hidden = !facts.problem;
  };
  return { nodes: [row, problem], update };
}

function render({ model, el }) {
  const send = (message) => model.send(message);
  const each = model.get("each");
  const startAll = button("Start all", `Start every ${each.toLowerCase()} that can start`, () =>
    send({ kind: "start_all" }),
  );
  const stopAll = button("Stop all", "Stop all servers", () => send({ kind: "stop_all" }));
  const rescan = button("Rescan", model.get("rescans"), () => send({ kind: "rescan" }));
  const summary = element("span", "kitty-fact");
  const bar = element("div", "kitty-fleet-head");
  const buttons = element("div", "kitty-fleet-buttons");
  buttons.append(startAll, stopAll, rescan);
  bar.append(element("span", "kitty-heading", { textContent: "Fleet" }), summary, buttons);
  const notice = element("div", "kitty-fleet-notice", { role: "alert" });
  const table = element("table", "kitty-fleet-table");
  const head = table.createTHead().insertRow();
  for (const label of [each, ...COLUMNS]) {
    head.append(element("th", "", { textContent: label, scope: "col" }));
  }
  const body = table.createTBody();
  el.role = "region";
  el.ariaLabel = "kitty_nb fleet";
  el.append(bar, notice, table);

  const drawn = new Map();
  const update = () => {
    const rows = model.get("rows");
    for (const [profile, { nodes }] of drawn) {
      if (rows.some((facts) => facts.profile === profile)) continue;
      nodes.forEach((node) => node.remove());
      drawn.delete(profile);
    }
    const focused = document.activeElement;
    let next = body.firstElementChild;
    for (const facts of rows) {
      if (!drawn.has(facts.profile)) drawn.set(facts.profile, createRow(facts.profile, send));
      const row = drawn.get(facts.profile);
      for (const node of row.nodes) {
        if (node === next) next = next.nextElementSibling;
        else body.insertBefore(node, next);
      }
      row.update(facts);
    }
    if (document.activeElement !== focused) focused.focus(); // its row has been moved
    const servers = rows.filter((facts) => !facts.routed);
    const running = servers.filter((facts) => facts.stop || facts.status === "Ready").length;
    say(summary, `${running} of ${servers.length} running`);
    startAll.disabled = !rows.some((facts) => facts.start);
    stopAll.disabled = !rows.some((facts) => facts.stop);
    say(notice, model.get("notice"));
    notice.hidden = !model.get("notice");
  };
  model.on("change", update);
  update();
  return () => model.off("change", update);
}

export default { render };
