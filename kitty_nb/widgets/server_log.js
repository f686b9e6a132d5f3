// Front end of ServerLog: keeps the newest lines per widget model, and draws them in each view.

const LINES_KEPT = 2000;

function levelOf(line) {
  const mark = /^[\d.]+ ([EWD]) /.exec(line);
  if (mark) return { E: "error", W: "warning", D: "debug" }[mark[1]];
  if (/\berror\b|\bfailed\b/i.test(line)) return "error";
  return /\bwarn(ing)?\b/i.test(line) ? "warning" : "info";
}

function forget(store) {
  store.lines = [];
  store.views.forEach((view) => view.clear());
}

function receive(store, message) {
  if (message.kind === "clear") {
    forget(store);
    store.next = message.next;
  } else if (message.kind === "lines") {
    const missed = message.first > store.next;
    if (missed && !message.whole) {
      store.send({ kind: "replay" });
      return;
    }
    if (missed) forget(store);
    const known = Math.max(0, store.next - message.first);
    const fresh = message.lines.slice(known);
    store.next = Math.max(store.next, message.first + message.lines.length);
    store.lines = store.lines.concat(fresh).slice(-LINES_KEPT);
    store.views.forEach((view) => view.append(fresh));
  }
}

function render(el, store) {
  const filter = element("input", "kitty-log-filter", {
    type: "search",
    placeholder: "Filter",
    ariaLabel: "Filter the server log",
  });
  const follow = element("button", "kitty-small-button", { type: "button" });
  const copyAll = copyButton("kitty-small-button", "Copy", "Copy the lines shown", () =>
    store.lines.filter(matches).join("\n"),
  );
  const bar = element("div", "kitty-log-bar");
  bar.append(
    element("span", "kitty-heading", { textContent: "Server log" }),
    filter,
    follow,
    copyAll,
  );
  const list = element("div", "kitty-log", { tabIndex: 0, role: "log" });
  list.ariaLabel = "Server log";
  const empty = element("div", "kitty-log-empty", {
    textContent: "The server's output appears here.",
  });
  el.append(bar, list);
  list.append(empty);

  let following = true;
  const matches = (text) => text.toLowerCase().includes(filter.value.toLowerCase());
  const setFollowing = (value) => {
    following = value;
    follow.textContent = value ? "Pause" : "Follow";
    follow.title = value ? "Stop following the log" : "Scroll to the end and follow the log";
    if (value) list.scrollTop = list.scrollHeight;
  };
  const draw = (text) => {
    const line = element("div", `kitty-log-line kitty-log-${levelOf(text)}`, { textContent: text });
    line.hidden = !matches(text);
    return line;
  };
  const view = {
    append(lines) {
      empty.remove();
      list.append(...lines.slice(-LINES_KEPT).map(draw));
      while (list.childElementCount > LINES_KEPT) list.firstElementChild.remove();
      if (following) list.scrollTop = list.scrollHeight;
    },
    clear() {
      list.replaceChildren(empty);
    },
  };

  filter.addEventListener("input", () => {
    for (const line of list.children) line.hidden = line !== empty && !matches(line.textContent);
    if (following) list.scrollTop = list.scrollHeight;
  });
  follow.addEventListener("click", () => setFollowing(!following));
  // Only the user's own scrolling starts or stops following; growing content does not.
  const follows = () => {
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 24;
    if (atEnd !== following) setFollowing(atEnd);
  };
  for (const kind of ["wheel", "touchmove", "keyup", "pointerup"]) {
    list.addEventListener(kind, () => requestAnimationFrame(follows), { passive: true });
  }

  setFollowing(true);
  if (store.lines.length) view.append(store.lines);
  store.ask("lines");
  return view;
}

export default stored(() => ({ lines: [], next: 0 }), receive, render);
