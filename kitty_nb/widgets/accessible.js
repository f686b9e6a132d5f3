// Front end of Accessible: what ipywidgets lacks for keyboards, screen readers and people who look
// elsewhere.

const LONG = 10_000; // ms; people wait for a shorter load
const UNDER_WAY = ["Starting", "Loading"];
const ENDED = ["Ready", "Failed", "Crashed"];
let title = null; // the page's own title, while another replaces it

window.addEventListener("focus", () => {
  if (title !== null) document.title = title;
  title = null;
});

function announce(text) {
  if (!document.hasFocus()) {
    title ??= document.title;
    document.title = text;
  }
  if (window.Notification?.permission === "granted") {
    new Notification("kitty_nb", { body: text, tag: "kitty_nb" });
  }
}

// Announces the end of a long load.
function watchLoad(panel, load) {
  const word = panel.querySelector(".kitty-badge")?.textContent;
  if (UNDER_WAY.includes(word)) load.since ??= performance.now();
  else {
    const long = load.since && performance.now() - load.since > LONG;
    const model = panel.querySelector(".kitty-status b")?.textContent;
    if (long && ENDED.includes(word)) announce([word, model].filter(Boolean).join(": "));
    load.since = null;
  }
}

// Moves the focus from what has been hidden to what has replaced it.
function keepFocus(panel, focus) {
  const visible = (node) => node.offsetParent !== null;
  if (!focus.last || visible(focus.last) || document.activeElement !== document.body) return;
  const near = focus.last.closest(".kitty-buttons")?.querySelectorAll("button") ?? [];
  const others = panel.querySelectorAll(".kitty-buttons button");
  [...near, ...others].find((button) => visible(button) && !button.disabled)?.focus();
}

// Otherwise a panel whose kernel is gone would look alive.
function sayGone(panel) {
  if (!panel.matches(".jupyter-widgets-disconnected")) return;
  if (panel.querySelector(":scope > .kitty-gone")) return;
  for (const part of panel.children) part.inert = true;
  const found = panel.matches(".kitty-sweep")
    ? "the finished trials"
    : "a server that is still running, with its log";
  const textContent =
    `This panel's kernel has restarted or ended. Run the cell again: it finds ${found}.`;
  panel.prepend(element("div", "kitty-gone", { role: "alert", textContent }));
}

function improve(panel, said) {
  sayGone(panel);
  for (const bar of panel.querySelectorAll(".kitty-bar .progress")) {
    const text = bar.closest(".kitty-load, .kitty-fetch")?.querySelector(".kitty-bar-text");
    bar.role = "progressbar";
    bar.ariaLabel = "Progress";
    bar.ariaValueMin = "0";
    bar.ariaValueMax = "100";
    bar.ariaValueNow = String(Math.round(parseFloat(bar.firstElementChild?.style.width) || 0));
    bar.ariaValueText = text?.textContent || null;
  }
  for (const notice of panel.querySelectorAll(".kitty-notice")) notice.role = "alert";
  const activity = panel.querySelector(".kitty-activity");
  if (activity) Object.assign(activity, { role: "group", ariaLabel: "Activity", tabIndex: 0 });
  for (const head of panel.querySelectorAll(".jupyter-widget-Collapse-header")) {
    head.role = "button";
    head.tabIndex = 0;
    head.ariaExpanded = String(head.parentElement.matches(".jupyter-widget-Collapse-open"));
  }
  for (const tip of panel.querySelectorAll("label > [title]")) {
    const field = document.getElementById(tip.parentElement.htmlFor);
    if (field) field.title = tip.title;
  }
  say(said, panel.querySelector(".kitty-badge")?.textContent ?? "");
}

function unfold(event) {
  if (event.key !== "Enter" && event.key !== " ") return;
  if (!event.target.matches(".jupyter-widget-Collapse-header")) return;
  event.preventDefault();
  event.stopPropagation(); // JupyterLab has its own commands for these keys
  event.target.click();
}

function render({ model, el }) {
  const said = document.createElement("span");
  said.role = "status";
  el.append(said);
  let panel = null;
  let gone = false;
  const load = { since: null };
  const focus = { last: null };
  const see = (event) => (focus.last = event.target);
  const observer = new MutationObserver(() => {
    improve(panel, said);
    watchLoad(panel, load);
    // The browser takes the focus from what is hidden only once it has been drawn.
    requestAnimationFrame(() => requestAnimationFrame(() => keepFocus(panel, focus)));
  });
  const name = () => panel && (panel.ariaLabel = model.get("label"));
  const attach = () => {
    panel = el.closest(".kitty-panel");
    if (!panel && !gone) requestAnimationFrame(attach); // it is drawn before it is attached
    if (!panel || gone) return;
    panel.role = "region";
    name();
    panel.addEventListener("keydown", unfold);
    panel.addEventListener("focusin", see);
    observer.observe(panel, {
      attributeFilter: ["style", "class", "disabled"],
      childList: true,
      subtree: true,
    });
    improve(panel, said);
  };
  attach();
  model.on("change:label", name);
  return () => {
    gone = true;
    observer.disconnect();
    panel?.removeEventListener("keydown", unfold);
    panel?.removeEventListener("focusin", see);
    model.off("change:label", name);
  };
}

export default { render };
