"use strict";
// The record: one gzip stream with a JSON document and, behind it, the columns of numbers that the document names.

const COLUMN_TYPES = {i4: Int32Array, f4: Float32Array};
const NOTHING = -1; // in a column of tokens: there is none

/** Returns the bytes that `base64` stands for. */
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64.trim());
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** Returns a column: its first bytes lie before all second bytes and so on, since gzip packs them better that way. */
function columnOf(bytes, [type, start, length]) {
  const values = new COLUMN_TYPES[type](length);
  const target = new Uint8Array(values.buffer);
  for (let plane = 0; plane < 4; plane++) {
    const source = start + plane * length;
    for (let i = 0; i < length; i++) target[4 * i + plane] = bytes[source + i];
  }
  return values;
}

/** Returns the record of the page; what has columns gets them as typed arrays. */
async function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(bytes.buffer).getUint32(0, true);
  const record = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
  const columns = bytes.subarray(4 + size);
  const fill = (holder) => {
    for (const [name, place] of Object.entries(holder.columns)) holder[name] = columnOf(columns, place);
  };
  for (const text of record.texts) {
    fill(text);
    Object.values(text.reads).forEach(fill);
  }
  for (const ablation of record.ablations) ablation.texts.forEach(fill);
  Object.values(record.slots).forEach(fill);
  return record;
}

/** Returns the text of the token at `position` of `text`. */
function tokenText(record, text, position) {
  return record.vocabulary[text.tokens[position]][1];
}

/** Returns the text of the token whose probability is `p` at `position`: the next one, or the likeliest at the end. */
function scoredText(record, text, position) {
  return record.vocabulary[text.scored[position]][1];
}

/** Returns whether a token follows that the prediction at `position` is compared with. */
function isFollowed(text, position) {
  return text.targets[position] !== NOTHING;
}

/** Returns the likeliest next tokens at `position` of a text or an ablation: [index in the vocabulary, probability]. */
function topAt(holder, name, position, tokens) {
  const width = holder[name].length / tokens;
  const top = [];
  for (let i = position * width; i < (position + 1) * width; i++) {
    if (holder[name][i] !== NOTHING) top.push([holder[name][i], holder[`${name}_p`][i]]);
  }
  return top;
}

/** Returns the number of reads per token of the reader `name` in `text`. */
function readsPerToken(text, name) {
  return text.reads[name].slots.length / text.tokens.length;
}

/** Returns the reads of `position` by `reader`: slot, head, weight and effect of each. */
function readsAt(text, reader, position) {
  const {slots, weights, effects} = text.reads[reader.name];
  const width = readsPerToken(text, reader.name);
  const reads = [];
  for (let c = 0; c < width; c++) {
    const i = position * width + c;
    if (slots[i] < 0) continue;
    reads.push({
      slot: slots[i], head: Math.floor((c * reader.heads) / width) + 1, weight: weights[i],
      effect: effects ? effects[i] : NaN,
    });
  }
  return reads;
}

/** Returns every read of `slot` of `table` in the texts of the record, the largest weight first. */
function readersOf(record, table, slot) {
  const readers = [];
  record.texts.forEach((text, index) => {
    for (const reader of record.readers) {
      if (reader.table !== table || !text.reads[reader.name]) continue;
      const {slots, weights, effects} = text.reads[reader.name];
      const width = readsPerToken(text, reader.name);
      for (let i = slots.indexOf(slot); i >= 0; i = slots.indexOf(slot, i + 1)) {
        const effect = effects ? effects[i] : NaN;
        readers.push({text: index, token: Math.floor(i / width), reader, weight: weights[i], effect});
      }
    }
  });
  return readers.sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

/** Returns who reads a slot in the data, {reads, readings, facts}, or null where the record does not list the slot. */
function listedSlot(record, table, slot) {
  const listed = record.slots[table];
  const i = listed ? listed.ids.indexOf(slot) : -1;
  if (i < 0) return null;
  const rows = (name, texts) => {
    const entries = [];
    for (let row = i ? listed[`${name}_end`][i - 1] : 0; row < listed[`${name}_end`][i]; row++) {
      const reader = record.readers[listed[`${name}_reader`][row]].name;
      entries.push({texts: texts[listed[`${name}_text`][row]], weight: listed[`${name}_weight`][row], reader});
    }
    return entries;
  };
  const [readings, facts] = [rows("readings", record.excerpts), rows("facts", record.questions)];
  return {reads: listed.reads[i], readings, facts};
}

/** Returns the sum of the effects of all reads of each token, of the reader `name` or (null) of all. */
function effectSums(record, text, name) {
  const sums = new Float64Array(text.tokens.length);
  for (const reader of record.readers) {
    const reads = text.reads[reader.name];
    if (!reads?.effects || (name !== null && reader.name !== name)) continue;
    const width = readsPerToken(text, reader.name);
    for (let i = 0; i < reads.effects.length; i++) {
      if (reads.slots[i] >= 0) sums[Math.floor(i / width)] += reads.effects[i];
    }
  }
  return sums;
}

/** Returns the slots of `table` that the texts read most: [slot, number of reads], most read first. */
function mostRead(record, table, count) {
  const names = record.readers.filter((reader) => reader.table === table).map(({name}) => name);
  const columns = record.texts.flatMap(({reads}) => names.map((name) => reads[name]?.slots ?? []));
  const all = new Int32Array(columns.reduce((n, column) => n + column.length, 0));
  let end = 0;
  for (const column of columns) {
    all.set(column, end);
    end += column.length;
  }
  all.sort();
  const runs = [];
  for (let i = 0, start = 0; i < all.length; i++) {
    if (i + 1 < all.length && all[i + 1] === all[i]) continue;
    if (all[i] >= 0) runs.push([all[i], i + 1 - start]);
    start = i + 1;
  }
  return runs.sort((a, b) => b[1] - a[1]).slice(0, count);
}
