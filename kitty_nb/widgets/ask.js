// Front end of Ask: draws the chat as it streams, and takes questions and pictures.

const PICTURE_SIZE = 6_000_000; // for one question's data URLs; Jupyter limits a message to 10 MiB
const THUMBNAIL = 128; // pixels
const ASKING = "Asking…"; // until the kernel has received it
const ASKED_WITHIN = 10_000; // milliseconds, in which the kernel receives it
const LOST = "The kernel has not answered. Press Ask to try again.";
const BUSY = "The model is still answering. Wait, or press Stop answer.";
const BLIND = "This model takes no pictures: it runs without a projector (mmproj).";

function receive(store, message) {
  if (message.kind === "facts") {
    store.facts = message;
    store.views.forEach((view) => view.facts());
  } else if (message.kind === "turns") {
    if (message.chat !== store.chat) {
      [store.chat, store.turns] = [message.chat, []];
      store.views.forEach((view) => view.clear());
    }
    message.turns.forEach((news) => merge(store, news));
    store.views.forEach((view) => view.facts());
  }
}

// Adds what is new in a turn. Known parts arrive again if another page asked for a replay.
function merge(store, news) {
  const known = store.turns[news.turn];
  if (known ? news.first > known.next : news.question === undefined) {
    store.send({ kind: "replay" }); // some parts were missed
  } else if (!known) {
    store.turns[news.turn] = news;
    store.views.forEach((view) => view.begin(news));
  } else if (news.next >= known.next) {
    const { text, thinking } = known;
    if (news.first < known.next) {
      news.text = news.text.slice(text.length);
      news.thinking = news.thinking.slice(thinking.length);
    }
    Object.assign(known, news, { text: text + news.text, thinking: thinking + news.thinking });
    store.views.forEach((view) => view.goOn(known, news));
  }
}

function readUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

// The picture for the model, in a format that llama.cpp reads, and a small one for the chat.
async function readPicture(file) {
  const bitmap = await createImageBitmap(file);
  const drawn = (scale, type) => {
    const [width, height] = [bitmap.width, bitmap.height].map((n) => Math.ceil(n * scale));
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    return canvas.toDataURL(type);
  };
  const plain = ["image/png", "image/jpeg"].includes(file.type);
  return {
    url: plain ? await readUrl(file) : drawn(1, "image/png"),
    thumbnail: drawn(Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height)), "image/png"),
  };
}

function smallButton(words, title, onClick) {
  const made = element("button", "kitty-ask-button", { type: "button", textContent: words, title });
  made.addEventListener("click", onClick);
  return made;
}

function thumbnails(urls) {
  const row = element("div", "kitty-ask-pictures", { hidden: !urls.length });
  row.append(...urls.map((src) => element("img", "", { src, alt: "Picture of the question" })));
  return row;
}

function drawTurn(turn) {
  const box = element("div", "kitty-ask-turn");
  const question = element("div", "kitty-ask-question", { role: "group", ariaLabel: "Question" });
  question.append(thumbnails(turn.thumbnails), turn.question);
  const thinking = element("details", "kitty-ask-thinking");
  const [summary, thoughts] = [element("summary", ""), element("div", "", { tabIndex: 0 })];
  thinking.append(summary, thoughts);
  const answer = element("div", "kitty-ask-answer", { role: "group", ariaLabel: "Answer" });
  const problem = element("div", "kitty-ask-problem");
  const status = element("span", "");
  const copyIt = copyButton("kitty-ask-button", "Copy", "Copy the answer", () => turn.text);
  const foot = element("div", "kitty-ask-foot");
  foot.append(status, copyIt);
  box.append(question, thinking, answer, problem, foot);
  const writer = answerWriter(answer);

  const update = (news) => {
    thinking.hidden = !news.thought;
    say(summary, news.thought);
    if (news.thinking) thoughts.append(news.thinking);
    if (news.text) writer.append(news.text);
    if (!news.busy) writer.end();
    say(status, news.status);
    say(problem, news.problem);
    problem.hidden = !news.problem;
    copyIt.hidden = news.busy || !turn.text;
    foot.hidden = !news.status && copyIt.hidden;
  };
  update(turn);
  return { box, update };
}

function drawBox(el, store) {
  const area = element("textarea", "", { rows: 1, ariaLabel: "Question" });
  const main = element("button", "kitty-ask-main", { type: "button" });
  const row = element("div", "kitty-ask-row");
  row.append(area, main);
  const pictures = element("div", "kitty-ask-pictures");
  const hint = element("div", "kitty-muted", { role: "status" });
  let [chosen, note] = [[], ""];

  const busy = () => Boolean(store.turns.at(-1)?.busy);
  const nextTurn = () => `${store.chat} ${store.turns.length}`;
  const asking = () => store.asking === nextTurn(); // the kernel has not received it
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 2}px`;
  };
  const tell = (words) => {
    note = words;
    say(hint, store.facts.hint || note);
  };
  const drawPictures = () => {
    pictures.hidden = !chosen.length;
    pictures.replaceChildren(
      ...chosen.map((one) => {
        const box = element("span", "");
        const remove = smallButton("✕", "Remove the picture", () => {
          chosen = chosen.filter((other) => other !== one);
          drawPictures();
          area.focus();
        });
        box.append(element("img", "", { src: one.thumbnail, alt: one.name }), remove);
        return box;
      }),
    );
  };
  const add = async (files) => {
    tell("");
    if (!store.facts.sees) {
      tell(BLIND);
      return;
    }
    for (const file of files) {
      const read = await readPicture(file).catch(() => null);
      const size = [read, ...chosen].reduce((sum, one) => sum + (one?.url.length ?? 0), 0);
      if (!read) tell(`The browser can't read ${file.name} as a picture.`);
      else if (size > PICTURE_SIZE) tell("The pictures of a question are limited to 4.5 MB.");
      else chosen.push({ ...read, name: file.name });
    }
    drawPictures();
  };
  const fill = (text, files) => {
    [area.value, chosen] = [text, files];
    fit();
    drawPictures();
  };
  const submit = () => {
    if (!(area.value.trim() || chosen.length)) return;
    if (busy() || asking()) {
      tell(busy() ? BUSY : ASKING);
      return;
    }
    const [turn, text, sent] = [nextTurn(), area.value, chosen];
    const pictures = sent.map(({ url, thumbnail }) => ({ url, thumbnail }));
    store.send({ kind: "ask", text, pictures });
    tell(ASKING);
    [store.asking, store.last] = [turn, text];
    fill("", []);
    setTimeout(() => {
      if (turn !== nextTurn()) return;
      store.asking = "";
      if (!area.value && !chosen.length) fill(text, sent);
      tell(LOST);
    }, ASKED_WITHIN);
  };
  area.addEventListener("input", fit);
  area.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" && !area.value && store.last) {
      event.preventDefault();
      area.value = store.last;
      fit();
    }
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation(); // Ctrl+Enter and Alt+Enter, too, would run the panel's cell again
    submit();
  });
  main.addEventListener("click", () => {
    if (busy()) store.send({ kind: "stop" });
    else submit();
    area.focus();
  });
  const file = element("input", "", { type: "file", accept: "image/*", multiple: true });
  file.hidden = true;
  file.addEventListener("change", async () => {
    await add([...file.files]);
    file.value = "";
    area.focus();
  });
  const take = (event, files) => {
    if (!files?.length) return;
    event.preventDefault();
    event.stopPropagation();
    add([...files]);
  };
  area.addEventListener("paste", (event) => {
    const words = event.clipboardData.getData("text/plain");
    const files = [...event.clipboardData.files];
    // Office adds a picture of the text that it copies; macOS adds the names of copied files.
    if (!words.trim() || files.every((one) => words.includes(one.name))) take(event, files);
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    el.addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      event.stopPropagation();
      row.classList.toggle("kitty-ask-dropping", kind === "dragover");
      if (kind === "drop") take(event, event.dataTransfer.files);
    });
  }
  drawPictures();
  return {
    parts: [pictures, row, hint, file],
    choose: () => file.click(),
    focus: () => area.focus(),
    update() {
      row.hidden = Boolean(store.facts.hint);
      area.placeholder = store.facts.prompt;
      say(main, busy() ? "Stop answer" : "Ask");
      main.classList.toggle("kitty-ask-stop", busy());
      main.title = busy() ? "Stop the answer, and the server's work on it" : "Ask (Enter)";
      const over = { [ASKING]: !asking(), [BUSY]: !busy(), [LOST]: busy() };
      over[BLIND] = store.facts.sees;
      tell(over[note] ? "" : note);
    },
  };
}

function render(el, store) {
  const list = element("div", "kitty-ask-list", { tabIndex: 0, role: "log", ariaLabel: "Chat" });
  const said = element("span", "kitty-ask-said", { role: "status" });
  const box = drawBox(el, store);
  const fresh = smallButton("New chat", "Forget this chat and begin another one", () => {
    store.send({ kind: "new" });
    box.focus();
  });
  const tip = "A cell with this chat, to paste";
  const code = copyButton("kitty-ask-button", "Copy as code", tip, () =>
    asked(store.model, { kind: "code" }),
  );
  const picture = smallButton("Add picture", "Or paste or drop one", () => box.choose());
  const bar = element("div", "kitty-ask-foot");
  bar.append(picture, fresh, code);
  el.append(list, ...box.parts, bar, said);
  keepKeys(el);

  const drawn = [];
  const followed = (change) => {
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 24;
    change();
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  const view = {
    facts() {
      const turns = store.turns.length;
      const { ready, hint, sees } = store.facts;
      el.hidden = !ready && !turns;
      [list.hidden, fresh.hidden, code.hidden] = [!turns, !turns, !turns];
      picture.hidden = !sees || Boolean(hint);
      bar.hidden = !turns && picture.hidden;
      box.update();
      const busy = Boolean(store.turns.at(-1)?.busy);
      if (list.ariaBusy === String(busy)) return;
      // While it is busy, screen readers do not read each word.
      if (turns || list.ariaBusy)
        say(said, busy ? "The model is answering." : "The answer has ended.");
      list.ariaBusy = String(busy);
    },
    begin(turn) {
      const one = drawTurn(turn);
      drawn[turn.turn] = one;
      list.append(one.box);
      list.hidden = false;
      list.scrollTop = list.scrollHeight;
    },
    goOn: (turn, news) => followed(() => drawn[turn.turn].update(news)),
    clear() {
      drawn.length = 0;
      list.replaceChildren();
    },
  };
  store.turns.forEach(view.begin);
  view.facts();
  store.ask("chat");
  return view;
}

const begin = () => ({ facts: {}, chat: 0, turns: [], asking: "", last: "" });

export default stored(begin, receive, render);
