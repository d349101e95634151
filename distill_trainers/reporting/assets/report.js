"use strict";
// Only what HTML cannot do: what both models expected at a token, another measure for the shades, and the filter of
// samples. Text goes into the page as text, never as markup.
const byId = (id) => document.getElementById(id);
const make = (tag, text, parent) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
};
const LEVELS = { kl: [50, 200, 500, 1000, 2000], reverse_kl: [50, 200, 500, 1000, 2000], jsd: [10, 50, 100, 200, 400] };
const TITLES = { kl: "forward KL", reverse_kl: "reverse KL", jsd: "Jensen-Shannon" };
const known = new WeakMap();
const dataOf = (map) => {
  if (!known.has(map)) {
    known.set(map, JSON.parse(map.parentElement.querySelector('script[type="application/json"]').textContent));
  }
  return known.get(map);
};
for (const form of document.querySelectorAll("form.filter")) {
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
}

for (const button of document.querySelectorAll("button[data-fold]")) {
  button.addEventListener("click", () => {
    for (const each of byId(button.dataset.fold).children) {
      if (each.tagName === "DETAILS") each.open = button.value === "open";
    }
  });
}

// ---- The card of a token ----
const maps = byId("maps");
const card = byId("token");
const percent = (value) => (value < 0 ? "–" : (value / 100).toFixed(value < 100 ? 2 : 1) + " %");
let here = null;

function hide() {
  if (here) here.classList.remove("here");
  here = null;
  card.hidden = true;
}

function show(token) {
  if (token === here) return;
  hide();
  here = token;
  token.classList.add("here");
  const map = token.parentElement;
  const data = dataOf(map);
  const place = Array.prototype.indexOf.call(map.children, token);
  card.replaceChildren();
  const head = make("p", undefined, card);
  make("b", "“" + token.textContent + "”", head);
  head.append(", token " + (place + 1) + ". ");
  const told = Object.keys(TITLES).filter((name) => data[name].length > place && data[name][place] >= 0);
  make("p", told.map((name) => TITLES[name] + " " + (data[name][place] / 1000).toFixed(3)).join(", ") + " nats", card);
  const table = make("table", undefined, card);
  const row = make("tr", undefined, make("thead", undefined, table));
  for (const name of data.names) make("th", name, row).scope = "col";
  const body = make("tbody", undefined, table);
  const given = make("tr", undefined, body);
  for (const side of data.p) make("td", "gives it " + percent(side[place] ?? -1), given).className = "given";
  const [ours, theirs] = data.top.map((side) => side[place] || []);
  for (let i = 0; i < Math.max(ours.length, theirs.length); i += 2) {
    const line = make("tr", undefined, body);
    for (const side of [ours, theirs]) {
      const cell = make("td", undefined, line);
      if (i >= side.length) continue;
      const text = data.text[side[i]];
      make(text === token.textContent ? "b" : "span", text, make("bdi", undefined, cell));
      cell.append(" " + percent(side[i + 1]));
    }
  }
  card.hidden = false;
  put(token);
}

// Below the token where there is room, else above it.
function put(token) {
  const box = token.getBoundingClientRect();
  const below = box.bottom + 8 + card.offsetHeight < innerHeight;
  card.style.top = Math.max(4, below ? box.bottom + 8 : box.top - 8 - card.offsetHeight) + "px";
  card.style.left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8)) + "px";
}

if (maps) {
  const tokenOf = (event) => (event.target.parentElement?.classList.contains("map") ? event.target : null);
  maps.addEventListener("pointerover", (event) => (tokenOf(event) ? show(event.target) : hide()));
  maps.addEventListener("pointerleave", hide);
  maps.addEventListener("click", (event) => tokenOf(event)?.focus({ preventScroll: true }));
  maps.addEventListener("focusin", (event) => (tokenOf(event) ? show(event.target) : hide()));
  maps.addEventListener("focusout", hide);
  // One stop of the Tab key for each text; the arrow keys go through it.
  maps.addEventListener("pointerdown", (event) => { const token = tokenOf(event); if (token) token.tabIndex = -1; });
  maps.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    if (event.key === "Escape") return hide();
    const all = token.parentElement;
    const next = {
      ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      ArrowDown: beside(token, 1), ArrowUp: beside(token, -1),
      Home: all.firstElementChild, End: all.lastElementChild,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next === null) return;
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  // The card goes along with its token, until that has neither the focus nor the pointer.
  const follow = () => (here?.matches(":focus, :hover") ? put(here) : hide());
  addEventListener("scroll", follow, { passive: true });
  addEventListener("resize", follow, { passive: true });
  byId("shade").addEventListener("change", (event) => shade(event.target.value));
}

// The nearest token of the line above or below.
function beside(token, direction) {
  const from = token.getBoundingClientRect();
  let best = null, line = null, nearest = Infinity;
  for (let each = token; each; each = direction > 0 ? each.nextElementSibling : each.previousElementSibling) {
    const box = each.getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (line !== null && Math.abs(box.top - line) > 4) break;
    line = box.top;
    const away = Math.abs(box.left - from.left);
    if (away < nearest) [best, nearest] = [each, away];
  }
  return best;
}

function shade(measure) {
  hide();
  for (const map of maps.querySelectorAll(".map")) {
    const values = dataOf(map)[measure];
    Array.prototype.forEach.call(map.children, (token, i) => {
      const value = values[i] ?? -1;
      token.className = "k" + LEVELS[measure].filter((limit) => value >= limit).length;
    });
  }
  for (const key of document.querySelectorAll("ul.key")) key.hidden = key.dataset.shade !== measure;
}

// ---- The filter of samples ----
const wanted = byId("wanted-text");
if (wanted) {
  const verdict = byId("verdict");
  const cards = Array.from(byId("cards").querySelectorAll(".card"));
  const texts = cards.map((each) => each.textContent.toLowerCase());
  const choose = () => {
    const text = wanted.value.toLowerCase(), kind = verdict.value.replace(" ", "-");
    let shown = 0;
    cards.forEach((each, i) => {
      const kept = texts[i].includes(text) && (!kind || (each.dataset.verdicts || "").split(" ").includes(kind));
      each.hidden = !kept;
      shown += kept;
    });
    byId("shown-cards").textContent = shown + " of " + cards.length + " shown";
  };
  wanted.addEventListener("input", choose);
  verdict.addEventListener("change", choose);
  choose();
}
