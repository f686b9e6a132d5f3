// Shared by the front ends of several widgets, and prepended to each.

function element(tag, className, properties = {}) {
  return Object.assign(document.createElement(tag), { className, ...properties });
}

// Writes only changes, so that unchanged text is not disturbed while focused, nor read out again.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Otherwise JupyterLab would take keys for its own commands on cells, such as x, which cuts one.
function keepKeys(node) {
  node.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  });
}

// A widget whose views come and go, while its model keeps what it has received in a store.
function stored(begin, receive, render) {
  return () => {
    const store = { views: new Set(), asked: new Set(), ...begin() };
    return {
      initialize({ model }) {
        store.model = model;
        store.send = (message) => model.send(message);
        store.ask = (part) => {
          if (!store.asked.has(part)) model.send({ kind: "replay", part });
          store.asked.add(part);
        };
        const hear = (message) => receive(store, message);
        model.on("msg:custom", hear);
        return () => model.off("msg:custom", hear);
      },
      render({ el }) {
        const view = render(el, store);
        store.views.add(view);
        return () => store.views.delete(view);
      },
    };
  };
}

