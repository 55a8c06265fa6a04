// The pages of an SAE: a list of its latents, and each latent, told apart by what follows # in the address.
// Data come as scripts, which a page opened from a disk may load; all of them is text, and shown as text.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const BARS = 16; // of a histogram in the list
  const TALLEST = 8e6; // pixels; browsers take no element much higher
  const OVERSCAN = 6;
  const LONGEST = 40; // characters of a token that are shown

  const $ = (id) => document.getElementById(id);
  let tokens = []; // the strings that are used; 0 is none
  const texts = new Map(); // the rows of text, some to a file
  let sae = null; // facts
  let list = null; // of every latent: fired, largest, shape, heads
  const chunks = new Map(); // latents in full

  // ---- loading

  const loading = new Map();
  function load(path) {
    if (!loading.has(path)) {
      const loaded = new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = path;
        script.onload = resolve;
        script.onerror = () => reject(new Error(`${path} is missing or cannot be read`));
        document.head.append(script);
      });
      loaded.catch(() => loading.delete(path));
      loading.set(path, loaded);
    }
    return loading.get(path);
  }

  const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array };
  function unpacked([type, data]) {
    const text = atob(data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new ARRAYS[type](bytes.buffer);
  }
  const unpackedAll = (parts) => Object.fromEntries(Object.entries(parts).map(([name, part]) => [name, unpacked(part)]));

  window.gemmascope = {
    vocabulary: (texts) => { tokens = texts; },
    text: (number, part) => { texts.set(number, unpacked(part)); },
    sae(facts) {
      sae = facts;
      const n = sae.width;
      list = { fired: new Float64Array(n), largest: new Float32Array(n), shape: new Uint8Array(n * BARS), heads: new Uint32Array(n * sae.heads), loaded: 0 };
    },
    list(number, parts) {
      const start = number * sae.list_chunk;
      const { fired, largest, shape, heads } = unpackedAll(parts);
      list.fired.set(fired, start);
      list.largest.set(largest, start);
      list.heads.set(heads, start * sae.heads);
      shape.forEach((two, i) => {
        list.shape[start * BARS + 2 * i] = two >> 4;
        list.shape[start * BARS + 2 * i + 1] = two & 15;
      });
      list.loaded += fired.length;
    },
    latents: (number, parts) => { chunks.set(number, unpackedAll(parts)); },
  };

  const listPart = (number) => load(`data/list-${number}.js`);
  const isDead = (latent) => list.fired[latent] === 0;

  function failed(error) {
    const line = element("p", { class: "error", role: "alert" }, `This page cannot be shown: ${error.message}.`);
    $("problem").replaceChildren(line);
  }

  // ---- elements

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function number(x) {
    if (!Number.isFinite(x)) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    const text = size >= 1e6 || size < 1e-3 ? x.toExponential(2) : size >= 1000 ? Math.round(x).toLocaleString("en") : x.toPrecision(3);
    return text.replace(/-/g, "−").replace("e+", "e");
  }
  const count = (n) => n.toLocaleString("en");
  function share(x) {
    if (x === 0) return "0%";
    if (x >= 0.995) return `${Math.round(100 * x)}%`;
    return `${x >= 0.0001 ? (100 * x).toPrecision(2) : (100 * x).toExponential(1).replace("-", "−")}%`;
  }

  // ---- tokens as text

  const UNSEEN = /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;
  const JOINERS = /[\u200c\u200d]/;

  // What stands for a token: [text, whether it is a sign in the place of what cannot be seen].
  function pieces(text, running = false, afterBlank = false) {
    if (text === "") return [["∅", true]];
    const found = [];
    const add = (piece, sign) => {
      const last = found.at(-1);
      if (last && last[1] === sign) last[0] += piece;
      else found.push([piece, sign]);
    };
    const spaces = / {2}/.test(text) || (afterBlank && /^ +$/.test(text));
    if (/^\p{M}/u.test(text) && !running) add("◌", true);
    let length = 0;
    for (const c of text) {
      if (++length > LONGEST) {
        add("…", true);
        break;
      }
      if (c === "\n") add("⏎", true);
      else if (c === "\t") add("⇥", true);
      else if (c === " ") add(running && !spaces ? " " : "␣", !(running && !spaces));
      else if (JOINERS.test(c) && text.length > 1) add(c, false);
      else if (UNSEEN.test(c)) add(`‹${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`, true);
      else add(c, false);
    }
    return found;
  }

  const nodes = (found) => found.map(([text, sign]) => (sign ? element("span", { class: "sign" }, text) : text));
  const plain = (text) => pieces(text).map(([piece]) => piece).join("");
  const chip = (id) => element("bdi", { class: "chip" }, ...nodes(pieces(tokens[id])));

  function heads(latent, first, last) {
    const found = [];
    for (let i = first; i < last; i++) {
      const id = list.heads[latent * sae.heads + i];
      if (id) found.push(chip(id));
    }
    return found;
  }
  const firing = (latent, most = sae.firing_heads) => heads(latent, 0, most);
  const raised = (latent) => heads(latent, sae.firing_heads, sae.heads);

  function spark(latent) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${BARS * 4} 15`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "spark");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(SVG, "path");
    let d = "";
    for (let i = 0; i < BARS; i++) {
      const height = list.shape[latent * BARS + i];
      if (height) d += `M${4 * i} 15v-${height}h3.4v${height}z`;
    }
    path.setAttribute("d", d);
    svg.append(path);
    return svg;
  }

  // ---- the list

  const KEYS = { index: (i) => i, frequency: (i) => list.fired[i], max: (i) => list.largest[i] };
  const FIRES = {
    all: () => true,
    alive: (i) => list.fired[i] > 0,
    dead: (i) => list.fired[i] === 0,
    rare: (i) => list.fired[i] > 0 && list.fired[i] <= sae.tokens / 1000,
    often: (i) => list.fired[i] > sae.tokens / 10,
  };
  const DEFAULTS = { q: "", in: "both", fires: "all", sort: "index", down: "" };
  let state = { ...DEFAULTS };
  let order = new Uint32Array(0);
  let cursor = 0;
  let listScroll = 0;
  let lowered = null;
  const shown = new Map(); // latent → its row

  function written(wanted) {
    const parts = Object.entries(wanted).filter(([key, value]) => value !== DEFAULTS[key]);
    return `#${parts.map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&")}`;
  }

  function read(hash) {
    const found = { ...DEFAULTS };
    for (const part of hash.slice(1).split("&")) {
      const [key, value = ""] = part.split("=", 2);
      try {
        if (Object.hasOwn(DEFAULTS, key)) found[key] = decodeURIComponent(value);
      } catch { /* a broken address is that of the whole list */ }
    }
    if (!Object.hasOwn(KEYS, found.sort)) found.sort = DEFAULTS.sort;
    if (!Object.hasOwn(FIRES, found.fires)) found.fires = DEFAULTS.fires;
    if (!["both", "firing", "raised"].includes(found.in)) found.in = DEFAULTS.in;
    return found;
  }

  // Whether a latent fires on, or raises, a token that holds each word of the query; null where there is no word. With
  // a sign for blanks in it, the query is one word.
  function matcher(query, where) {
    const text = query.trim().toLowerCase();
    if (text === "") return null;
    const words = /[␣⏎⇥]/.test(text) ? [text.replaceAll("␣", " ").replaceAll("⏎", "\n").replaceAll("⇥", "\t")] : text.split(/\s+/);
    lowered ??= tokens.map((token) => (token ?? "").toLowerCase());
    const masks = words.map((word) => Uint8Array.from(lowered, (token, id) => id > 0 && token.includes(word)));
    const from = where === "raised" ? sae.firing_heads : 0;
    const to = where === "firing" ? sae.firing_heads : sae.heads;
    return (latent) => masks.every((mask) => {
      for (let i = latent * sae.heads + from; i < latent * sae.heads + to; i++) if (mask[list.heads[i]]) return true;
      return false;
    });
  }

  function select() {
    const fires = FIRES[state.fires];
    const matches = matcher(state.q, state.in);
    const asked = /^#?\d+$/.test(state.q.trim()) ? Number(state.q.trim().replace("#", "")) : -1;
    const key = KEYS[state.sort];
    const found = [];
    for (let i = 0; i < sae.width; i++) if (i !== asked && fires(i) && (!matches || matches(i))) found.push(i);
    const sign = state.down ? -1 : 1;
    if (state.sort !== "index" || state.down) found.sort((a, b) => sign * (key(a) - key(b)) || a - b);
    if (asked >= 0 && asked < sae.width) found.unshift(asked);
    order = Uint32Array.from(found);
    const all = list.loaded < sae.width ? ` (${count(list.loaded)} of ${count(sae.width)} read so far)` : "";
    $("count").textContent = `${count(order.length)} of ${count(sae.width)} latents${all}`;
    $("none").hidden = order.length > 0 || all !== "";
  }

  const rowHeight = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));

  // Where the list is scrolled to. Rows that would be too high together share a lower box, whose scrolled share is then
  // that of the list; ``base`` is where in the box the row ``first``, a fraction, is drawn.
  function frame() {
    const height = rowHeight();
    const box = Math.min(order.length * height, TALLEST);
    const top = $("rows").getBoundingClientRect().top;
    const room = Math.max(0, box - innerHeight);
    const base = Math.min(Math.max(0, -top), room);
    const rows = Math.max(0, order.length - innerHeight / height); // that lie above when all is scrolled
    const perPixel = room ? rows / room : 1 / height;
    return { height, top, base, first: base * perPixel, perPixel };
  }

  const short = (text) => element("span", { class: "short soft" }, text); // in the place of a heading, on a narrow screen

  function row(latent, position) {
    const dead = isDead(latent);
    const link = element("a", { class: "row", href: `#${latent}` });
    link.append(
      element("span", { class: "id num" }, String(latent)),
      element("span", { class: "fires chips" }, ...(dead ? [element("span", { class: "dead" }, "never fired")] : [short("fires on "), ...firing(latent)])),
      element("span", { class: "raises chips" }, short("raises "), ...raised(latent)),
      element("span", { class: "often num right" }, share(list.fired[latent] / sae.tokens)),
      element("span", { class: "most num right" }, short("max "), dead ? "–" : number(list.largest[latent])),
      element("span", { class: "shape" }, spark(latent)),
    );
    return element("div", { role: "listitem", "aria-setsize": order.length, "aria-posinset": position + 1 }, link);
  }

  function draw() {
    if ($("list").hidden || !sae) return;
    const rows = $("rows");
    rows.style.height = `${Math.min(order.length * rowHeight(), TALLEST)}px`;
    const { height, base, first } = frame();
    const from = Math.max(0, Math.floor(first) - OVERSCAN);
    const to = Math.min(order.length, Math.ceil(first + innerHeight / height) + OVERSCAN);
    const wanted = new Set(order.subarray(from, to));
    for (const [latent, made] of shown) {
      if (!wanted.has(latent)) {
        made.remove();
        shown.delete(latent);
      }
    }
    cursor = Math.min(cursor, Math.max(0, order.length - 1));
    for (let position = from; position < to; position++) {
      const latent = order[position];
      if (!shown.has(latent)) {
        shown.set(latent, row(latent, position));
        rows.append(shown.get(latent));
      }
      const made = shown.get(latent);
      made.style.top = `${base + (position - first) * height}px`;
      made.firstChild.tabIndex = position === cursor || (position === from && (cursor < from || cursor >= to)) ? 0 : -1;
    }
  }

  function refresh() {
    select();
    for (const made of shown.values()) made.remove();
    shown.clear();
    draw();
  }

  function move(to) {
    cursor = Math.max(0, Math.min(order.length - 1, to));
    const { height, top, base, first, perPixel } = frame();
    const at = top + base + (cursor - first) * height;
    const hidden = Math.min(0, at - $("tools").getBoundingClientRect().bottom) + Math.max(0, at + height - innerHeight);
    if (hidden) scrollBy(0, hidden / height / perPixel);
    draw();
    shown.get(order[cursor])?.firstChild.focus({ preventScroll: true });
  }

  function showControls() {
    $("search").value = state.q;
    $("in").value = state.in;
    $("fires").value = state.fires;
    $("sort").value = `${state.sort}${state.down && " down"}`;
    for (const button of document.querySelectorAll(".head button")) {
      const mine = button.dataset.sort === state.sort;
      button.setAttribute("aria-pressed", mine);
      button.textContent = button.dataset.name + (mine ? (state.down ? " ↓" : " ↑") : "");
    }
  }

  // The list as the controls have it, also in the address.
  function change(wanted) {
    state = { ...state, ...wanted };
    cursor = 0;
    showControls();
    location.replace(written(state)); // `route` then finds nothing left to do
    scrollTo(0, 0);
    refresh();
  }

  // ---- a latent

  const tip = element("div", { id: "tip", role: "status", hidden: "" });

  function point(target, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = target.getClientRects()[0];
    if (!box) return;
    const left = Math.min(Math.max(4, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 4);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 4 ? box.bottom + 6 : above}px`;
  }

  const rowsOfFile = () => Math.max(1, Math.floor(sae.text_chunk / sae.context));
  const textFile = (row) => Math.floor(row / rowsOfFile());
  const startOf = (position) => Math.min(Math.max(0, position - sae.before), sae.context - sae.window);

  // An example: the row of text and the position in it that it is of, {offset in its window: activation}.
  function example({ row, position, active }, largest) {
    const start = startOf(position);
    const peak = position - start;
    const top = active.get(peak) ?? 0;
    const label = `Row ${row}, position ${position}, activation ${number(top)}. Arrow keys go from one active token to the next.`;
    const text = element("p", { class: "text", dir: "auto", tabindex: 0, role: "group", "aria-label": label });
    const from = (row % rowsOfFile()) * sae.context + start;
    const ids = texts.get(textFile(row)).subarray(from, from + sae.window);
    let blank = true;
    ids.forEach((id, offset) => {
      const token = tokens[id];
      const shownAs = nodes(pieces(token, true, blank));
      blank = /\s$/.test(token);
      if (!active.has(offset)) return text.append(...shownAs);
      const value = active.get(offset);
      const span = element("span", { class: offset === peak ? "act peak" : "act" }, ...shownAs);
      span.style.setProperty("--a", Math.min(1, Math.max(0.08, value / largest)).toFixed(3));
      span.dataset.tip = `${plain(token)}  ${number(value)}`;
      text.append(span);
    });
    const caption = element("figcaption", {}, `${number(top)} · row ${count(row)}, position ${count(position)}`);
    return element("figure", {}, text, caption);
  }

  function step(text, by) {
    const active = [...text.querySelectorAll(".act")];
    if (!active.length) return;
    const here = active.findIndex((span) => span.classList.contains("here"));
    const peak = active.findIndex((span) => span.classList.contains("peak"));
    const next = here < 0 ? Math.max(0, peak) : Math.min(active.length - 1, Math.max(0, here + by));
    active[here]?.classList.remove("here");
    active[next].classList.add("here");
    point(active[next], active[next].dataset.tip);
  }

  function bars(counts, end, largest) {
    const width = end / counts.length;
    const used = counts.subarray(0, Math.floor(largest / width) + 1);
    const tallest = Math.log1p(Math.max(...used));
    const made = Array.from(used, (n, i) => {
      const bar = element("i", { "data-tip": `${number(i * width)} to ${number((i + 1) * width)}: ${count(n)}` });
      bar.style.height = `${(100 * Math.log1p(n)) / tallest}%`;
      return bar;
    });
    const label = `Histogram of ${count(used.reduce((sum, n) => sum + n, 0))} activations from 0 to ${number(used.length * width)}`;
    return element("div", {},
      element("div", { class: "bars", role: "img", "aria-label": label }, ...made),
      element("div", { class: "ends num" }, element("span", {}, "0"), element("span", {}, number(used.length * width))));
  }

  // A list of things numbered from 1, 0 being none, and their values.
  function pairs(ids, values, made) {
    const items = [];
    ids.forEach((id, i) => { if (id) items.push(element("li", {}, ...made(id, values[i]))); });
    return items.length ? element("ol", { class: "pairs" }, ...items) : element("p", { class: "soft" }, "None.");
  }

  const logits = (ids, values) => pairs(ids, values, (id, value) => [
    element("span", { class: "chips" }, chip(id)), element("span", { class: "num" }, `${value > 0 ? "+" : ""}${number(value)}`)]);

  const neighbours = (ids, values, form) => pairs(ids, values, (id, value) => {
    const latent = id - 1;
    const link = element("a", { href: `#${latent}` }, element("span", { class: "num" }, String(latent)));
    const names = element("span", { class: "chips" });
    listPart(Math.floor(latent / sae.list_chunk)).then(() => names.append(...firing(latent, 3)), () => {});
    return [link, names, element("span", { class: "num" }, form(value))];
  });

  const keyFigure = (value, label) => element("li", {}, element("b", { class: "num" }, value), element("span", {}, label));

  // All of a latent, from the arrays of its chunk: figures, and groups of examples with what they are.
  function latentOf(chunk, index) {
    const slots = sae.top + sae.strata * sae.of_stratum;
    const of = (name, size = 1) => chunk[name].subarray(index * size, (index + 1) * size);
    const rows = of("row", slots), positions = of("position", slots), ends = chunk.ends;
    const examples = Array.from(rows, (row, slot) => {
      if (!row) return null; // numbered from 1
      const at = index * slots + slot;
      const active = new Map();
      for (let i = at ? ends[at - 1] : 0; i < ends[at]; i++) active.set(chunk.offset[i], chunk.activation[i]);
      return { row: row - 1, position: positions[slot], active };
    });
    const groups = [["Largest activations", examples.slice(0, sae.top).filter(Boolean)]];
    const [end] = of("end"), cells = of("cells", sae.strata);
    for (let stratum = 0; stratum < sae.strata; stratum++) {
      const first = sae.top + stratum * sae.of_stratum;
      const found = examples.slice(first, first + sae.of_stratum).filter(Boolean);
      const bottom = stratum === sae.strata - 1 ? 0 : end / 2 ** (stratum + 1);
      const which = found.length < cells[stratum] ? `${found.length} of ${count(cells[stratum])} passages, drawn at random` : "every passage";
      groups.push([`${number(bottom)} to ${number(end / 2 ** stratum)}`, found, which]);
    }
    return { of, end, groups, fired: of("fired")[0], largest: of("largest")[0], mean: of("mean")[0] };
  }

  function latentPage(latent, found) {
    const { of } = found;
    const at = order.indexOf(latent);
    const inOrder = at >= 0 && order.length > 1;
    const [before, after] = inOrder ? [order[at - 1], order[at + 1]] : [latent - 1, latent + 1];
    const moves = element("span", { class: "moves" });
    if (before >= 0) moves.append(element("a", { href: `#${before}`, id: "before", rel: "prev" }, "← previous"));
    if (after < sae.width) moves.append(element("a", { href: `#${after}`, id: "after", rel: "next" }, "next →"));
    const heading = element("h2", { tabindex: -1, id: "heading" }, `Latent ${latent}`);
    const title = element("div", { class: "title" }, heading, element("a", { href: written(state), id: "back" }, "all latents"), moves);

    const dead = found.fired === 0;
    const figures = [keyFigure(share(found.fired / sae.tokens), `of tokens: ${count(found.fired)} of ${count(sae.tokens)}`)];
    if (!dead) figures.push(keyFigure(number(found.largest), "largest activation"), keyFigure(number(found.mean), "mean when it fires"));
    sae.own.forEach((label, i) => figures.push(keyFigure(number(of("own", sae.own.length)[i]), label)));

    const made = found.groups.map(([label, group, which]) => {
      const small = which ? [" ", element("span", { class: "soft" }, which)] : [];
      const all = group.map((each) => example(each, found.largest));
      return all.length ? [element("h3", {}, label, ...small), ...all] : [];
    });
    if (dead) made[0] = [element("p", {}, `It fired on none of ${count(sae.tokens)} tokens.`)];
    const best = element("div", { class: "best" }, ...made[0]);
    const strata = element("div", { class: "strata" }, ...made.slice(1).flat());

    const side = element("div", { class: "side" });
    if (!dead) side.append(element("h3", {}, "Activations ", element("span", { class: "soft" }, "counts on a log scale")), bars(of("histogram", sae.bins), found.end, found.largest));
    side.append(
      element("div", { class: "two" },
        element("div", {}, element("h3", {}, "Raises logits"), logits(of("promoted", sae.logits), of("promoted_logit", sae.logits))),
        element("div", {}, element("h3", {}, "Lowers logits"), logits(of("suppressed", sae.logits), of("suppressed_logit", sae.logits)))),
      element("h3", {}, "Nearest ", element("span", { class: "soft" }, "cosine of decoder rows")),
      neighbours(of("near", sae.related), of("near_cosine", sae.related), number),
      element("h3", {}, "Fires together with ", element("span", { class: "soft" }, "both, of tokens with either")),
      neighbours(of("together", sae.related), of("together_share", sae.related), share));
    return [title, element("ul", { class: "key" }, ...figures), element("div", { class: "latent" }, best, side, strata)];
  }

  let asked = null;
  async function showLatent(latent) {
    asked = latent;
    const part = Math.floor(latent / sae.chunk);
    const path = `data/latents-${part}.js`;
    let found;
    try {
      await load(path);
      found = latentOf(chunks.get(part), latent - part * sae.chunk);
      const files = new Set(found.groups.flatMap(([, group]) => group.map(({ row }) => textFile(row))));
      await Promise.all(Array.from(files, (file) => load(`../../text-${file}.js`)));
    } catch (error) {
      return failed(error);
    }
    if (asked !== latent) return; // another was asked for since
    const view = $("latent");
    view.replaceChildren(...latentPage(latent, found));
    if (!$("list").hidden) listScroll = scrollY;
    $("list").hidden = true;
    view.hidden = false;
    document.title = `${latent} · ${sae.name}`;
    scrollTo(0, 0);
    $("heading").focus({ preventScroll: true });
    for (const kept of chunks.keys()) { // of the last few alone
      if (chunks.size <= 8 || kept === part) continue;
      chunks.delete(kept);
      loading.delete(`data/latents-${kept}.js`);
    }
  }

  function showList(wanted) {
    asked = null;
    const same = written(wanted) === written(state) && order.length > 0;
    state = wanted;
    const from = Number($("latent").dataset.latent ?? -1);
    const back = !$("latent").hidden;
    $("latent").hidden = true;
    $("list").hidden = false;
    document.title = sae.name;
    showControls();
    if (!same) refresh();
    if (back) {
      scrollTo(0, same ? listScroll : 0);
      draw();
      const at = order.indexOf(from);
      if (at >= 0) move(at);
    }
    readList();
  }

  let reading = null;
  async function readAll() {
    for (let number = 0; number * sae.list_chunk < sae.width; number++) {
      await listPart(number);
      if (number === 0 || (number + 1) * sae.list_chunk >= sae.width || number % 4 === 3) if (!$("list").hidden) refresh();
    }
    select();
  }
  function readList() {
    reading ??= readAll().catch(failed);
  }

  function route() {
    tip.hidden = true;
    $("problem").replaceChildren();
    const latent = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : null;
    if (latent !== null && latent < sae.width) {
      $("latent").dataset.latent = latent;
      showLatent(latent);
    } else showList(latent === null ? read(location.hash) : { ...DEFAULTS });
  }

  // ---- keys and pointer

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    const inList = !$("list").hidden;
    const key = event.key;
    if (typing) {
      if (key === "Escape") event.target.blur();
      else if (event.target.id === "search" && (key === "ArrowDown" || key === "Enter") && order.length) move(0);
      else return;
      return event.preventDefault();
    }
    const text = event.target.closest?.(".text");
    if (text && (key === "ArrowLeft" || key === "ArrowRight")) {
      step(text, (key === "ArrowRight" ? 1 : -1) * (getComputedStyle(text).direction === "rtl" ? -1 : 1));
    } else if (key === "/") {
      if (!inList) location.hash = written(state);
      showList(state);
      $("search").focus();
      $("search").select();
    } else if (inList && (key === "j" || key === "ArrowDown")) {
      const focused = document.activeElement?.classList.contains("row");
      if (key === "ArrowDown" && !focused) return;
      move(focused ? cursor + 1 : cursor);
    } else if (inList && (key === "k" || key === "ArrowUp")) {
      if (key === "ArrowUp" && !document.activeElement?.classList.contains("row")) return;
      move(cursor - 1);
    } else if (inList && (key === "Home" || key === "End") && document.activeElement?.classList.contains("row")) {
      move(key === "Home" ? 0 : order.length - 1);
    } else if (!inList && (key === "j" || key === "ArrowRight")) $("after")?.click();
    else if (!inList && (key === "k" || key === "ArrowLeft")) $("before")?.click();
    else if (!inList && (key === "u" || key === "Escape")) $("back").click();
    else return;
    event.preventDefault();
  }

  function listen() {
    document.body.append(tip);
    addEventListener("hashchange", route);
    addEventListener("keydown", onKey);
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(); });
    };
    addEventListener("scroll", () => { tip.hidden = true; later(); }, { passive: true });
    addEventListener("resize", later);
    document.addEventListener("mouseover", (event) => {
      const target = event.target.closest?.("[data-tip]");
      if (target) point(target, target.dataset.tip);
      else tip.hidden = true;
    });
    document.addEventListener("focusin", (event) => {
      if (event.target.matches?.(".text:focus-visible")) step(event.target, 0);
    });
    document.addEventListener("focusout", (event) => {
      tip.hidden = true;
      event.target.querySelector?.(".here")?.classList.remove("here");
    });
    $("form").addEventListener("submit", (event) => event.preventDefault());
    $("search").addEventListener("input", (event) => change({ q: event.target.value }));
    $("in").addEventListener("change", (event) => change({ in: event.target.value }));
    $("fires").addEventListener("change", (event) => change({ fires: event.target.value }));
    $("sort").addEventListener("change", (event) => {
      const [sort, down = ""] = event.target.value.split(" ");
      change({ sort, down });
    });
    for (const button of document.querySelectorAll(".head button")) {
      button.addEventListener("click", () => {
        const sort = button.dataset.sort;
        change({ sort, down: sort === state.sort ? (state.down ? "" : "down") : sort === "index" ? "" : "down" });
      });
    }
    $("rows").addEventListener("focusin", (event) => {
      const at = order.indexOf(Number(event.target.getAttribute("href")?.slice(1)));
      if (at >= 0) cursor = at;
    });
  }

  Promise.all([load("data/facts.js"), load("../../vocabulary.js")]).then(() => {
    listen();
    route();
  }).catch(failed);
})();
