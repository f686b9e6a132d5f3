// Writes a model's answer as it streams: paragraphs, code blocks, headings, bold and inline code.
// What a model says is untrusted, so it only ever becomes text. A complete line is never touched
// again, so a long answer costs no more per piece than a short one. Prepended to the front ends of
// widgets that show answers.

const LONG_LINE = 2000; // characters; a longer line is plain text
const FENCE = /^\s*(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const MAYBE_FENCE = /^\s*(`{0,2}|~{0,2}|(```|~~~).*)$/;
const MARKS = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*/g;

function inline(text) {
  if (text.length > LONG_LINE) return [text];
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(MARKS)) {
    parts.push(text.slice(end, found.index));
    if (found[1]) parts.push(element("code", "", { textContent: found[2] }));
    else parts.push(element("strong", "", { textContent: found[3] }));
    end = found.index + found[0].length;
  }
  return [...parts, text.slice(end)];
}

function codeBlock(root) {
  const code = element("code", "");
  const button = element("button", "kitty-ask-button", { type: "button", textContent: "Copy" });
  button.ariaLabel = "Copy the code";
  button.addEventListener("click", async () => {
    await copy(code.textContent);
    copied(button);
  });
  const [box, pre] = [element("div", "kitty-ask-code"), element("pre", "", { tabIndex: 0 })];
  pre.append(code);
  box.append(pre, button);
  root.append(box);
  return code;
}

function answerWriter(root) {
  let block = null; // the open paragraph or code block
  let fence = ""; // the mark that ends the code
  let line = ""; // the last one, still incomplete
  let rest = null; // its node

  const paragraph = () => root.appendChild(element("p", ""));
  const finish = (text) => {
    const mark = FENCE.exec(text);
    if (fence && mark?.[1].startsWith(fence) && !mark[2]) {
      [fence, block] = ["", null];
    } else if (fence) {
      block.append(`${text}\n`);
    } else if (mark) {
      [fence, block] = [mark[1], codeBlock(root)];
    } else if (!text.trim()) {
      block = null;
    } else {
      const heading = /^#{1,6} (.*)/.exec(text)?.[1];
      block ??= paragraph();
      if (block.hasChildNodes()) block.append("\n");
      block.append(...(heading ? [element("strong", "", { textContent: heading })] : inline(text)));
    }
  };
  const showRest = (fresh) => {
    if (rest && line.length > LONG_LINE) {
      rest.append(fresh);
      return;
    }
    rest?.remove();
    rest = null;
    if (MAYBE_FENCE.test(line)) return;
    if (!fence) block ??= paragraph();
    rest = element("span", "");
    if (!fence && block.hasChildNodes()) rest.append("\n");
    rest.append(...(fence ? [line] : inline(line)));
    block.append(rest);
  };
  return {
    append(text) {
      const lines = text.split("\n");
      if (lines.length > 1) {
        rest?.remove();
        rest = null;
        lines[0] = line + lines[0];
        line = "";
        lines.slice(0, -1).forEach(finish);
      }
      line += lines.at(-1);
      showRest(lines.at(-1));
    },
    end() {
      rest?.remove();
      if (line) finish(line);
      [line, rest] = ["", null];
    },
  };
}

