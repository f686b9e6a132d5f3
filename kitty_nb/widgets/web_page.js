// The page's side of WebPage: finds an address of the server that this browser can reach.

const LOOPBACK = new Set(["localhost", "127.0.0.1", "[::1]"]);

// Where the notebook's server passes requests on to a port, if it does. Its other answers (404 where
// jupyter-server-proxy is missing, a redirection to a login page) are not the server's "ok".
async function proxied(endpoint) {
  const config = document.getElementById("jupyter-config-data");
  const base = config && JSON.parse(config.textContent).baseUrl;
  if (!base) return null;
  const address = new URL(`proxy/${new URL(endpoint).port}/`, new URL(base, location.href)).href;
  try {
    const health = await (await fetch(new URL("health", address))).json();
    return health.status === "ok" ? address : null;
  } catch {
    return null;
  }
}

function isWithinReach(endpoint) {
  // A front end without JupyterLab's settings, such as an editor's, forwards ports by itself.
  const inJupyter = document.getElementById("jupyter-config-data") !== null;
  return !inJupyter || LOOPBACK.has(location.hostname) || !LOOPBACK.has(new URL(endpoint).hostname);
}

function code(text) {
  return Object.assign(document.createElement("code"), { textContent: text });
}

// Every page that shows the panel hears the answer; only the one that asked takes the key.
function keyButton(model) {
  const button = Object.assign(document.createElement("button"), {
    type: "button",
    className: "kitty-log-button",
    textContent: "Copy key",
    title: "Copy the server's API key to paste there or into another program",
  });
  button.addEventListener("click", () => {
    const asker = crypto.getRandomValues(new Uint32Array(4)).join("-");
    const take = async (message) => {
      if (message.kind !== "key" || message.for !== asker) return;
      model.off("msg:custom", take);
      await copy(message.key);
      copied(button);
    };
    model.on("msg:custom", take);
    model.send({ kind: "key", for: asker });
  });
  return button;
}

async function describe(model) {
  const endpoint = model.get("endpoint");
  if (!endpoint) return [];
  const address = (await proxied(endpoint)) ?? (isWithinReach(endpoint) ? `${endpoint}/` : null);
  const key = model.get("asks_key") ? [keyButton(model)] : [];
  if (!address) {
    return [
      "This browser can't reach the server's own web page. To open it through",
      " JupyterLab: ",
      code("pip install jupyter-server-proxy"),
      " where JupyterLab runs, then restart JupyterLab. ",
      ...key,
    ];
  }
  const link = Object.assign(document.createElement("a"), {
    href: address,
    target: "_blank",
    rel: "noopener",
    textContent: "Open the server’s own web page",
  });
  return key.length ? [link, " · it asks for the API key: ", ...key] : [link];
}

function render({ model, el }) {
  let latest = 0;
  const update = async () => {
    const mine = ++latest;
    const parts = await describe(model);
    if (mine !== latest) return; // overtaken by another change
    el.replaceChildren(...parts);
    el.hidden = parts.length === 0;
  };
  el.hidden = true;
  model.on("change", update);
  update();
  return () => model.off("change", update);
}

export default { render };
