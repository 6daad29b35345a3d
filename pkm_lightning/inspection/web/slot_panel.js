// The panel of a slot: the tokens of these texts and of the data that read it, and the facts that it serves.

function slotPanel(record, state, go) {
  const {slot, table} = state;
  const layers = record.readers.filter((reader) => reader.table === table);
  const kind = layers[0].kind === "expert" ? "expert" : "slot";
  const here = readersOf(record, table, slot);
  const known = listedSlot(record, table, slot);
  const title = kind === "slot" ? `Slot ${slot} of ${table}` : `Expert ${slot} of ${table}`;
  const back = state.token === null ? "Back to the overview" : `Back to token ${state.token}`;
  const nodes = [
    element("button", {type: "button", class: "back", click: () => go({slot: null, table: null})}, `← ${back}`),
    element("h2", {tabindex: "-1"}, title),
    element("p", null, sentenceOf(record, layers, kind, here, known)),
  ];
  const masked = record.ablations.filter((a) => a.masked[table] === null || a.masked[table]?.includes(slot));
  for (const ablation of masked) nodes.push(element("p", null, lossSentence(record, ablation)));
  if (known?.facts.length) {
    nodes.push(
      element("h3", null, "Questions with known answers that read it"),
      element("ul", {class: "readers"}, ...known.facts.map((fact) => element("li", null, factNode(fact)))),
    );
  }
  nodes.push(element("h3", null, `Tokens of ${record.texts.length > 1 ? "these texts" : "this text"} that read it`));
  if (here.length) {
    nodes.push(growingList(here, (one) => readerButton(record, state, one, go), {class: "readers here"}));
  } else nodes.push(element("p", {class: "note"}, "None."));
  nodes.push(...dataReaders(record, known));
  return nodes;
}

function sentenceOf(record, layers, kind, here, known) {
  const names = layers.map((reader) => reader.layer).join(", ");
  const what = kind === "slot" ? "A row of the value table" : "A part of the mixture";
  const total = known ? ` Over the data and these texts it was read ${counted(known.reads, "time")}.` : "";
  return `${what} that layer${layers.length > 1 ? "s" : ""} ${names} can read. ` +
    `Here it is read ${counted(here.length, "time")}.${total}`;
}

/** Returns what changes without the slots of an ablation, over the targets of all texts. */
function lossSentence(record, ablation) {
  const mean = (losses) => {
    let sum = 0, count = 0;
    record.texts.forEach(({targets}, i) => {
      const n = targets.reduce((total, target) => total + (target !== NOTHING), 0);
      if (n) [sum, count] = [sum + n * losses[i], count + n];
    });
    return sum / count;
  };
  const [before, after] = [mean(ablation.loss), mean(ablation.loss_without)];
  const loss = Number.isNaN(before) ? "" : ` the loss goes from ${figure(before)} to ${figure(after)} nats per token.`;
  const recall = ablation.recall === null ? "" :
    ` Share of known answers: ${percent(ablation.recall)} with, ${percent(ablation.recall_without)} without.`;
  return `Without ${maskedName(ablation)}${loss ? "," : "."}${loss}${recall}`;
}

function factNode({texts: [prompt, answer], weight, reader}) {
  return [
    element("span", {class: "snippet", dir: "auto"}, ...tokenNodes(prompt), " ",
      element("mark", null, ...tokenNodes(answer.trim()))),
    element("small", null, `weight ${figure(weight)}, ${reader}`),
  ];
}

function readerButton(record, state, one, go) {
  const text = record.texts[one.text];
  const current = one.text === state.text && one.token === state.token;
  return element(
    "button", {
      type: "button", "data-token": one.token, "data-text": one.text, "data-weight": one.weight,
      "data-effect": one.effect, "aria-current": current ? "true" : null,
      click: () => go({text: one.text, token: one.token, slot: null, table: null}),
    },
    element("span", {class: "snippet", dir: "auto"}, ...snippet(record, text, one.token, true)),
    element("small", null, readerFigures(record, one.text, one.token, one.weight, one.reader.name, one.effect)),
  );
}

function readerFigures(record, text, position, weight, reader, effect) {
  const place = typeof text === "string" ? text : record.texts.length > 1 ? `text ${text + 1}` : "";
  const effects = Number.isNaN(effect) || effect === undefined ? "" : `, effect ${signed(effect)}`;
  const figures = `token ${position}, weight ${figure(weight)}${effects}, ${reader}`;
  return place ? [element("bdi", null, place), `, ${figures}`] : [figures];
}

/** Returns the readers of the data; those of the texts of this page are listed above. */
function dataReaders(record, known) {
  if (!known?.readings.length) return [];
  const itemOf = ({texts: [name, position, token, before, after], weight, reader}) => element(
    "div", {"data-weight": weight},
    element("span", {class: "snippet", dir: "auto"}, ...tokenNodes(before),
      element("mark", null, ...tokenNodes(token)), ...tokenNodes(after)),
    element("small", null, readerFigures(record, name, position, weight, reader)),
  );
  const heading = element("h3", null, "Tokens of the data that read it with the largest weights");
  const source = record.data ? [element("p", {class: "note"}, "Data: ", element("bdi", null, record.data))] : [];
  return [heading, ...source, growingList(known.readings, itemOf, {class: "readers data"})];
}
