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
      const words = await text();
      if (!words) throw new Error("There is nothing to copy.");
      await copy(words);
      show({ textContent: "Copied" }, 1500);
    } catch (error) {
      show({ textContent: "Not copied", title: error.message }, 5000);
    }
  });
  return button;
}
