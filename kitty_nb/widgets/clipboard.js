// Copies a text on a click. Prepended to the front ends of widgets that copy.

const PLAIN = { type: "text/plain" };
const REFUSED =
  "The browser doesn't let this page copy. Open JupyterLab over https or from localhost.";

async function copy(text) {
  try {
    // Safari copies only within the click, so it gets a promise of what the kernel may answer.
    await navigator.clipboard.write([
      new ClipboardItem({ "text/plain": text.then((words) => new Blob([words], PLAIN)) }),
    ]);
  } catch {
    copySelected(await text);
  }
}

// A page that is not served over https or from localhost has no clipboard API.
function copySelected(text) {
  const focused = document.activeElement;
  const area = element("textarea", "", { value: text });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus({ preventScroll: true });
  if (!done) throw new Error(REFUSED);
}

// Asks the kernel for a text to copy. Every page that shows the widget receives the answer; only
// the one that asked uses it.
function asked(model, message) {
  return new Promise((resolve, reject) => {
    const asker = crypto.getRandomValues(new Uint32Array(4)).join("-");
    const take = (answer) => {
      if (answer.for !== asker) return;
      model.off("msg:custom", take);
      if (answer.problem) reject(new Error(answer.problem));
      else resolve(answer.text);
    };
    model.on("msg:custom", take);
    model.send({ ...message, for: asker });
  });
}

function nonEmpty(text) {
  if (!text) throw new Error("There is nothing to copy.");
  return text;
}

// A button that copies what a function returns or promises, and says whether that worked.
function copyButton(className, words, title, text) {
  const usual = { textContent: words, title };
  const button = element("button", className, { type: "button", ...usual });
  const show = (other, milliseconds) => {
    Object.assign(button, usual, other);
    setTimeout(() => Object.assign(button, usual), milliseconds);
  };
  button.addEventListener("click", async () => {
    try {
      await copy(Promise.resolve(text()).then(nonEmpty));
      show({ textContent: "Copied" }, 1500);
    } catch (error) {
      show({ textContent: "Not copied", title: error.message }, 5000);
    }
  });
  return button;
}
