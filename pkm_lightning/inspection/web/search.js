// The search field: a number leads to a slot or a token, other text to the tokens and facts that contain it.

const HITS = 30;

/** Returns what `query` leads to: {nodes, change}, at most 30. */
function findAll(record, state, query) {
  const hits = [];
  const number = /^\s*(slot|expert|token)?\s*#?\s*(\d+)\s*$/i.exec(query);
  if (number) {
    const n = Number(number[2]);
    const tables = new Map(record.readers.map((reader) => [reader.table, reader]));
    if (!/token/i.test(number[1] ?? "")) {
      for (const [table, reader] of tables) {
        if (n < reader.slots) {
          const reads = readersOf(record, table, n).length;
          const kind = reader.kind === "expert" ? "Expert" : "Slot";
          hits.push({nodes: [`${kind} ${n} of ${table}, ${counted(reads, "read")} here`], change: {slot: n, table}});
        }
      }
    }
    if (!number[1] || /token/i.test(number[1])) {
      const text = record.texts[state.text];
      if (n < text.tokens.length) {
        hits.push({nodes: [`Token ${n} `, quoted(tokenText(record, text, n))], change: tokenChange(state.text, n)});
      }
    }
  }
  return [...hits, ...inTexts(record, state, query), ...inFacts(record, query)].slice(0, HITS);
}

const tokenChange = (text, token) => ({text, token, slot: null, table: null});

/** Returns the tokens at which `query` begins, of the text that is shown and then of the others. */
function inTexts(record, state, query) {
  const wanted = query.toLowerCase();
  if (!wanted.trim()) return [];
  const order = new Set([state.text, ...record.texts.keys()]);
  const hits = [];
  for (const index of order) {
    const text = record.texts[index];
    text.lower ??= lowered(record, text);
    const {whole, starts} = text.lower;
    for (let at = whole.indexOf(wanted); at >= 0 && hits.length < HITS; at = whole.indexOf(wanted, at + 1)) {
      let low = 0, high = starts.length - 1; // the last token that starts at or before `at`
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (starts[middle] <= at) low = middle;
        else high = middle - 1;
      }
      const nodes = [`Token ${low}: `, ...snippet(record, text, low, true)];
      hits.push({nodes, change: tokenChange(index, low)});
    }
  }
  return hits;
}

function lowered(record, text) {
  const starts = new Uint32Array(text.tokens.length);
  const parts = [];
  let length = 0;
  for (let t = 0; t < starts.length; t++) {
    const part = tokenText(record, text, t).toLowerCase();
    starts[t] = length;
    length += part.length;
    parts.push(part);
  }
  return {whole: parts.join(""), starts};
}

/** Returns the slots that are read where the answer to a question with `query` in it is predicted. */
function inFacts(record, query) {
  const wanted = query.trim().toLowerCase();
  if (wanted.length < 2) return [];
  const matches = new Set();
  record.questions.forEach(([prompt, answer], i) => {
    if (`${prompt} ${answer}`.toLowerCase().includes(wanted)) matches.add(i);
  });
  const hits = [];
  for (const [table, listed] of Object.entries(record.slots)) {
    for (let row = 0, i = 0; row < listed.facts_text.length && hits.length < HITS; row++) {
      while (row >= listed.facts_end[i]) i++;
      if (!matches.has(listed.facts_text[row])) continue;
      const [prompt, answer] = record.questions[listed.facts_text[row]];
      const slot = listed.ids[i];
      const nodes = [`Slot ${slot} of ${table}: `, ...tokenNodes(prompt), " ", ...tokenNodes(answer)];
      hits.push({nodes, change: {slot, table}});
    }
  }
  return hits;
}

/** Connects the field and the list of its hits with `go`. */
function connectSearch(record, field, list, getState, go) {
  let hits = [];
  let active = -1;
  const close = () => {
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
    active = -1;
  };
  const choose = (i) => {
    close();
    go(hits[i].change);
  };
  const activate = (i) => {
    list.children[active]?.removeAttribute("aria-selected");
    active = (i + hits.length) % hits.length;
    list.children[active].setAttribute("aria-selected", "true");
    list.children[active].scrollIntoView({block: "nearest"});
    field.setAttribute("aria-activedescendant", list.children[active].id);
  };
  const show = () => {
    hits = findAll(record, getState(), field.value);
    list.replaceChildren(...hits.map(({nodes}, i) =>
      element("li", {role: "option", id: `hit-${i}`, dir: "auto", mousedown: (event) => event.preventDefault(),
        click: () => choose(i)}, ...nodes)));
    active = -1;
    list.hidden = !field.value.trim();
    if (!hits.length) list.append(element("li", {class: "note"}, "Nothing here has this text or number."));
    field.setAttribute("aria-expanded", String(!list.hidden));
  };
  field.addEventListener("input", show);
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      if (list.hidden) field.blur();
      close();
    } else if (!hits.length || list.hidden) return;
    else if (event.key === "ArrowDown") activate(active + 1);
    else if (event.key === "ArrowUp") activate(active < 0 ? -1 : active - 1);
    else if (event.key === "Enter") choose(Math.max(0, active));
    else return;
    event.preventDefault();
  });
}
