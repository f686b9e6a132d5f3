// The page's side of ModelDetails: the facts of one model, and its chat template.

function createStore() {
  const store = { facts: [], template: "", asked: false, views: new Set() };
  store.receive = (message) => {
    if (message.kind !== "facts") return;
    store.facts = message.facts;
    store.template = message.template;
    store.views.forEach((draw) => draw());
  };
  return store;
}

function initialize(model, store) {
  store.ask = () => {
    if (!store.asked) model.send({ kind: "replay" });
    store.asked = true;
  };
  model.on("msg:custom", store.receive);
  return () => model.off("msg:custom", store.receive);
}

function element(tag, className, properties = {}) {
  return Object.assign(document.createElement(tag), { className, ...properties });
}

// Else JupyterLab takes keys for its own commands on cells, such as x, which cuts one.
function keepKeys(node) {
  node.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  });
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
  store.views.add(draw);
  return () => store.views.delete(draw);
}

export default () => {
  const store = createStore();
  return {
    initialize: ({ model }) => initialize(model, store),
    render: ({ el }) => render(el, store),
  };
};
