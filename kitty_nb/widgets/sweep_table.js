// Front end of SweepTable. The text is escaped where it is written.

function render({ model, el }) {
  const draw = () => (el.innerHTML = model.get("table"));
  Object.assign(el, { role: "group", ariaLabel: "Trials", tabIndex: 0 }); // it scrolls
  model.on("change:table", draw);
  draw();
  return () => model.off("change:table", draw);
}

export default { render };
