// The page's side of ModelDetails: the facts of one model, and its chat template.

function receive(store, message) {
  if (message.kind !== "facts") return;
  store.facts = message.facts;
  store.template = message.template;
  store.views.forEach((draw) => draw());
}

function render(el, store) {
  const fold = element("details", "kitty-fold");
  const facts = element("dl", "kitty-facts");
  const template = element("pre", "kitty-template", { tabIndex: 0 });
  template.ariaLabel = "Chat template";
  const heading = element("div", "kitty-muted", { textContent: "Chat template" });
  const none = element("div", "kitty-muted", { textContent: "No model is chosen." });
  const summary = element("summary", "", { textContent: "Details" });
  keepKeys(fold);
  fold.append(summary, none, facts, heading, template);
  el.append(fold);

  const draw = () => {
    facts.replaceChildren();
    for (const [name, value] of store.facts) {
      facts.append(
        element("dt", "kitty-muted", { textContent: name }),
        element("dd", "", { textContent: value }),
      );
    }
    none.hidden = store.facts.length > 0;
    template.textContent = store.template;
    heading.hidden = template.hidden = !store.template;
  };
  fold.addEventListener("toggle", () => fold.open && store.ask());
  draw();
  return draw;
}

export default stored(() => ({ facts: [], template: "" }), receive, render);
