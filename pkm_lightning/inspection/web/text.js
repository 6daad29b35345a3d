// The texts: one element per token, in blocks that the browser lays out only when they come near the screen.

const BLOCK = 256; // tokens at most
const SHORT_BLOCK = 96; // tokens after which a block ends with a line

class TextView {
  constructor(record, box, readout, choose) {
    Object.assign(this, {record, box, readout, marks: [], tokens: [], starts: []});
    box.replaceChildren(...record.texts.map((text, number) => this.#build(text, number)));
    if (this.tokens.length) this.tokens[0].tabIndex = 0;
    box.addEventListener("click", (event) => {
      const i = this.#indexOf(event.target);
      if (i !== null) choose(this.#place(i), {});
    });
    for (const name of ["mouseover", "focusin"]) {
      box.addEventListener(name, (event) => {
        const i = this.#indexOf(event.target);
        if (i !== null) this.describe(this.#place(i));
      });
    }
    box.addEventListener("keydown", (event) => {
      const i = this.#step(event);
      if (i === undefined) return;
      event.preventDefault();
      const step = event.key !== "Enter";
      if (step) this.tokens[i].focus({preventScroll: true});
      else document.activeElement.blur(); // the focus goes to the panel, where the slots are
      choose(this.#place(i), {step});
    });
  }

  /** Returns the element of a token. */
  element({text, token}) {
    return this.tokens[this.starts[text] + token];
  }

  /** Colours every token by its figure, all texts on one scale, and returns the figure of the strongest colour. */
  colour(kind) {
    this.kind = kind;
    this.values = this.record.texts.flatMap((text) => Array.from(kind.values(text)));
    const most = strongest(this.values);
    this.tokens.forEach((token, i) => {
      token.className = `token ${colourClass(kind, this.values[i], most)}`;
    });
    return most;
  }

  /** Marks the selected token (or null), the one that it predicts, and the readers of a slot. */
  mark(selected, readers) {
    for (const [token, name] of this.marks) {
      token.classList.remove(name);
      token.removeAttribute("aria-selected");
    }
    this.marks = readers.map((reader) => [this.element(reader), "reader"]);
    if (selected !== null) {
      const token = this.element(selected);
      this.box.querySelector("[tabindex='0']").tabIndex = -1;
      token.tabIndex = 0;
      token.setAttribute("aria-selected", "true");
      this.marks.push([token, "selected"]);
      const {length} = this.record.texts[selected.text].tokens;
      if (selected.token + 1 < length) {
        this.marks.push([this.element({...selected, token: selected.token + 1}), "predicted"]);
      }
    }
    for (const [token, name] of this.marks) token.classList.add(name);
  }

  /** Scrolls so that the token is seen. */
  reveal(place) {
    const token = this.element(place);
    token.scrollIntoView({block: "nearest"});
    const {top, bottom} = token.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    // A block that was not laid out before has another height than was estimated.
    if (top < box.top || bottom > box.bottom) token.scrollIntoView({block: "center"});
  }

  /** Writes the figure of a token above the text. */
  describe(place) {
    const text = this.record.texts[place.text];
    const next = isFollowed(text, place.token) ? [", then ", quoted(scoredText(this.record, text, place.token))] : [];
    const value = this.values[this.starts[place.text] + place.token];
    const shown = Number.isNaN(value) ? "nothing follows, no figure"
      : `${this.kind.diverging ? signed(value) : figure(value)} ${this.kind.unit}`;
    const token = quoted(tokenText(this.record, text, place.token));
    this.readout.replaceChildren(`Token ${place.token} `, token, ...next, `: ${shown}`);
  }

  #build(text, number) {
    this.starts.push(this.tokens.length);
    const name = `Text ${number + 1}`;
    const group = element("div", {role: "group", "aria-label": name});
    let block = null, start = 0;
    for (let t = 0; t < text.tokens.length; t++) {
      const content = tokenText(this.record, text, t);
      if (block === null) {
        const label = t === 0 && this.record.texts.length > 1 ? name : t;
        block = element("div", {class: "block", dir: "auto", role: "presentation", "data-label": label});
        start = t;
        group.append(block);
      }
      const names = {role: "option", tabindex: "-1", "data-token": t, "data-text": number};
      const token = element("span", names, ...tokenNodes(content));
      if (/[\n\u2028\u2029]$/.test(content)) token.append("\n");
      this.tokens.push(token);
      block.append(token);
      const size = t + 1 - start;
      block.style.containIntrinsicBlockSize = `auto ${(3 + size / 6).toFixed(1)}rem`; // until it is laid out
      if (size >= BLOCK || (size >= SHORT_BLOCK && content.includes("\n"))) block = null;
    }
    return group;
  }

  #place(i) {
    const {text, token} = this.tokens[i].dataset;
    return {text: Number(text), token: Number(token)};
  }

  #indexOf(node) {
    const token = node.closest("[data-token]");
    return token ? this.starts[Number(token.dataset.text)] + Number(token.dataset.token) : null;
  }

  /** Returns the token that a key leads to: along the texts, or the nearest one of the next line. */
  #step(event) {
    const i = this.#indexOf(event.target);
    if (i === null || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    const {text} = this.#place(i);
    switch (event.key) {
      case "ArrowRight": return Math.min(this.tokens.length - 1, i + 1);
      case "ArrowLeft": return Math.max(0, i - 1);
      case "ArrowDown": return this.#line(i, 1);
      case "ArrowUp": return this.#line(i, -1);
      case "Home": return this.starts[text];
      case "End": return (this.starts[text + 1] ?? this.tokens.length) - 1;
      case "Enter": return i;
      default: return undefined;
    }
  }

  #line(from, direction) {
    const box = (t) => this.tokens[t].getClientRects()[0] ?? this.tokens[t].getBoundingClientRect();
    const start = box(from);
    let best = from, distance = Infinity, line = null;
    for (let t = from + direction; t >= 0 && t < this.tokens.length; t += direction) {
      const here = box(t);
      if (Math.abs(here.top - start.top) < here.height / 2) continue;
      line ??= here.top;
      if (Math.abs(here.top - line) >= here.height / 2) break;
      const apart = Math.abs(here.left - start.left);
      if (apart < distance) [best, distance] = [t, apart];
    }
    return best;
  }
}
