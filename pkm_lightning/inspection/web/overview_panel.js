// The panel before anything is chosen: what a memory layer is, and places of this text worth a click.

const SHOWN = 6;

function overviewPanel(record, state, go) {
  const tables = [...new Set(record.readers.map((reader) => reader.table))];
  // By probability, not by its logarithm: from one in a billion to one in a million is no help that anybody would see.
  const help = record.texts.flatMap((text, number) => Array.from(text.p, (p, token) => (
    {text: number, token, value: isFollowed(text, token) ? p - text.p_without[token] : 0})));
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
    const slots = mostRead(record, table, SHOWN);
    if (!slots.length) continue;
    nodes.push(element("h3", null, `Most read of ${table}`), element("p", {class: "chips"}, ...slots.map(([slot, n]) =>
      element("button", {type: "button", class: "slot", "data-slot": slot, click: () => go({slot, table})},
        String(slot), element("small", null, ` ${counted(n, "read")}`)))));
  }
  if (record.ablations.length) {
    nodes.push(element("h3", null, "What the model would be without"),
      ...record.ablations.map((ablation) => element("p", null, lossSentence(record, ablation))));
  }
  return nodes;

  function places(title, all, order, wanted) {
    const best = all.filter(({value}) => wanted(value)).sort((a, b) => order(a.value, b.value)).slice(0, SHOWN);
    return best.length ? [element("h3", null, title), element("ul", {class: "readers"}, ...best.map(item))] : [];
  }

  function item({text: number, token}) {
    const text = record.texts[number];
    const figures = `${percent(text.p_without[token])} without, ${percent(text.p[token])} with the tables`;
    const place = {"data-text": number, "data-token": token};
    return element("li", null, element("button", {type: "button", ...place, click: () => go({text: number, token})},
      element("span", {class: "snippet", dir: "auto"}, ...snippet(record, text, token, true)),
      element("small", null, figures)));
  }
}
