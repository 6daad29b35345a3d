// What the colour of a token stands for, and the scale from its figure to one of nine levels.

const LEVELS = 8;
const LOUD = 0.98; // of the tokens lie within the scale; the others have its strongest colour

/** Returns the kinds of colouring that the record has figures for. */
function colourings(record) {
  const kinds = [
    {
      id: "surprise", name: "Surprise at the next token", unit: "nats", diverging: false,
      low: "expected", high: "surprising",
      note: "Minus the natural logarithm of the probability that the model gave to the token that really follows: " +
        "0 is certain, 2.3 one in ten, 6.9 one in a thousand.",
      values: (text) => text.p.map((p, t) => (isFollowed(text, t) ? 0 - Math.log(p) : NaN)),
    },
    {
      id: "help", name: "Help of the tables", unit: "nats", diverging: true,
      low: "tables made it less likely", high: "tables made it more likely",
      note: "Logarithm of the probability of the next token, minus the same with every table read set to zero. " +
        "+2.3 means ten times as likely with the tables.",
      values: (text) => text.p.map((p, t) => (isFollowed(text, t) ? Math.log(p) - Math.log(text.p_without[t]) : NaN)),
    },
  ];
  if (record.effects === "none") return kinds;
  const effect = {
    unit: "logits", diverging: true, low: "reads spoke against it", high: "reads spoke for it",
    note: "Sum over the reads of the token: the logit of the next token with a read, minus the logit without it.",
  };
  const sums = (name) => (text) => effectSums(record, text, name);
  kinds.push({...effect, id: "effect", name: "Effect of all reads", values: sums(null)});
  if (record.readers.length > 1) {
    for (const reader of record.readers) {
      kinds.push({...effect, id: `effect:${reader.name}`, name: `Effect of ${reader.name}`, values: sums(reader.name)});
    }
  }
  return kinds;
}

/** Returns the size of a figure that has the strongest colour. */
function strongest(values) {
  const sizes = Float64Array.from(values, Math.abs).filter(Number.isFinite).sort();
  return sizes[Math.floor(LOUD * (sizes.length - 1))] || 1;
}

/** Returns the level, 0 to 8, of a figure. */
function levelOf(value, most) {
  return Number.isNaN(value) ? 0 : Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / most - 0.5));
}

/** Returns the class of a token whose figure is `value`. */
function colourClass(kind, value, most) {
  return `level${levelOf(value, most)} ${kind.diverging ? (value < 0 ? "minus" : "plus") : "amount"}`;
}

/** Returns the legend of a colouring. */
function legendOf(kind, most) {
  const steps = kind.diverging ? [-8, -6, -4, -2, 0, 2, 4, 6, 8] : [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const swatches = steps.map((s) => element("i", {class: colourClass(kind, (s / LEVELS) * most, most)}));
  const low = kind.diverging ? `≤ ${figure(-most)}` : "0";
  return [
    element("span", null, `${low} ${kind.low}`),
    element("span", {class: "swatches", "aria-hidden": "true"}, swatches),
    element("span", null, `≥ ${kind.diverging ? signed(most) : figure(most)} ${kind.unit}: ${kind.high}`),
    element("p", {class: "note"}, kind.note),
  ];
}
