// The page: what is chosen stands in the address (#token=12&slot=17), so that links, reloads and "back" lead to it.

const byId = (id) => document.getElementById(id);

/** Returns what the address chooses; what the record lacks is left out. */
function stateOf(record, hash) {
  const query = new URLSearchParams(hash.slice(1));
  const whole = (name, end) => {
    const n = /^\d+$/.test(query.get(name) ?? "") ? Number(query.get(name)) : NaN;
    return n < end ? n : null;
  };
  const text = whole("text", record.texts.length) ?? 0;
  const token = whole("token", record.texts[text]?.tokens.length ?? 0);
  const tables = record.readers.map((reader) => reader.table);
  const table = tables.includes(query.get("table")) ? query.get("table") : tables[0];
  const slot = whole("slot", record.readers.find((reader) => reader.table === table)?.slots ?? 0);
  return {text, token, slot, table: slot === null ? null : table, colour: query.get("colour")};
}

/** Returns the address of a state, without what is usual. */
function hashOf(record, state) {
  const query = new URLSearchParams();
  if (state.text) query.set("text", state.text);
  if (state.token !== null) query.set("token", state.token);
  if (state.slot !== null) query.set("slot", state.slot);
  if (state.slot !== null && state.table !== record.readers[0].table) query.set("table", state.table);
  if (state.colour) query.set("colour", state.colour);
  return `#${query}`;
}

function start(record) {
  const kinds = colourings(record);
  const panel = byId("panel");
  let state = {};
  const view = new TextView(record, byId("tokens"), byId("readout"), (place, how) =>
    go({...place, slot: null, table: null}, how));

  /** Changes what is chosen. Steps along the text replace the entry of the history instead of adding one. */
  function go(change, {step = false} = {}) {
    const next = {...state, ...change};
    const hash = hashOf(record, next);
    if (step) history.replaceState(null, "", hash);
    else if (hash !== (location.hash || "#")) history.pushState(null, "", hash);
    const stays = step || byId("tokens").contains(document.activeElement);
    show(next);
    if (!stays) panel.querySelector("h2").focus({preventScroll: true});
    // On a small screen the panel lies below the text: both come into view.
    if (matchMedia("(max-width: 800px)").matches) document.querySelector("main").scrollIntoView();
  }

  function show(next) {
    const kind = kinds.find(({id}) => id === next.colour) ?? kinds[0];
    if (view.kind !== kind) byId("legend").replaceChildren(...legendOf(kind, view.colour(kind)));
    state = next;
    byId("text").value = String(state.text);
    byId("colour").value = kind.id;
    const readers = state.slot === null ? [] : readersOf(record, state.table, state.slot);
    view.mark(state.token === null ? null : state, readers);
    if (state.token !== null) {
      view.reveal(state);
      view.describe(state);
    } else byId("readout").textContent = `${counted(view.tokens.length, "token")}. Point at one for its figure.`;
    const build = state.slot !== null ? slotPanel : state.token !== null ? tokenPanel : overviewPanel;
    panel.replaceChildren(...build(record, state, go));
    panel.scrollTop = 0;
  }

  byId("text").append(...record.texts.map(({title}, i) => element("option", {value: i}, `${i + 1}: ${title}`)));
  byId("text").closest("label").hidden = record.texts.length < 2;
  byId("colour").append(...kinds.map(({id, name}) => element("option", {value: id}, name)));
  byId("text").addEventListener("change", (event) => go({text: Number(event.target.value), token: 0}));
  byId("colour").addEventListener("change", (event) => go({colour: event.target.value}, {step: true}));
  connectSearch(record, byId("search"), byId("hits"), () => state, go);
  addEventListener("popstate", () => show(stateOf(record, location.hash)));
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, select")) {
      event.preventDefault();
      byId("search").focus();
    }
    if (event.key !== "Escape" || (state.slot === null && state.token === null)) return;
    const left = state.token === null ? null : view.element(state);
    go(state.slot !== null ? {slot: null, table: null} : {token: null, text: 0});
    left?.focus({preventScroll: true});
  });
  show(stateOf(record, location.hash));
}

byId("theme").addEventListener("click", () => {
  const {dataset} = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
});

addEventListener("DOMContentLoaded", async () => {
  if (!("DecompressionStream" in window)) {
    byId("readout").textContent = "This browser is too old for this page: it lacks DecompressionStream (2023).";
    return;
  }
  const store = byId("record");
  const record = await unpack(store.textContent);
  store.remove(); // its text is as large as all other memory of the page
  document.title = `Memory reads of ${record.model}`;
  byId("model").textContent = record.model;
  byId(`effects-${record.effects}`).hidden = false;
  if (record.texts.length && record.readers.length) start(record);
  else byId("readout").textContent = "The record has no text, or the model no memory.";
  document.documentElement.dataset.ready = "true";
});
