// The text: one element per token, in blocks that the browser lays out only when they come near the screen.

const BLOCK = 256; // tokens at most
const SHORT_BLOCK = 96; // tokens after which a block ends with a line

class TextView {
  constructor(record, box, readout, choose) {
    Object.assign(this, {record, box, readout});
    box.addEventListener("click", (event) => this.#withToken(event, choose));
    for (const name of ["mouseover", "focusin"]) {
      box.addEventListener(name, (event) => this.#withToken(event, (position) => this.describe(position)));
    }
    box.addEventListener("keydown", (event) => {
      const position = this.#step(event);
      if (position === undefined) return;
      event.preventDefault();
      const step = event.key !== "Enter";
      if (step) this.tokens[position].focus({preventScroll: true});
      else document.activeElement.blur(); // the focus goes to the panel, where the slots are
      choose(position, {step});
    });
  }

  /** Shows `text`. */
  show(text) {
    this.text = text;
    this.marks = [];
    this.tokens = [];
    const blocks = [];
    let block = null;
    for (let t = 0; t < text.tokens.length; t++) {
      const content = tokenText(this.record, text, t);
      if (block === null) {
        const place = {"data-start": t, "aria-label": `From token ${t}`};
        block = element("div", {class: "block", dir: "auto", role: "group", ...place});
        blocks.push(block);
      }
      const token = element("span", {role: "option", tabindex: "-1", "data-token": t});
      this.#fill(token, content);
      this.tokens.push(token);
      block.append(token);
      const size = t + 1 - Number(block.dataset.start);
      if (size >= BLOCK || (size >= SHORT_BLOCK && content.includes("\n"))) block = null;
    }
    if (this.tokens.length) this.tokens[0].tabIndex = 0;
    this.box.replaceChildren(...blocks);
  }

  /** Colours every token by its figure. */
  colour(kind) {
    this.kind = kind;
    this.values = kind.values(this.text);
    const most = strongest(this.values);
    this.tokens.forEach((token, t) => {
      token.className = `token ${colourClass(kind, this.values[t], most)}`;
    });
    return most;
  }

  /** Marks the selected token, the one that it predicts, and the readers of a slot. */
  mark(selected, readers) {
    for (const [token, name] of this.marks) {
      token.classList.remove(name);
      token.removeAttribute("aria-selected");
    }
    this.marks = readers.map((position) => [this.tokens[position], "reader"]);
    if (selected !== null) {
      this.box.querySelector("[tabindex='0']").tabIndex = -1;
      this.tokens[selected].tabIndex = 0;
      this.tokens[selected].setAttribute("aria-selected", "true");
      this.marks.push([this.tokens[selected], "selected"]);
      if (this.tokens[selected + 1]) this.marks.push([this.tokens[selected + 1], "predicted"]);
    }
    for (const [token, name] of this.marks) token.classList.add(name);
  }

  /** Scrolls the text so that the token is seen. */
  reveal(position) {
    this.tokens[position].scrollIntoView({block: "nearest"});
    const {top, bottom} = this.tokens[position].getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    // A block that was not laid out before has another height than was estimated.
    if (top < box.top || bottom > box.bottom) this.tokens[position].scrollIntoView({block: "center"});
  }

  /** Writes the figure of a token above the text. */
  describe(position) {
    const token = quoted(tokenText(this.record, this.text, position));
    const next = isFollowed(this.text, position)
      ? [", then ", quoted(scoredText(this.record, this.text, position))] : [];
    const value = this.values[position];
    const shown = Number.isNaN(value) ? "nothing follows, no figure"
      : `${this.kind.diverging ? signed(value) : figure(value)} ${this.kind.unit}`;
    this.readout.replaceChildren(`Token ${position} `, token, ...next, `: ${shown}`);
  }

  #fill(token, content) {
    token.append(...tokenNodes(content));
    if (/[\n\u2028\u2029]$/.test(content)) token.append("\n");
  }

  #withToken(event, action) {
    const token = event.target.closest("[data-token]");
    if (token) action(Number(token.dataset.token));
  }

  /** Returns the position that a key leads to: along the text, or to the nearest token of the next line. */
  #step(event) {
    const token = event.target.closest("[data-token]");
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return undefined;
    const position = Number(token.dataset.token);
    const last = this.tokens.length - 1;
    switch (event.key) {
      case "ArrowRight": return Math.min(last, position + 1);
      case "ArrowLeft": return Math.max(0, position - 1);
      case "ArrowDown": return this.#line(position, 1);
      case "ArrowUp": return this.#line(position, -1);
      case "Home": return 0;
      case "End": return last;
      case "Enter": return position;
      default: return undefined;
    }
  }

  #line(position, direction) {
    const place = (t) => this.tokens[t].getClientRects()[0] ?? this.tokens[t].getBoundingClientRect();
    const start = place(position);
    let best = position, distance = Infinity, line = null;
    for (let t = position + direction; t >= 0 && t < this.tokens.length; t += direction) {
      const here = place(t);
      if (Math.abs(here.top - start.top) < here.height / 2) continue;
      line ??= here.top;
      if (Math.abs(here.top - line) >= here.height / 2) break;
      const apart = Math.abs(here.left - start.left);
      if (apart < distance) [best, distance] = [t, apart];
    }
    return best;
  }
}
