// The page's side of SweepTable. The text is escaped where it is written.

function render({ model, el }) {
  const draw = () => (el.innerHTML = model.get("table"));
  model.on("change:table", draw);
  draw();
  return () => model.off("change:table", draw);
}

export default { render };
