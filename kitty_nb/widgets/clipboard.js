// Copies a text on a click. Prepended to the front ends of widgets that copy.

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that is not served over https or from localhost has no clipboard API.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

// Asks the kernel for a text to copy. Every page that shows the widget receives the answer; only
// the one that asked uses it.
function asked(model, message) {
  return new Promise((resolve) => {
    const asker = crypto.getRandomValues(new Uint32Array(4)).join("-");
    const take = (answer) => {
      if (answer.for !== asker) return;
      model.off("msg:custom", take);
      resolve(answer.text);
    };
    model.on("msg:custom", take);
    model.send({ ...message, for: asker });
  });
}

function copied(button) {
  const words = (button.dataset.words ??= button.textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = words), 1500);
}
