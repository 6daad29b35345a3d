// The panel before anything is chosen: what a memory layer is, and places of this text worth a click.

const SHOWN = 6;

function overviewPanel(record, state, go) {
  const text = record.texts[state.text];
  const tables = [...new Set(record.readers.map((reader) => reader.table))];
  const help = colourings(record).find(({id}) => id === "help").values(text);
  const nodes = [
    element("h2", {tabindex: "-1"}, "Click a token, then a slot"),
    element("p", null,
      "A memory layer has a large table of vectors; a row of it is called a slot. At every token the layer compares ",
      "a query with keys, reads the few slots that fit best, and adds their weighted sum to what the model computes. ",
      "So each prediction can be traced to the slots behind it, and each slot to the tokens that use it."),
    element("p", null,
      "A token shows the prediction that the model made right after reading it: what is coloured and explained at ",
      "“France” is what the model expects to come after “France”."),
  ];
  nodes.push(...places("The tables helped most to predict", help, (a, b) => b - a, (x) => x > 0));
  nodes.push(...places("The tables harmed most", help, (a, b) => a - b, (x) => x < 0));
  for (const table of tables) {
    const slots = mostRead(record, text, table, SHOWN);
    if (!slots.length) continue;
    nodes.push(element("h3", null, `Most read of ${table}`), element("p", {class: "chips"}, ...slots.map(([slot, n]) =>
      element("button", {type: "button", class: "slot", "data-slot": slot, click: () => go({slot, table})},
        String(slot), element("small", null, ` ${counted(n, "read")}`)))));
  }
  if (record.ablations.length) {
    nodes.push(element("h3", null, "What the model would be without"),
      ...record.ablations.map((ablation) => element("p", null, lossSentence(record, ablation, state.text))));
  }
  return nodes;

  function places(title, values, order, wanted) {
    const best = Array.from(values.keys()).filter((t) => wanted(values[t]))
      .sort((a, b) => order(values[a], values[b])).slice(0, SHOWN);
    return best.length ? [element("h3", null, title), element("ul", {class: "readers"}, ...best.map(place))] : [];
  }

  function place(t) {
    const figures = `${percent(text.p_without[t])} without, ${percent(text.p[t])} with the tables`;
    return element("li", null, element("button", {type: "button", "data-token": t, click: () => go({token: t})},
      element("span", {class: "snippet", dir: "auto"}, ...snippet(record, text, t, true)),
      element("small", null, figures)));
  }
}
