// Front end of Address: what to copy, and an address of the server's own web page that this browser
// can reach.

const LOOPBACK = new Set(["localhost", "127.0.0.1", "[::1]"]);

// The address at which the notebook's server forwards requests to a server of this machine, if it
// does. Its other answers (404 without jupyter-server-proxy, a redirect to a login page) are not the
// server's "ok".
async function proxied(endpoint) {
  const config = document.getElementById("jupyter-config-data");
  const base = config && JSON.parse(config.textContent).baseUrl;
  const { hostname, port, pathname } = new URL(`${endpoint}/`);
  if (!base || !LOOPBACK.has(hostname)) return null; // elsewhere, its port is another server's
  const address = new URL(`proxy/${port}${pathname}`, new URL(base, location.href)).href;
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

const ask = (model, what) => asked(model, { kind: "copy", what });

function smallCopyButton(words, title, text) {
  return copyButton("kitty-small-button", words, title, text);
}

function menu(model) {
  const programs = model.get("programs").map(([name, title]) =>
    smallCopyButton(title, "A cell that uses the server with this package, ready to paste", () =>
      ask(model, name),
    ),
  );
  const fold = element("details", "");
  fold.append(element("summary", "", { textContent: "Copy for…" }), ...programs);
  return fold;
}

async function describe(model) {
  const endpoint = model.get("endpoint");
  if (!endpoint) return [];
  const page = (await proxied(endpoint)) ?? (isWithinReach(endpoint) ? `${endpoint}/` : null);
  const url = `${endpoint}/v1`;
  const key = smallCopyButton("Copy key", "The API key that the server requires", () =>
    ask(model, "key"),
  );
  const way = page
    ? element("a", "", {
        href: page,
        target: "_blank",
        rel: "noopener",
        textContent: "Web page",
        title: `The server's own page${model.get("asks_key") ? "; it may ask for the API key" : ""}`,
      })
    : element("span", "", {
        textContent:
          "This browser can't reach the server's own web page. If JupyterLab has no proxy for it:" +
          " pip install jupyter-server-proxy where JupyterLab runs, then restart JupyterLab.",
      });
  return [
    element("code", "", { textContent: url }),
    smallCopyButton("Copy address", "The base URL for OpenAI clients", () => url),
    ...(model.get("asks_key") ? [key] : []),
    smallCopyButton("Copy code", "A cell that asks the model, ready to paste", () => ask(model, "code")),
    menu(model),
    way,
  ];
}

function render({ model, el }) {
  let latest = 0;
  const update = async () => {
    const mine = ++latest;
    const parts = await describe(model);
    if (mine !== latest) return; // superseded by another change
    el.replaceChildren(...parts);
    el.hidden = parts.length === 0;
  };
  el.hidden = true;
  model.on("change", update);
  update();
  return () => model.off("change", update);
}

export default { render };
