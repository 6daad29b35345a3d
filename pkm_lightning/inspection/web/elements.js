// Elements and figures as they are shown. Texts of the record become text nodes, never markup.

/** Returns an element; `attributes` that are null are left out, and functions listen to the event that they name. */
function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}

const ODD = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/u;
const JOINS = new Set(["\u200c", "\u200d"]); // within a word or an emoji they belong to it
const MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"};

/** Returns `text` in pieces; what has no form of its own or would turn or break a line is named, and is `odd`. */
function pieces(text) {
  if (text === "") return [{odd: true, text: "∅"}];
  const parts = [];
  let first = true;
  for (const character of text) {
    const joined = JOINS.has(character) && !first;
    let piece = character;
    const odd = !joined && ODD.test(character);
    if (odd) {
      const code = character.codePointAt(0);
      const named = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
      piece = MARKS[character] ?? (code < 32 ? String.fromCodePoint(0x2400 + code) : named);
    } else if (first && /\p{M}/u.test(character)) piece = `◌${character}`;
    const last = parts.at(-1);
    if (last && last.odd === odd) last.text += piece;
    else parts.push({odd, text: piece});
    first = false;
  }
  return parts;
}

/** Returns the nodes that show the text of a token within a sentence or a table. */
function tokenNodes(text) {
  return pieces(text).map((part) => (part.odd ? element("span", {class: "odd"}, part.text) : part.text));
}

/** Returns a token in quotation marks that keeps its own direction of writing. */
function quoted(text) {
  return element("bdi", {class: "quoted"}, "“", ...tokenNodes(text), "”");
}

/** Returns a probability as a percentage of three digits; what is too small for that, as a power of ten. */
function percent(p) {
  if (!Number.isFinite(p)) return "–";
  if (p > 0 && p < 1e-4) return p.toExponential(1).replace("-", "−");
  return `${(100 * p).toPrecision(3).replace(/\.?0+$/, "") || 0}%`.replace(/^100%$/, p < 1 ? "≈ 100%" : "100%");
}

/** Returns a figure of three digits. */
function figure(x) {
  if (Number.isNaN(x) || x === null || x === undefined) return "–";
  if (!Number.isFinite(x)) return x < 0 ? "−∞" : "∞";
  const size = Math.abs(x);
  const digits = size !== 0 && (size < 1e-3 || size >= 1e5) ? size.toExponential(1) : String(+size.toPrecision(3));
  return (x < 0 ? "−" : "") + digits.replace("e-", "e−").replace("e+", "e");
}

/** Returns a figure with its sign. */
function signed(x) {
  return (x > 0 ? "+" : "") + figure(x);
}

/** Returns "1 read" or "3 reads". */
function counted(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

/** Returns a bar of `share` (0 to 1) of the width. */
function bar(share, kind) {
  const node = element("span", {class: `bar ${kind}`, "aria-hidden": "true"}, element("i"));
  node.firstChild.style.width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  return node;
}

/** Returns a bar that starts in the middle: to the right what is positive, to the left what is negative. */
function signedBar(share) {
  return bar(Math.abs(share || 0) / 2, `signed ${share < 0 ? "minus" : "plus"}`);
}

/** Returns the items of `list` in a list that shows 40 at first and more on request. */
function growingList(list, itemOf, attributes) {
  const step = 40;
  const node = element("ul", attributes);
  const more = element("button", {type: "button", class: "more", click: grow});
  function grow() {
    const shown = node.children.length;
    node.append(...list.slice(shown, shown + step).map((item) => element("li", null, itemOf(item))));
    const left = list.length - node.children.length;
    more.textContent = `Show ${Math.min(step, left)} more of ${counted(left, "further reader")}`;
    more.hidden = left === 0;
    if (shown) node.children[shown].querySelector("button")?.focus();
  }
  grow();
  return element("div", null, node, more);
}
