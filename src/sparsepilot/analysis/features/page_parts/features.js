"use strict";
// A list of all latents, drawn where one looks; a sheet of some; and one latent in full. Data come as scripts, when wanted.
const about = JSON.parse(document.getElementById("about").textContent);
const $ = (id) => document.getElementById(id);
const ROW = 32, AHEAD = 12, KEEP_CHUNKS = 48, SHEET = 20, SHEET_LINES = 5;
const root = document.documentElement;

// ---- data files
const loading = new Map(), waiting = new Map();
function arrived(name, value) { waiting.get(name)?.(value); }
function load(name) {
  if (loading.has(name)) {  // the one asked for last is the last to go
    const found = loading.get(name);
    loading.delete(name); loading.set(name, found);
    return found;
  }
  const script = document.createElement("script");
  const promise = new Promise((resolve, reject) => {
    waiting.set(name, resolve);
    script.onerror = () => reject(new Error(`data/${name}.js is not there or damaged; the folder of this page belongs together`));
    script.onload = () => { script.remove(); reject(new Error(`data/${name}.js is damaged; build the page again`)); };
    script.src = `data/${name}.js`;
    document.head.append(script);
  });
  loading.set(name, promise);
  const chunks = [...loading.keys()].filter((key) => key.startsWith("latents-"));
  if (chunks.length > KEEP_CHUNKS) { loading.delete(chunks[0]); waiting.delete(chunks[0]); }
  return promise;
}
const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
async function latent(id) {
  const chunk = await load(`latents-${Math.floor(id / index.chunk)}`);
  return {...chunk.latents[id % index.chunk], texts: chunk.texts};
}

// ---- small things
function make(kind, className, ...children) {
  const element = document.createElement(kind);
  if (className) element.className = className;
  element.append(...children);
  return element;
}
const number = (value) => !Number.isFinite(value) ? "–" : value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en")
  : String(Number(value.toPrecision(3)));
const even = (most) => (value) => value.toFixed(most >= 100 ? 0 : most >= 10 ? 1 : most >= 1 ? 2 : 3);  // one form for a column
const fixed = (value) => Number.isFinite(value) ? value.toFixed(2) : "–";
const percent = (share) => !(share > 0) ? "0%" : share < 1e-5 ? "<0.001%" : `${Number((100 * share).toPrecision(2))}%`;
const SHOWN = {score: fixed, density: percent, max: number, cosine: fixed, id: percent};
const SIGNS = {"\n": "↵", "\t": "⇥", "\r": "↵"};

// Text with signs for what would break the line. A token of white space alone gets a sign, too, or nobody would see it.
function signed(text, whole) {
  const out = [];
  for (const part of text.split(/([\n\t\r])/)) {
    if (part in SIGNS) out.push(make("span", "sign", SIGNS[part]));
    else if (part) out.push(part);
  }
  if (whole && /^ +$/.test(text)) return [make("span", "sign", "·".repeat(text.length))];
  return out;
}
function preview(id) {
  const [before, peak, after] = index.previews.map((part) => part[id]);
  if (!peak && !before) return make("span", "never", "never fired");
  return make("span", "line", make("span", "left", make("span", "", ...signed(before))),
    make("span", "right", make("span", "peak", ...signed(peak, true)), make("span", "after", ...signed(after))));
}

// ---- one line of text, its tokens shaded by activation relative to `most`
function lineOf(context, texts, most, whole = false) {
  const [, peak, tokens, above] = context;
  const strength = new Map();
  for (let i = 0; i < above.length; i += 2) strength.set(above[i], above[i + 1]);
  const draw = (id, i) => {
    const value = strength.get(i) ?? 0, text = texts[id];
    const part = make("span", i === peak ? "peak" : value ? "token hot" : "token");
    if (value || i === peak) {
      part.style.setProperty("--a", (0.09 + 0.56 * Math.min(1, value / most)).toFixed(3));
      part.title = `${JSON.stringify(text)}  ${number(value)}`;
    }
    part.append(...(whole ? [text] : signed(text, i === peak || value > 0)));
    return part;
  };
  const all = tokens.map(draw);
  if (whole) return make("span", "line", ...all);
  return make("span", "line", make("span", "left", make("span", "", ...all.slice(0, peak))),
    make("span", "right", all[peak], make("span", "after", ...all.slice(peak + 1))));
}

// ---- the list
let index, order, shown, current = null, descending = true;
const orders = new Map();
function sorted(by) {
  if (!orders.has(by)) {
    const n = about.latents, ids = Uint32Array.from({length: n}, (_, i) => i);
    if (by !== "id") {
      const values = index.columns[by].map((value) => Number.isNaN(value) ? -Infinity : value);
      ids.sort((a, b) => values[b] - values[a] || a - b);
    }
    orders.set(by, ids);
  }
  return orders.get(by);
}
async function arrange() {
  const by = $("sort").value, asked = $("search").value;
  let ids = sorted(by);
  if (!descending) {  // those without a value stay last
    const values = index.columns[by];
    const known = values ? ids.filter((id) => !Number.isNaN(values[id])) : ids;
    ids = Uint32Array.from([...known.slice().reverse(), ...ids.slice(known.length)]);
  }
  document.querySelector(".controls").classList.toggle("idle", !asked);
  if (asked) {
    const groups = await find(asked);
    if (asked !== $("search").value) return;  // typed on meanwhile
    const place = new Map();
    groups.forEach((group, i) => group.forEach((id) => { if (!place.has(id)) place.set(id, i); }));
    const hits = [...ids].filter((id) => place.has(id));
    shown = Uint32Array.from(groups.flatMap((_, i) => hits.filter((id) => place.get(id) === i)));
  } else {
    shown = ids;
  }
  $("turn").textContent = descending === (by !== "id") ? "↓" : "↑";
  $("turn").title = descending === (by !== "id") ? "the largest first" : "the smallest first";
  $("count").textContent = asked ? `${shown.length.toLocaleString("en")} of ${about.latents.toLocaleString("en")} latents`
    : `${about.latents.toLocaleString("en")} latents, ${about.fired.toLocaleString("en")} fired on ${about.rows.toLocaleString("en")} tokens`;
  $("room").style.height = `${shown.length * ROW}px`;
  $("list").scrollTop = 0;
  drawRows();
  root.dataset.arranged = Number(root.dataset.arranged ?? 0) + 1;
}
function drawRows() {
  const list = $("list"), by = $("sort").value;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AHEAD);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AHEAD);
  $("rows").style.transform = `translateY(${first * ROW}px)`;
  $("rows").replaceChildren(...[...shown.subarray(first, last)].map((id) => row(id, SHOWN[by](index.columns[by === "id" ? "density" : by][id]))));
}
function row(id, value) {
  const element = make("a", "row", make("span", "id", String(id)), preview(id), make("span", "by", value));
  element.href = `#${id}`;
  element.dataset.id = id;
  element.tabIndex = -1;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", String(id === current));
  return element;
}

// Latents for what was typed: its number; then those of the very word, of words that begin with it, that hold it.
async function find(asked) {
  const groups = [new Set(), new Set(), new Set(), new Set()];
  const wanted = asked.trim().toLowerCase() || asked;
  if (/^\d+$/.test(wanted) && Number(wanted) < about.latents) groups[0].add(Number(wanted));
  const {words, fires, promotes} = await load("search");
  const lists = document.querySelector('[data-where="fires"]').ariaPressed === "true" ? fires : promotes;
  words.forEach((word, i) => {
    const group = word === wanted ? 1 : word.startsWith(wanted) ? 2 : wanted.length > 2 && word.includes(wanted) ? 3 : 0;
    if (group) for (const id of lists[i]) groups[group].add(id);
  });
  return groups;
}

// ---- a sheet of latents
async function sheet(found, title, note) {
  current = null;
  const cards = found.map((one) => {
    const most = one.top[0]?.[3] ? Math.max(...strengths(one)) : 1;
    const card = make("a", "card", make("header", "", make("b", "", String(one.id)), make("span", "", `score ${fixed(index.columns.score[one.id])}`),
      make("span", "", `on ${percent(index.columns.density[one.id])}`)), ...one.top.slice(0, SHEET_LINES).map((context) => lineOf(context, one.texts, most)));
    if (one.promotes.length) card.append(make("footer", "", "promotes", ...one.promotes.slice(0, 5).map(([id]) => make("span", "word", ...signed(one.texts[id].trim() || one.texts[id], true)))));
    card.href = `#${one.id}`;
    card.querySelector("header").title = "score, and the share of tokens that it fires on";
    return card;
  });
  const again = make("button", "", "draw others");
  again.type = "button";
  again.title = "20 drawn at random from the first 200 of the list";
  again.onclick = drawOthers;
  show(make("div", "head", make("h1", "", title), make("p", "", note), make("div", "go", again)),
    make("div", "gallery", ...cards),
    make("p", "formula", `${about.architecture} on ${about.sites.join(", ")} of ${about.model}: ${about.latents.toLocaleString("en")} latents, ${about.l0} active on a token. ` +
      "Score: how alike the texts are on which a latent fires, the mean cosine of embeddings of these texts, weighted by activation; 1 is the same words each time."));
  document.title = `${about.run}: features`;
  drawRows();
}
const strengths = (one) => one.top.flatMap((context) => context[3].filter((_, i) => i % 2));
function home() {
  load("picked").then((picked) => sheet(picked.latents.map((one) => ({...one, texts: picked.texts})),
    `${picked.latents.length} of the ${about.best} latents with the highest score`, `drawn at random (seed ${about.seed})`)).catch(complain);
}
async function drawOthers() {
  try {
    const first = [...shown.subarray(0, about.best)], drawn = new Set();
    while (drawn.size < Math.min(SHEET, first.length)) drawn.add(Math.floor(Math.random() * first.length));
    const ids = [...drawn].sort((a, b) => a - b).map((i) => first[i]);
    await sheet(await Promise.all(ids.map(latent)), `${ids.length} of the first ${first.length} of the list`, "drawn at random");
  } catch (error) { complain(error); }
}

// ---- one latent
async function open(id) {
  current = id;
  const one = await latent(id);
  if (current !== id) return;
  const c = index.columns;
  const tiles = [["score", fixed(c.score[id])], ["density", percent(c.density[id])], ["firings", one.fires.toLocaleString("en")],
    ["mean activation", number(one.mean)], ["max activation", number(c.max[id])], ["nearest cosine", fixed(c.cosine[id])]];
  const step = (text, by, title) => {
    const button = make("button", "", text);
    button.type = "button"; button.title = title;
    button.onclick = () => move(by);
    return button;
  };
  const overview = make("button", "", "overview");
  overview.type = "button"; overview.title = "Esc"; overview.onclick = () => { location.hash = ""; };
  show(make("div", "head", make("h1", "", `Latent ${id}`), make("div", "go", overview, step("↑", -1, "the one before in the list (k)"), step("↓", 1, "the next in the list (j)"))),
    make("dl", "tiles card", ...tiles.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value)))),
    make("div", "facts", histogram(one), words(one), neighbours(one)), texts(one));
  document.title = `${about.run}: latent ${id}`;
  drawRows();
}
function histogram(one) {
  const [first, counts] = one.histogram, card = make("section", "card", make("h2", "", "Activations", make("small", "", "firings, by strength")));
  card.id = "histogram";
  if (!counts.length) { card.append(make("p", "note", "none")); return card; }
  const W = 300, H = 170, most = Math.max(...counts), wide = W / Math.max(counts.length, 6);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${W} ${H + 24}`);
  svg.setAttribute("role", "img");
  const draw = (kind, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
    return element;
  };
  counts.forEach((count, i) => {
    const range = `${number(about.edges[first + i])} to ${number(about.edges[first + i + 1])}: ${count.toLocaleString("en")}`;
    const hit = draw("rect", {class: "hit", x: i * wide, y: 0, width: wide, height: H});
    hit.append(Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), {textContent: range}));
    const high = count ? Math.max(1.5, count / most * (H - 6)) : 0;
    draw("rect", {class: "bar", x: i * wide + 0.75, y: H - high, width: Math.max(1, wide - 1.5), height: high, rx: 1.5, "pointer-events": "none"});
  });
  draw("line", {x1: 0, x2: W, y1: H + 0.5, y2: H + 0.5});
  // bins are a quarter of an octave each: where a value lies among them
  const edges = about.edges, place = (value) => {
    const bin = edges.findIndex((edge, i) => value >= edge && value < edges[i + 1]);
    return (bin - first + (value - edges[bin]) / (edges[bin + 1] - edges[bin])) * wide;
  };
  let free = -1;
  for (let power = -3; power <= 4; power++) {
    for (const digit of [1, 2, 5]) {
      const value = Number((digit * 10 ** power).toPrecision(1)), x = place(value);
      if (!(x >= 0 && x <= counts.length * wide) || x < free) continue;
      draw("line", {x1: x, x2: x, y1: H, y2: H + 4, style: "stroke: var(--faint)"});
      draw("text", {x, y: H + 18, "text-anchor": x < 8 ? "start" : x > W - 8 ? "end" : "middle"}, number(value));
      free = x + 26;
    }
  }
  card.append(svg);
  return card;
}
function words(one) {
  const card = make("section", "card", make("h2", "", "Tokens", make("small", "", "logits of its direction")));
  card.id = "words";
  if (!about.lens) { card.append(make("p", "note", "What it writes is not as wide as the residual stream.")); return card; }
  const most = Math.max(...[...one.promotes, ...one.suppresses].map(([, logit]) => Math.abs(logit)));
  const column = (title, pairs, less) => make("div", "", make("h3", "", title), ...pairs.map(([id, logit]) => {
    const pair = make("div", less ? "pair less" : "pair", make("span", "", ...visible(one.texts[id])), make("span", "by", logit.toFixed(2).replace("-", "−")));
    pair.style.setProperty("--w", (Math.abs(logit) / most).toFixed(3));
    return pair;
  }));
  card.append(make("div", "words", column("promotes", one.promotes, false), column("suppresses", one.suppresses, true)));
  return card;
}
const visible = (text) => text.startsWith(" ") && text.trim() ? [make("span", "sign", "·"), ...signed(text.slice(1))] : signed(text, true);
function neighbours(one) {
  const card = make("section", "card", make("h2", "", "Nearest latents", make("small", "", "decoder cosine")));
  card.id = "near";
  card.append(make("div", "near", ...one.nearest.map(([id, cosine]) => row(id, fixed(cosine)))));
  return card;
}
function texts(one) {
  const card = make("section", "card texts");
  if (!one.top.length) { card.append(make("p", "note", `Never fired on these ${about.rows.toLocaleString("en")} tokens.`)); return card; }
  const most = Math.max(...strengths(one)), form = even(most);
  const contextOf = (context) => {
    const above = context[3], at = above.findIndex((place, i) => i % 2 === 0 && place === context[1]);
    const element = make("div", "context", make("span", "by", form(above[at + 1])), lineOf(context, one.texts, most));
    element.title = "click for all of it";
    element.onclick = () => {
      if (!getSelection().isCollapsed) return;
      const whole = element.classList.toggle("open");
      element.lastChild.replaceWith(lineOf(context, one.texts, most, whole));
    };
    return element;
  };
  card.append(make("h2", "", "Top activations", make("small", "", "contexts that differ, each at its strongest token")), ...one.top.map(contextOf));
  one.bands.forEach((band, i) => {
    if (band.length) card.append(make("h3", "", `${["strongest", "second", "third", "weakest"][i]} quarter of its firings`), ...band.map(contextOf));
  });
  return card;
}

// ---- moving about
function show(...parts) {
  $("main").replaceChildren(...parts);
  $("main").scrollTop = 0;
  root.dataset.shown = current ?? "overview";
}
function complain(error) {
  $("main").replaceChildren(make("p", "note", error.message));
  console.error(error.message);
}
function move(by) {
  const at = shown.indexOf(current ?? -1), to = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + by));
  if (!shown.length) return;
  location.hash = shown[to];
  const list = $("list"), top = to * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}
function route() {
  const asked = /^#(\d+)$/.exec(location.hash);
  if (asked && Number(asked[1]) < about.latents) open(Number(asked[1])).catch(complain);
  else home();
}
function paint(theme) {
  root.dataset.theme = theme;
  root.style.colorScheme = theme;
  $("theme").textContent = theme === "dark" ? "light" : "dark";
}
paint(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("theme").onclick = () => paint(root.dataset.theme === "dark" ? "light" : "dark");
$("home").textContent = about.run;
$("home").title = "overview";

async function start() {
  index = await load("index");
  for (const name in index.columns) index.columns[name] = floats(index.columns[name]);
  await arrange();
  const again = () => arrange().catch(complain);
  let typing;
  $("search").oninput = () => { clearTimeout(typing); typing = setTimeout(again, 90); };
  $("sort").onchange = () => { descending = true; again(); };
  $("turn").onclick = () => { descending = !descending; again(); };
  for (const button of document.querySelectorAll(".either button")) {
    button.onclick = () => {
      for (const other of document.querySelectorAll(".either button")) other.ariaPressed = String(other === button);
      again();
    };
  }
  let drawing = false;
  $("list").onscroll = () => {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(() => { drawing = false; drawRows(); });
  };
  addEventListener("resize", drawRows);
  addEventListener("hashchange", route);
  addEventListener("keydown", (event) => {
    const typed = event.target.matches("input, select");
    if (event.metaKey || event.ctrlKey || event.altKey) return;
    if (event.key === "/" && !typed) { event.preventDefault(); $("search").focus(); }
    else if (event.key === "Escape") { if (typed) event.target.blur(); else location.hash = ""; }
    else if (event.key === "ArrowDown" && !event.target.matches("select") || event.key === "j" && !typed) { event.preventDefault(); move(1); }
    else if (event.key === "ArrowUp" && !event.target.matches("select") || event.key === "k" && !typed) { event.preventDefault(); move(-1); }
    else if (event.key === "Enter" && event.target === $("search") && shown.length) location.hash = shown[0];
  });
  route();
  root.dataset.ready = "yes";
}
start().catch(complain);
