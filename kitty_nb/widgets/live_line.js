// Front end of LiveLine: words, and a chart of tokens per second and memory.

const [SPAN, WIDTH, HEIGHT] = [600, 160, 22]; // seconds; units of the picture

function receive(store, { words, shown, points, anew }) {
  const all = anew ? points : store.points.concat(points);
  const last = all.length ? all[all.length - 1][0] : 0;
  Object.assign(store, { words, shown, points: all.filter(([at]) => at > last - SPAN) });
  store.views.forEach((view) => view.draw());
}

function curve(points, column, highest) {
  const last = points[points.length - 1][0];
  return points
    .map((point) => {
      const x = WIDTH * (1 - (last - point[0]) / SPAN);
      const y = (HEIGHT - 2) * (1 - point[column] / (highest || 1)) + 1;
      return `${x.toFixed(1)},${y.toFixed(1)}`;
    })
    .join(" ");
}

function render(el, store) {
  const words = element("span", "kitty-live-words");
  const box = element("span", "kitty-live-chart");
  box.innerHTML = `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" preserveAspectRatio="none">
    <title></title><polyline class="kitty-live-memory"/><polyline class="kitty-live-pace"/></svg>`;
  const [svg] = box.children;
  const [title, memory, pace] = svg.children;
  el.append(words, box);
  const view = {
    draw() {
      const points = store.points;
      el.hidden = !store.shown;
      box.hidden = points.length < 2;
      say(words, store.words);
      if (box.hidden) return;
      const [fastest, most] = [1, 2].map((column) => Math.max(...points.map((at) => at[column])));
      pace.setAttribute("points", curve(points, 1, fastest));
      memory.setAttribute("points", curve(points, 2, most * 1.2));
      const held = most ? `; memory now ${points[points.length - 1][2]} MiB, at most ${most}` : "";
      say(title, `Last ten minutes: at most ${fastest.toFixed(1)} tokens a second${held}`);
      svg.ariaLabel = title.textContent;
    },
  };
  view.draw();
  store.ask("points");
  return view;
}

export default stored(() => ({ words: "", shown: false, points: [] }), receive, render);
