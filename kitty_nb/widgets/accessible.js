// The page's side of Accessible: what ipywidgets does not tell keyboards and screen readers.

function improve(panel, said) {
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
  const activity = panel.querySelector(":scope > .kitty-activity");
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
  const observer = new MutationObserver(() => improve(panel, said));
  const name = () => panel && (panel.ariaLabel = model.get("label"));
  const attach = () => {
    panel = el.closest(".kitty-panel");
    if (!panel && !gone) requestAnimationFrame(attach); // it is drawn before it is in its place
    if (!panel || gone) return;
    panel.role = "region";
    name();
    panel.addEventListener("keydown", unfold);
    observer.observe(panel, {
      attributeFilter: ["style", "class"],
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
    model.off("change:label", name);
  };
}

export default { render };
