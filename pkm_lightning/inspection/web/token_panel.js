// The panel of a token: what the model expects next, with and without the tables, and which slots it has read.

const CONTEXT = 14; // tokens before the one that is shown

/** Returns the tokens before `position`, that token marked, and (with `next`) the one that follows. */
function snippet(record, text, position, next = false) {
  const nodes = [];
  const start = Math.max(0, position - CONTEXT);
  if (start > 0) nodes.push("… ");
  for (let t = start; t < position; t++) nodes.push(...tokenNodes(tokenText(record, text, t)));
  const marked = tokenText(record, text, position);
  const blank = /^ +(?=\S)/.exec(marked)?.[0] ?? ""; // a frame must not begin at the end of a line
  nodes.push(blank, element("mark", null, ...tokenNodes(marked.slice(blank.length))));
  if (next && isFollowed(text, position)) {
    nodes.push(element("span", {class: "predicted"}, ...tokenNodes(scoredText(record, text, position))));
  }
  return nodes;
}

/** Returns a sentence that compares the probability of the next token with the one without the tables. */
function verdict(p, without) {
  const ratio = p / without;
  if (!(ratio > 0) || !Number.isFinite(ratio)) return "";
  if (ratio > 1.1) return `The tables made it ${figure(ratio)} times as likely.`;
  if (ratio < 1 / 1.1) return `The tables made it ${figure(1 / ratio)} times less likely.`;
  return "The tables hardly changed it.";
}

function tokenPanel(record, state, go) {
  const text = record.texts[state.text];
  const t = state.token;
  return [
    element("h2", {tabindex: "-1"}, `Token ${t} of ${text.tokens.length}: `, quoted(tokenText(record, text, t))),
    element("p", {class: "snippet", dir: "auto"}, ...snippet(record, text, t, true)),
    ...prediction(record, state, text, t),
    ...record.readers.filter(({name}) => text.reads[name]).map((reader) => reads(state, text, reader, go)),
  ];
}

function prediction(record, state, text, t) {
  const name = quoted(scoredText(record, text, t));
  const number = (p) => element("strong", {"data-p": p}, percent(p));
  const sentence = element(
    "p", null, isFollowed(text, t) ? "The token that follows, " : "Nothing follows. The likeliest token, ", name,
    ", gets a probability of ", number(text.p[t]), "; with every table read set to zero, of ",
    number(text.p_without[t]), ". ", verdict(text.p[t], text.p_without[t]),
  );
  const columns = [["with tables", topAt(text, "top", t, text.tokens.length)]];
  const without = topAt(text, "top_without", t, text.tokens.length);
  if (without.length) columns.push(["without tables", without]);
  for (const ablation of record.ablations) {
    const one = ablation.texts[state.text];
    columns.push([`without ${maskedName(ablation)}`, topAt(one, "top_without", t, text.tokens.length)]);
    sentence.append(` Without ${maskedName(ablation)}: ${percent(one.p_without[t])}.`);
  }
  const expected = columns.map(([title, top]) => element("div", null, element("h4", null, title),
    element("ol", null, ...top.map(([token, p]) => guess(record, text, t, token, p)))));
  const heading = element("h3", null, "What the model expects next");
  return [sentence, heading, element("div", {class: "expected"}, ...expected)];
}

function guess(record, text, t, token, p) {
  const right = isFollowed(text, t) && record.vocabulary[token][0] === record.vocabulary[text.scored[t]][0];
  const follows = right ? [element("small", null, " follows")] : [];
  return element(
    "li", {class: right ? "right" : null, "data-p": p},
    element("span", {class: "name"}, quoted(record.vocabulary[token][1]), ...follows),
    element("span", {class: "number"}, percent(p)), bar(p, "amount"),
  );
}

/** Returns the name of the slots that an ablation masks. */
function maskedName(ablation) {
  return Object.entries(ablation.masked)
    .map(([table, slots]) => {
      if (slots === null) return `all of ${table}`;
      if (slots.length > 4) return `${slots.length} slots of ${table}`;
      return `slot${slots.length > 1 ? "s" : ""} ${slots.join(", ")} of ${table}`;
    })
    .join(" and ");
}

/** Returns the section of one reader: a row per read, sorted by weight or effect. */
function reads(state, text, reader, go) {
  const all = readsAt(text, reader, state.token);
  const kind = reader.kind === "expert" ? "expert" : "slot";
  const most = {
    weight: Math.max(...all.map((read) => Math.abs(read.weight))),
    effect: Math.max(...all.map((read) => Math.abs(read.effect) || 0)),
  };
  const sum = all.reduce((total, read) => total + read.effect, 0);
  const body = element("tbody");
  const columns = text.reads[reader.name].effects ? ["weight", "effect"] : ["weight"];
  const heads = columns.map((name) =>
    element("th", {scope: "col"}, element("button", {type: "button", click: () => sort(name)}, name)));
  function sort(name) {
    columns.forEach((column, i) => {
      if (column === name) heads[i].setAttribute("aria-sort", "descending");
      else heads[i].removeAttribute("aria-sort");
    });
    const sorted = all.toSorted((a, b) => Math.abs(b[name]) - Math.abs(a[name]));
    body.replaceChildren(...sorted.map((read) => readRow(reader, read, most, columns, kind, state, go)));
  }
  sort(columns.at(-1));
  const total = columns.length > 1 ? `; their effects sum to ${signed(sum)} logits` : "";
  const how = reader.by_tokens ? "Which slots are read depends on the last tokens alone. " : "";
  return element(
    "section", {"data-reader": reader.name},
    element("h3", null, `Layer ${reader.layer}: ${counted(all.length, "read")} `, element("small", null, reader.name)),
    element("p", {class: "note"}, `${how}${counted(reader.heads, "head")}, ${counted(reader.slots, kind)}${total}.`),
    all.length ? element("table", {class: "reads"},
      element("thead", null, element("tr", null,
        element("th", {scope: "col"}, kind), element("th", {scope: "col"}, "head"), ...heads)), body) : "",
  );
}

function readRow(reader, read, most, columns, kind, state, go) {
  const link = element(
    "button", {
      type: "button", class: "slot", "data-slot": read.slot, "aria-label": `${kind} ${read.slot} of ${reader.table}`,
      click: () => go({slot: read.slot, table: reader.table}),
    }, String(read.slot),
  );
  if (state.slot === read.slot && state.table === reader.table) link.setAttribute("aria-current", "true");
  const weight = most.weight ? read.weight / most.weight : 0;
  const cells = [element("td", {"data-weight": read.weight}, figure(read.weight),
    read.weight < 0 ? bar(-weight, "amount negative") : bar(weight, "amount"))];
  if (columns.length > 1) {
    cells.push(element("td", {"data-effect": read.effect}, signed(read.effect),
      signedBar(most.effect ? read.effect / most.effect : 0)));
  }
  return element("tr", null, element("td", null, link), element("td", null, String(read.head)), ...cells);
}
