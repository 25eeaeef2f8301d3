"use strict";

// The cards: drawn as they come into view, sorted, searched; words that show their attention; the large view.

const { images, models, scores, title } = window.GALLERY;
const byId = (id) => document.getElementById(id);
const cards = byId("cards"), large = byId("large"), keys = byId("keys");
const PLAY = "M3 1.5v9l7.5-4.5z", STOP = "M2 2h8v8H2z";
const SHOWN = new Set(["Bleu_4", "METEOR", "CIDEr"]); // scores on a card
const single = models.length === 1;

// --- a card ---------------------------------------------------------------------------------------------------

const thumbnail = (i) => `images/${String(i).padStart(5, "0")}.jpg`;
const plainNumber = (value) => String(value).replace("-", "−");

function imageElement(i, tag = "button") {
  const { size, id } = images[i];
  const frame = make(tag, { className: size ? "frame has-size" : "frame" });
  if (tag === "button") Object.assign(frame, { ariaLabel: `${id}: large`, type: "button" });
  if (!size) frame.append(make("span", { className: "missing" }, "no image file"));
  else frame.append(make("img", { src: thumbnail(i), width: size[0], height: size[1], alt: "", loading: "lazy", decoding: "async" }));
  return frame;
}

function icon(path) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 12 12");
  svg.append(document.createElementNS(space, "path"));
  svg.firstChild.setAttribute("d", path);
  return svg;
}

function wordNodes(caption, m, terms) {
  const looked = models[m].grid !== null;
  const nodes = [];
  caption.words.forEach((word, k) => {
    const p = caption.logProbs ? Math.exp(caption.logProbs[k]) : null;
    const hit = terms.some((term) => word.toLowerCase().startsWith(term));
    const node = make(looked ? "button" : "span", { className: hit ? "w hit" : "w", data: { k } }, word);
    if (p !== null) {
      node.style.setProperty("--u", Math.min(1, 1.1 * Math.max(0, 1 - p) ** 1.3).toFixed(2));
      node.title = `probability ${p.toFixed(2)}`;
    }
    nodes.push(node, " ");
  });
  return nodes.length ? nodes : [make("span", { className: "empty" }, "(empty caption)")];
}

// chosen: the score that the cards are sorted by, shown with the usual ones; null: all scores
function captionBlock(i, m, chosen = null) {
  const caption = images[i].captions[m];
  const block = make("div", { className: "caption", data: { model: m }, style: { "--model": Charts.color(m) } });
  const who = make("div", { className: "who" });
  if (models[m].grid && caption?.words.length) {
    const button = make("button", { className: "play", title: "Play the words (P)", ariaLabel: "Play the words", data: { action: "play" } });
    button.append(icon(PLAY));
    who.append(button);
  }
  who.append(make("span", { className: "name", title: models[m].name }, models[m].name));
  if (caption?.logProb != null) who.append(make("span", { className: "number", title: "log-probability of the caption" }, `log p ${plainNumber(caption.logProb.toFixed(2))}`));
  block.append(who);
  if (!caption) {
    block.append(make("p", { className: "words" }, make("span", { className: "empty" }, "(no caption)")));
    return block;
  }
  block.append(make("p", { className: "words" }, ...wordNodes(caption, m, view.terms)));
  if (caption.scores) {
    block.append(make("div", { className: "scores" }, ...scores.map(([name, label], k) => caption.scores[k] === null || (chosen && name !== chosen && !SHOWN.has(name)) ? null
      : make("span", { className: name === chosen ? "chosen" : "" }, `${label} `, make("b", {}, caption.scores[k].toFixed(2))))));
  }
  return block;
}

function textBlock(i, chosen) {
  const { references, id } = images[i];
  const block = make("div", { className: "text" }, ...models.map((_, m) => captionBlock(i, m, chosen)));
  if (references.length) block.append(make("ul", { className: "references", ariaLabel: "References" }, ...references.map((text) => make("li", {}, ...marked(text)))));
  block.append(make("div", { className: "id" }, ...marked(id)));
  return block;
}

// A text with the words that were searched for marked.
function marked(text) {
  return text.split(/(\s+)/).map((part) =>
    view.terms.some((term) => part.toLowerCase().startsWith(term)) ? make("mark", {}, part) : part);
}

// --- which cards, in which order --------------------------------------------------------------------------------

const view = { sort: "order", model: 0, backward: false, terms: [], order: images.map((_, i) => i) };
const elements = images.map((image, i) => make("article", { className: "card", ariaLabel: image.id, data: { i } }));
const AT_ONCE = 24; // cards that are drawn before the browser says which are in view

// The browser itself knows which cards are near the view (content-visibility); an observer of thousands of
// cards costs ten milliseconds a frame and stands in where a browser does not tell.
const told = "oncontentvisibilityautostatechange" in document.documentElement;
const filler = told ? null : new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) draw(target, isIntersecting);
}, { rootMargin: "900px 0px" });
cards.addEventListener("contentvisibilityautostatechange", ({ target, skipped }) => draw(target, !skipped));

function draw(element, near) {
  if (near) fill(element);
  else { element.replaceChildren(); element.dataset.filled = ""; }
}

function fill(element) {
  const state = view.terms.join(" ") + view.sort;
  if (element.dataset.filled === `1${state}`) return;
  const i = Number(element.dataset.i);
  element.replaceChildren(imageElement(i), textBlock(i, view.sort));
  element.dataset.filled = `1${state}`;
}

let haystack; // the text of each image that is searched, made when somebody searches
const makeHaystack = () => images.map(({ id, references, captions }) =>
  ` ${[id, ...captions.map((caption) => caption?.words.join(" ") ?? ""), ...references].join(" ")}`.toLowerCase().replace(/\s+/g, " "));

function sortValue(i) {
  const caption = images[i].captions[view.model], k = scores.findIndex(([name]) => name === view.sort);
  if (k >= 0) return caption?.scores?.[k] ?? null;
  if (view.sort === "logprob") return caption?.logProb ?? null;
  if (view.sort === "length") return caption?.words.length ?? null;
  if (view.sort === "difference") {
    const cider = scores.findIndex(([name]) => name === "CIDEr");
    const values = images[i].captions.map((one) => one?.scores?.[cider] ?? null);
    return values.includes(null) ? null : Math.max(...values) - Math.min(...values);
  }
  return i;
}

const DIRECTIONS = {
  order: ["first to last", "last to first"], logprob: ["unlikely first", "likely first"],
  length: ["short first", "long first"], difference: ["alike first", "different first"],
};

function apply() {
  const wanted = view.terms.map((term) => ` ${term}`);
  if (wanted.length) haystack ??= makeHaystack();
  const values = new Map(images.map((_, i) => [i, sortValue(i)]));
  view.order = images.map((_, i) => i).filter((i) => wanted.every((term) => haystack[i].includes(term)));
  const sign = view.backward ? -1 : 1;
  view.order.sort((a, b) => {
    const x = values.get(a), y = values.get(b);
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    return sign * (x - y) || a - b;
  });
  clear();
  for (const element of cards.children) if (element.dataset.filled) element.dataset.filled = "stale";
  cards.replaceChildren(...view.order.map((i) => elements[i]));
  view.order.slice(0, AT_ONCE).forEach((i) => fill(elements[i]));
  filler?.disconnect();
  if (filler) view.order.forEach((i) => filler.observe(elements[i]));
  scrollTo({ top: 0 });
  byId("none").hidden = view.order.length > 0;
  byId("count").textContent = view.order.length === images.length ? `${images.length} images` : `${view.order.length} of ${images.length} images`;
  byId("direction").textContent = (DIRECTIONS[view.sort] ?? ["worst first", "best first"])[Number(view.backward)];
  byId("of-model").hidden = single || ["order", "difference"].includes(view.sort);
}

function sortBy(name, backward = name === "difference") {
  Object.assign(view, { sort: name, backward });
  byId("sort").value = name;
  apply();
}

// --- attention under a word ---------------------------------------------------------------------------------------

const overlay = document.createElement("canvas"), readout = make("div", { className: "readout" });
const active = { word: null, values: null, run: 0, playing: null };

function place(word) {
  const holder = word.closest("[data-i]"), block = word.closest(".caption");
  return { i: Number(holder.dataset.i), m: Number(block.dataset.model), k: Number(word.dataset.k), frame: holder.querySelector(".fit") ?? holder.querySelector(".frame") };
}

async function activate(word) {
  if (active.word === word) return;
  active.word?.classList.remove("on");
  active.word = word;
  word.classList.add("on");
  const { i, m, k, frame } = place(word), run = ++active.run;
  const caption = images[i].captions[m];
  const map = (await Attention.maps(i, m))[k];
  if (run !== active.run) return;
  const moved = overlay.parentNode !== frame;
  if (moved) { frame.append(overlay, readout); active.values = null; }
  const p = caption.logProbs ? Math.exp(caption.logProbs[k]) : null;
  readout.replaceChildren(make("b", {}, caption.words[k]), p === null ? "" : make("span", {}, `probability ${p.toFixed(2)}`));
  if (map) fade(Attention.smooth(map, models[m].grid), run);
  else Attention.paint(overlay, new Float32Array(96 * 96), 0);
}

// From the map before to this one in a few frames.
function fade(target, run) {
  const from = active.values, began = performance.now();
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  (function frame(now) {
    if (run !== active.run) return;
    const t = still ? 1 : Math.min(1, (now - began) / 160);
    active.values = from ? target.map((value, j) => from[j] + t * (value - from[j])) : target;
    Attention.paint(overlay, active.values, from ? 1 : t);
    if (t < 1) requestAnimationFrame(frame);
  })(still ? Infinity : began + 16);
}

function clear() {
  active.run++;
  active.word?.classList.remove("on");
  active.word = active.values = null;
  overlay.remove();
  readout.remove();
}

function stop() {
  if (!active.playing) return;
  clearTimeout(active.playing.timer);
  active.playing.button.replaceChildren(icon(PLAY));
  active.playing = null;
}

function play(block) {
  const button = block.querySelector(".play"), words = [...block.querySelectorAll("button.w")];
  const mine = active.playing?.button === button;
  stop();
  clear();
  if (mine || !words.length) return;
  button.replaceChildren(icon(STOP));
  const playing = (active.playing = { button, timer: 0 });
  (function step(k) {
    if (active.playing !== playing) return;
    if (k === words.length || !words[k].isConnected) { stop(); clear(); return; }
    activate(words[k]);
    playing.timer = setTimeout(step, 750, k + 1);
  })(0);
}

// --- the large view -----------------------------------------------------------------------------------------------

function openLarge(i) {
  stop();
  clear();
  large.dataset.i = i;
  const frame = imageElement(i, "div"), fit = make("span", { className: "fit" });
  fit.append(...frame.childNodes);
  if (images[i].size) fit.style.setProperty("--ratio", images[i].size[0] / images[i].size[1]);
  frame.append(fit);
  for (const [name, step] of [[".previous", -1], [".next", 1]]) large.querySelector(name).hidden = view.order[view.order.indexOf(i) + step] === undefined;
  large.querySelector(".view").replaceChildren(frame);
  large.querySelector(".aside").replaceChildren(textBlock(i, null));
  const strips = models.map((_, m) => strip(i, m)).filter(Boolean);
  large.querySelector(".strips").replaceChildren(...strips.flat());
  large.querySelector(".strips").hidden = strips.length === 0;
  if (!large.open) large.showModal();
  large.focus();
  large.scrollTop = 0;
}

// A small image for each word, all words of a caption at once.
function strip(i, m) {
  const caption = images[i].captions[m];
  if (!models[m].grid || !caption?.words.length || !images[i].size) return null;
  const tiles = caption.words.map((word, k) => {
    const canvas = document.createElement("canvas");
    Attention.maps(i, m).then((maps) => maps[k] && Attention.paint(canvas, Attention.smooth(maps[k], models[m].grid)));
    const p = caption.logProbs ? make("small", {}, ` ${Math.round(100 * Math.exp(caption.logProbs[k]))} %`) : null;
    return make("div", { className: "tile" }, make("span", { className: "pane" }, make("img", { src: thumbnail(i), alt: "" }), canvas), word, p);
  });
  return [make("h3", {}, models[m].name), make("div", { className: "strip" }, ...tiles)];
}

function turn(step) {
  const at = view.order.indexOf(Number(large.dataset.i)) + step;
  if (at >= 0 && at < view.order.length) openLarge(view.order[at]);
}

// --- what people do -----------------------------------------------------------------------------------------------

function setStyle(style) {
  Attention.style = style;
  for (const name of ["spotlight", "heat"]) byId(name).setAttribute("aria-pressed", String(name === style));
  if (active.values) Attention.paint(overlay, active.values);
  if (large.open) openLarge(Number(large.dataset.i));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("theme", theme); } catch { /* a page from disk may keep nothing */ }
}

function openTab(name) {
  for (const tab of ["images", "comparison", "quality"]) {
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    byId(tab).hidden = tab !== name;
  }
  stop();
  clear();
  if (name !== "images" && !byId(name).childElementCount) Numbers[name](byId(name));
  scrollTo({ top: 0 });
}

function step(direction) {
  const current = document.activeElement.closest?.(".card");
  const seen = view.order.findIndex((i) => elements[i].getBoundingClientRect().bottom > 150);
  const at = current ? view.order.indexOf(Number(current.dataset.i)) + direction : seen;
  const element = elements[view.order[Math.min(Math.max(at, 0), view.order.length - 1)]];
  if (!element) return;
  element.scrollIntoView({ block: "nearest" });
  fill(element);
  element.querySelector(".frame").focus();
}

function listen() {
  let typing;
  byId("search").addEventListener("input", ({ target }) => {
    clearTimeout(typing);
    typing = setTimeout(() => { view.terms = target.value.toLowerCase().split(/\s+/).filter(Boolean); apply(); }, 60);
  });
  byId("sort").addEventListener("change", ({ target }) => sortBy(target.value));
  byId("model").addEventListener("change", ({ target }) => { view.model = Number(target.value); apply(); });
  byId("direction").addEventListener("click", () => sortBy(view.sort, !view.backward));
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  byId("help").addEventListener("click", () => keys.showModal());
  for (const style of ["spotlight", "heat"]) byId(style).addEventListener("click", () => setStyle(style));
  for (const tab of ["images", "comparison", "quality"]) byId(`tab-${tab}`).addEventListener("click", () => openTab(tab));

  document.addEventListener("mouseover", ({ target }) => {
    const word = target.closest?.("button.w");
    if (word) { stop(); activate(word); }
  });
  document.addEventListener("mouseout", ({ target, relatedTarget }) => {
    if (target.closest?.(".words") && !relatedTarget?.closest?.(".words") && !active.playing && !active.word?.matches(":focus")) clear();
  });
  document.addEventListener("focusin", ({ target }) => { if (target.matches?.("button.w")) { stop(); activate(target); } });
  document.addEventListener("focusout", ({ target }) => { if (target === active.word && !active.playing) clear(); });
  document.addEventListener("click", ({ target }) => {
    const action = target.closest?.("[data-action]")?.dataset.action, word = target.closest?.("button.w");
    if (word) activate(word);
    else if (action === "play") play(target.closest(".caption"));
    else if (action === "close" || target === large) large.close();
    else if (action === "previous" || action === "next") turn(action === "next" ? 1 : -1);
    else if (target.closest?.("[data-open]")) openLarge(Number(target.closest("[data-open]").dataset.open));
    else if (target.closest?.(".card .frame")) openLarge(Number(target.closest(".card").dataset.i));
    else if (!active.playing) clear();
  });
  large.addEventListener("close", () => { stop(); clear(); });
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
  if (target.matches?.("input, select")) {
    if (key === "Escape" && target === byId("search")) { target.value = ""; target.dispatchEvent(new Event("input")); target.blur(); }
    return;
  }
  const word = target.closest?.("button.w"), sideways = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (sideways && word) {
    const words = [...word.closest(".words").querySelectorAll("button.w")];
    words[words.indexOf(word) + sideways]?.focus();
  } else if (sideways && large.open) turn(sideways);
  else if (key === "j" || key === "k") large.open ? turn(key === "j" ? 1 : -1) : step(key === "j" ? 1 : -1);
  else if (key === "p") {
    const block = target.closest?.(".caption") ?? (large.open ? large : target.closest?.(".card") ?? elements[view.order[0]])?.querySelector(".caption");
    if (block) play(block);
  } else if (key === "/") byId("search").focus();
  else if (key === "o") setStyle(Attention.style === "heat" ? "spotlight" : "heat");
  else if (key === "t") byId("theme").click();
  else if (key === "?") keys.showModal();
  else if (["1", "2", "3"].includes(key)) { const tab = document.querySelectorAll(".tabs button")[key - 1]; if (!tab.hidden && !large.open) tab.click(); }
  else if (key === "Escape" && !large.open) { stop(); clear(); target.blur?.(); }
  else return;
  event.preventDefault();
}

function start() {
  let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  try { theme = localStorage.getItem("theme") ?? theme; } catch { /* nothing kept */ }
  document.documentElement.dataset.theme = theme;
  byId("subtitle").textContent = `${title} · ${single ? models[0].name : `${models.length} models`}`;
  document.title = `Captions: ${title}`;
  const probable = models.some((_, m) => images.some((image) => image.captions[m]?.logProb != null));
  const options = [["order", "order of the file"], ...scores, ...(probable ? [["logprob", "log-probability"]] : []), ["length", "length"]];
  if (!single && scores.some(([name]) => name === "CIDEr")) options.push(["difference", "difference in CIDEr"]);
  byId("sort").append(...options.map(([value, label]) => make("option", { value }, label)));
  byId("model").append(...models.map(({ name }, m) => make("option", { value: m }, name)));
  byId("tab-comparison").hidden = window.GALLERY.comparisons.length === 0;
  byId("tab-quality").hidden = !models[0].quality.captions;
  document.querySelector(".tabs").hidden = byId("tab-quality").hidden;
  document.querySelector(".bar").hidden = images.length === 1;
  listen();
  apply();
  if (images.length === 1) openLarge(0);
}
