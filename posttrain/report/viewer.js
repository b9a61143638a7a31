// The viewer of samples: filters, a list by pages, one sample token by token, one prompt over training.
"use strict";
(async () => {
  const place = document.getElementById("viewer"), PAGE = 12;

  // -- data: gzip of (length of JSON, JSON, numbers of pieces, square roots of nats, flags) --------
  const packed = atob(document.getElementById("packed-samples").textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const columns = data.columns, count = columns.run.length;
  const starts = new Uint32Array(count + 1);
  for (let i = 0; i < count; i++) starts[i + 1] = starts[i] + columns.count[i];
  const total = starts[count], from = 4 + length;
  const pieceOf = new Uint32Array(buffer, from, total);
  const roots = new Uint8Array(buffer, from + 4 * total, total);
  const flags = new Uint8Array(buffer, from + 5 * total, total);

  const nats = (t) => data.most_nats * (roots[t] / 255) ** 2;
  const texts = new Array(count);
  function text(i) {
    if (texts[i] === undefined) {
      if (!columns.count[i]) texts[i] = columns.text[i];
      else {
        let said = "";
        for (let t = starts[i]; t < starts[i + 1]; t++) said += data.pieces[pieceOf[t]];
        texts[i] = said;
      }
    }
    return texts[i];
  }
  const figure = (v) => v === null || v === undefined ? "–" : typeof v === "number" ? String(+v.toPrecision(4)) : String(v);
  const right = (v) => v === null ? "not judged" : v ? "right" : "wrong";

  // -- elements: all text goes in as text ----------------------------------------------------------
  function el(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined));
    return node;
  }

  // -- filters -------------------------------------------------------------------------------------
  const unique = (name) => [...new Set(columns[name])];
  function select(name, label, options) {
    const made = el("select", { name }, el("option", { value: "" }, "all"),
      options.map(([value, said]) => el("option", { value }, said)));
    return el("label", {}, label, made);
  }
  const field = (name, label, type, more = {}) => el("label", { class: type === "search" ? "grow" : null }, label, el("input", { name, type, ...more }));
  const steps = unique("step").sort((a, b) => a - b).map((s) => [s, s]);
  const prompts = data.prompts.map(([where, said], p) => [p, (where ? where.split("/").pop() + " " : "") + said.replace(/<\|[^|]*\|>/g, " ").replace(/\s+/g, " ").slice(-70)]);
  const form = el("form", { onsubmit: (e) => e.preventDefault(), oninput: () => changed(), onreset: () => setTimeout(changed) },
    data.runs.length > 1 ? select("run", "run", data.runs.map((r, n) => [n, r])) : null,
    unique("held_out").length > 1 ? select("held_out", "kind", [["0", "training"], ["1", "held out"]]) : null,
    select("step", "step", steps), select("prompt", "prompt", prompts),
    field("low", "reward from", "number", { step: "any" }), field("high", "to", "number", { step: "any" }),
    select("finish", "end", unique("finish").map((f) => [f, { stop: "stopped", length: "cut at the limit", repeat: "repeats itself" }[f] || f])),
    select("correct", "answer", unique("correct").map((c) => [String(c), right(c)])),
    field("find", "search in prompt and answer", "search", { placeholder: "text" }),
    el("button", { type: "reset" }, "clear"));
  const list = el("div", { id: "list", class: "wide" }), pager = el("div", { class: "pager", "aria-live": "polite" });
  const shown = el("div", { id: "sample" });
  place.append(form, pager, list, shown);

  let found = [], at = 0, sort = "step", down = true, open = null;
  const values = () => Object.fromEntries(new FormData(form));

  function matches() {
    const f = values(), find = f.find.toLowerCase();
    const equal = ["run", "held_out", "step", "prompt", "finish", "correct"].filter((n) => f[n]);
    const low = f.low === "" ? null : +f.low, high = f.high === "" ? null : +f.high;
    const inPrompt = find ? data.prompts.map((p) => p.join(" ").toLowerCase().includes(find)) : null;
    const kept = [];
    for (let i = 0; i < count; i++) {
      if (!equal.every((n) => String(columns[n][i]) === f[n])) continue;
      const reward = columns.reward[i];
      if (low !== null && !(reward !== null && reward >= low)) continue;
      if (high !== null && !(reward !== null && reward <= high)) continue;
      if (find && !inPrompt[columns.prompt[i]] && !text(i).toLowerCase().includes(find)) continue;
      kept.push(i);
    }
    if (sort) {
      const column = columns[sort], sign = down ? -1 : 1;
      const key = (i) => column[i] === null ? -Infinity : +column[i];
      kept.sort((a, b) => sign * (key(a) - key(b)) || columns.held_out[a] - columns.held_out[b] || a - b);
    }
    return kept;
  }

  function changed() {
    found = matches();
    at = 0;
    remember();
    page();
    open = found.includes(open) ? open : null;
    if (values().prompt) sideBySide(+values().prompt); else if (open !== null) show(open, false); else shown.replaceChildren();
  }

  // -- the list ------------------------------------------------------------------------------------
  const HEADS = [["step", "step"], ["reward", "reward"], ["correct", "answer"], ["length", "tokens"], ["finish", "end"], [null, "text"]];
  function page() {
    const last = Math.min(at + PAGE, found.length);
    const of = data.total > count ? ` (of ${data.total.toLocaleString()} that were kept: whole iterations, evenly spaced)` : "";
    const to = (n) => () => { at = n; page(); };
    pager.replaceChildren(
      el("span", {}, `${found.length.toLocaleString()} of ${count.toLocaleString()} samples${of}` + (found.length ? `; ${at + 1} to ${last}` : "")),
      el("button", { type: "button", onclick: to(at - PAGE), disabled: at ? null : "" }, "back"),
      el("button", { type: "button", onclick: to(at + PAGE), disabled: last < found.length ? null : "" }, "next"));
    const head = el("tr", {}, HEADS.map(([name, said]) => {
      const arrow = name && sort === name ? (down ? " ↓" : " ↑") : "";
      const by = () => { down = sort === name ? !down : true; sort = name; found = matches(); at = 0; page(); };
      return el("th", name && name !== "finish" ? { onclick: by, title: "sort" } : {}, said + arrow);
    }));
    const rows = found.slice(at, last).map((i) => el("tr", {
      "data-i": i, tabindex: 0, class: i === open ? "open" : null, onclick: () => show(i), onkeydown: (e) => { if (e.key === "Enter") show(i); },
    }, el("td", {}, `${columns.step[i]}` + (columns.held_out[i] ? " held out" : "") + (data.runs.length > 1 ? ", " + data.runs[columns.run[i]] : "")), el("td", {}, columns.reward[i] === null ? "unscored" : figure(columns.reward[i])),
      el("td", {}, right(columns.correct[i])), el("td", {}, figure(columns.length[i])), el("td", {}, figure(columns.finish[i])),
      el("td", { class: "said" }, text(i).slice(0, 300).replace(/\s+/g, " "))));
    list.replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
  }

  // -- one sample ----------------------------------------------------------------------------------
  function hits(said) {  // marks of what is searched, as [start, end)
    const find = values().find.toLowerCase(), lower = said.toLowerCase(), all = [];
    for (let a = find ? lower.indexOf(find) : -1; a >= 0; a = lower.indexOf(find, a + find.length)) all.push([a, a + find.length]);
    return all;
  }
  function marked(said) {
    const parts = [];
    let done = 0;
    for (const [a, b] of hits(said)) { parts.push(said.slice(done, a), el("mark", {}, said.slice(a, b))); done = b; }
    return [...parts, said.slice(done)];
  }
  function tokens(i) {
    if (!columns.count[i]) return el("div", { class: "text" }, marked(columns.text[i]));
    const box = el("div", { class: "tokens" }), marks = hits(text(i));
    let where = 0;
    for (let t = starts[i]; t < starts[i + 1]; t++) {
      const piece = data.pieces[pieceOf[t]], isOwn = flags[t] & 2, end = where + piece.length;
      const hit = marks.some(([a, b]) => where < b && end > a && piece);
      const span = el(hit ? "mark" : "span", { "data-t": t, class: (flags[t] & 1 ? "trained" : "") + (isOwn ? "" : " other") }, piece);
      if (isOwn && !hit) span.style.backgroundColor = heat(nats(t));
      box.append(span);
      where = end;
    }
    box.addEventListener("mouseover", (e) => {
      const t = e.target.dataset.t;
      if (t === undefined || e.target.title) return;
      const p = `p = ${Math.exp(-nats(t)).toPrecision(2)} (−${nats(t).toPrecision(2)} nats)`;
      e.target.title = `${JSON.stringify(e.target.textContent)}\n${flags[t] & 2 ? p : "written by the environment"}\n${flags[t] & 1 ? "trained" : "not trained"}`;
    });
    return box;
  }
  const heat = (n) => n < 0.02 ? "transparent" : `rgb(232 93 20 / ${Math.min(0.75, 0.12 + n / 6).toFixed(2)})`;

  function facts(i, more = null) {
    const c = columns, parts = Object.entries(c.parts[i] || {}).map(([k, v]) => [k.split(".").pop(), v === null ? "unscored" : figure(v)]);
    const known = more === null ? [["reward", c.reward[i] === null ? "unscored" : figure(c.reward[i])], ["answer", right(c.correct[i])], ["tokens", c.length[i]], ["end", c.finish[i]]] : [["step", c.step[i] + (c.held_out[i] ? ", held out" : "")], ["reward", c.reward[i] === null ? "unscored" : figure(c.reward[i])],
      ...(parts.length > 1 ? parts : []), ["answer", right(c.correct[i])], ["advantage", c.advantage[i] === null ? null : figure(c.advantage[i])],
      ["tokens", c.length[i]], ["end", c.finish[i]], ["run", data.runs.length > 1 ? data.runs[c.run[i]] : null],
      ["problems", c.problems[i].join("; ") || null], ...more];
    return el("dl", {}, known.filter(([, v]) => v !== null).map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, String(v)))));
  }
  function legend() {
    const scale = el("span", { class: "scale" }), ends = [0.05, 1, 2, 4].map(heat);
    scale.style.background = `linear-gradient(90deg, ${ends.join(", ")})`;
    return el("p", { class: "note" }, "p = 1 ", scale, " p = 0.02 and less; ", el("span", { class: "trained" }, "underlined"), ": trained");
  }
  function show(i, scroll = true) {
    open = i;
    remember();
    for (const row of list.querySelectorAll("tr[data-i]")) row.classList.toggle("open", +row.dataset.i === i);
    const prompt = columns.prompt[i], [where, said] = data.prompts[prompt];
    const over = el("button", { type: "button", onclick: () => { form.elements.prompt.value = prompt; changed(); shown.scrollIntoView(); } }, "this prompt over training");
    shown.replaceChildren(el("div", { class: "card" }, facts(i, [["prompt", where]]), over,
      said ? [el("h3", {}, "Prompt"), el("div", { class: "text" }, marked(said))] : null,
      el("h3", {}, "Answer"), tokens(i), columns.count[i] ? legend() : null));
    if (scroll) shown.scrollIntoView({ block: "nearest" });
  }

  // -- one prompt over training --------------------------------------------------------------------
  function sideBySide(prompt) {
    const [where, said] = data.prompts[prompt], groups = new Map();
    for (const i of found) {
      const key = [columns.run[i], columns.step[i], columns.held_out[i]].join();
      groups.set(key, [...(groups.get(key) || []), i]);
    }
    const order = [...groups.values()].sort((a, b) => columns.step[a[0]] - columns.step[b[0]]);
    const cards = order.slice(0, 40).map((group) => {
      const scored = group.map((i) => columns.reward[i]).filter((r) => r !== null), i = group[0];
      const mean = scored.length ? figure(scored.reduce((a, b) => a + b) / scored.length) : "unscored";
      const title = `Step ${columns.step[i]}` + (columns.held_out[i] ? ", held out" : "") + (data.runs.length > 1 ? `, ${data.runs[columns.run[i]]}` : "");
      return el("div", { class: "card" }, el("h3", {}, title), el("p", { class: "note" }, group.length === 1 ? `1 answer, reward ${mean}` : `${group.length} answers, mean reward ${mean}`),
        group.slice(0, 16).map((k) => [facts(k), tokens(k)]));
    });
    shown.replaceChildren(el("h3", {}, `One prompt over training${where ? ": " + where : ""}`),
      said ? el("div", { class: "text" }, marked(said)) : "", found.some((i) => columns.count[i]) ? legend() : "", el("div", { class: "side" }, cards));
  }

  // -- what was chosen outlives a reload of a run that goes on ------------------------------------
  const key = "posttrain " + location.pathname;
  function remember() { try { sessionStorage.setItem(key, JSON.stringify({ ...values(), open })); } catch { /* not allowed here */ } }
  try {
    const { open: before = null, ...chosen } = JSON.parse(sessionStorage.getItem(key) || "{}");
    for (const [name, value] of Object.entries(chosen)) if (form.elements[name]) form.elements[name].value = value;
    open = before;
  } catch { /* nothing to remember */ }
  changed();
  document.body.dataset.ready = "yes";
})();
