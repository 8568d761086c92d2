// The dashboard: the live feed by fetch(), with the token in a header, and the figures of status.json.
// Values of rows are hostile text: they become text nodes, and nothing here makes markup of a string.
"use strict";

const find = (id) => document.getElementById(id);

/** Make an element; children are elements or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Tell those who hear the page, without a flood: what is said last counts. */
function say(text) {
  find("spoken").textContent = text;
}

function setState(element, tone, text) {
  if (element.textContent !== text) element.textContent = text;
  element.dataset.tone = tone;
}

// ---- Numbers and times as text

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

function count(number) {
  return number === null || number === undefined ? "–" : whole.format(number);
}

/** So many of something, in the plural where it is due. */
function many(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** A rate of few is told with a decimal, one of many without. */
function rate(number) {
  if (number === null || number === undefined) return "–";
  return number < 10 ? (Math.round(number * 10) / 10).toString() : whole.format(number);
}

function bytes(number) {
  if (number === null || number === undefined) return "–";
  let unit = 0;
  while (number >= 1024 && unit < UNITS.length - 1) { number /= 1024; unit += 1; }
  return `${unit && number < 100 ? number.toFixed(1) : whole.format(number)} ${UNITS[unit]}`;
}

function seconds(number) {
  if (number === null || number === undefined) return "–";
  if (number < 0.00005) return "0 s";
  if (number < 0.0995) return `${(number * 1000).toFixed(number < 0.00995 ? 1 : 0)} ms`;
  if (number < 99.5) return `${number.toFixed(number < 9.95 ? 1 : 0)} s`;
  if (number < 5400) return `${Math.round(number / 60)} min`;
  if (number < 172800) return `${Math.round(number / 3600)} h`;
  return `${Math.round(number / 86400)} days`;
}

/** As `seconds`, of what lasts: nobody counts its tenths. */
function lasting(number) {
  return number < 99.5 ? `${Math.floor(number)} s` : seconds(number);
}

const dayOf = new Intl.DateTimeFormat("en-CA", { dateStyle: "short" });
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3 });
const shortClock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });

function timeOf(text) {
  const date = new Date(text);
  return Number.isNaN(date.getTime()) ? String(text) : clock.format(date);
}

function moment(text) {
  if (!text) return "–";
  const date = new Date(text);
  const today = dayOf.format(date) === dayOf.format(new Date());
  return today ? shortClock.format(date) : `${dayOf.format(date)} ${shortClock.format(date)}`;
}

// ---- JSON with its numbers as they were written: a bigint is no double

class Exact {
  constructor(source) { this.source = source; }
}

function parseExact(text) {
  return JSON.parse(text, (_key, value, context) =>
    typeof value === "number" ? new Exact(context?.source ?? String(value)) : value);
}

function number(exact) {
  return exact instanceof Exact ? Number(exact.source) : exact;
}

/** A value as text: strings as they are on the outside, JSON within. */
function textOf(value, inner = false) {
  if (value === null) return "null";
  if (value instanceof Exact) return value.source;
  if (typeof value === "string") return inner ? JSON.stringify(value) : value;
  if (Array.isArray(value)) return `[${value.map((one) => textOf(one, true)).join(", ")}]`;
  if (typeof value === "object") {
    const pairs = Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${textOf(one, true)}`);
    return `{${pairs.join(", ")}}`;
  }
  return String(value);
}

// ---- The token: of this tab, from the fragment or typed in

const TOKEN = "walstream.token";

const tokens = {
  value: null,

  load() {
    const fragment = new URLSearchParams(location.hash.slice(1));
    const given = fragment.get("token");
    if (given !== null) {
      fragment.delete("token");
      replaceFragment(fragment);
      this.keep(given);
      return;
    }
    try { this.value = sessionStorage.getItem(TOKEN); } catch { /* not allowed here: it is asked for */ }
  },

  keep(value) {
    this.value = value || null;
    try {
      if (value) sessionStorage.setItem(TOKEN, value);
      else sessionStorage.removeItem(TOKEN);
    } catch { /* it lasts until the page is left */ }
  },

  headers() {
    return this.value ? { Authorization: `Bearer ${this.value}` } : {};
  },
};

function replaceFragment(parameters) {
  const text = parameters.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
}

// ---- Server-Sent Events by fetch()

/** Splits what comes into events, as the HTML standard says. */
class EventParser {
  constructor() { this.rest = ""; this.afterReturn = false; this.clear(); this.lastId = ""; this.retry = null; }

  clear() { this.type = ""; this.data = []; }

  feed(text) {
    const events = [];
    if (this.afterReturn && text.startsWith("\n")) text = text.slice(1);
    if (text) this.afterReturn = text.endsWith("\r");
    const lines = (this.rest + text).split(/\r\n|\n|\r/);
    this.rest = lines.pop();
    for (const line of lines) this.line(line, events);
    return events;
  }

  line(line, events) {
    if (line === "") {
      if (this.data.length) events.push({ type: this.type || "message", data: this.data.join("\n"), id: this.lastId });
      this.clear();
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const name = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (name === "data") this.data.push(value);
    else if (name === "event") this.type = value;
    else if (name === "id" && !value.includes("\0")) this.lastId = value;
    else if (name === "retry" && /^\d+$/.test(value)) this.retry = Number(value);
  }
}

const SILENCE_MS = 60_000; // several heartbeats: who says nothing for so long is gone
const LONGEST_PAUSE_MS = 15_000;
const SOON_MS = 250;

/**
 * The stream of changes: connects, resumes where it was, and says how it stands.
 * `onEvents` gets lists, `onState` a tone and a sentence, `onRefused` what no retry mends.
 */
class Stream {
  constructor({ onEvents, onState, onRefused }) {
    Object.assign(this, { onEvents, onState, onRefused });
    this.run = null;
    this.wake = null;
  }

  /** Begin anew, with other parameters. */
  begin(query) {
    this.stop();
    const run = { query, lastId: "", retryMs: 2000, failures: 0, aborting: null, over: false };
    this.run = run;
    this.keepOn(run);
  }

  stop() {
    if (this.run) { this.run.over = true; this.run.aborting?.abort(); }
    this.run = null;
    this.wake?.();
  }

  /** Try now, if it waits to. */
  hurry() { this.wake?.(); }

  async keepOn(run) {
    while (!run.over) {
      this.onState("busy", run.lastId ? "reconnecting" : "connecting");
      let pause = null;
      try {
        pause = await this.once(run);
      } catch {
        if (run.over) return;
      }
      if (run.over) return;
      if (pause === "refused") { this.run = null; return; }
      await this.pause(run, pause ?? this.backoff(run));
    }
  }

  backoff(run) {
    run.failures += 1;
    if (run.failures === 1) return SOON_MS;
    const longest = Math.min(run.retryMs * 2 ** (run.failures - 2), LONGEST_PAUSE_MS);
    return longest * (0.75 + Math.random() / 2);
  }

  async pause(run, ms) {
    const until = performance.now() + ms;
    for (let rest = ms; rest > 0 && !run.over; rest = until - performance.now()) {
      const sentence = rest > 1000 ? `cut off, again in ${Math.ceil(rest / 1000)} s` : "cut off, connecting again";
      this.onState("warn", sentence);
      const woken = await new Promise((resolve) => {
        const timer = setTimeout(() => resolve(false), Math.min(rest, 1000));
        this.wake = () => { clearTimeout(timer); resolve(true); };
      });
      this.wake = null;
      if (woken) return;
    }
  }

  /** One connection; returns how long to pause, or "refused". */
  async once(run) {
    run.aborting = new AbortController();
    let silence = setTimeout(() => run.aborting.abort(), SILENCE_MS);
    try {
      const headers = { Accept: "text/event-stream", ...tokens.headers() };
      if (run.lastId) headers["Last-Event-ID"] = run.lastId;
      const answer = await fetch(`changes?${run.query}`, {
        headers, cache: "no-store", credentials: "omit", signal: run.aborting.signal,
      });
      if (!answer.ok) return await this.refused(answer);
      const parser = new EventParser();
      const decoder = new TextDecoder();
      const reader = answer.body.getReader();
      for (;;) {
        const { value, done } = await reader.read();
        if (run.over) return 0;
        if (done) return undefined;
        clearTimeout(silence);
        silence = setTimeout(() => run.aborting.abort(), SILENCE_MS);
        const events = parser.feed(decoder.decode(value, { stream: true }));
        if (events.length === 0) continue;
        run.failures = 0;
        run.retryMs = parser.retry ?? run.retryMs;
        run.lastId = events.at(-1).id || run.lastId;
        this.onEvents(events);
        const end = events.find((event) => event.type === "end");
        if (end && reasonOf(end) === "expired") { this.onRefused(401, "The token has expired.", ""); return "refused"; }
      }
    } finally {
      clearTimeout(silence);
      run.aborting.abort();
    }
  }

  async refused(answer) {
    const { error, hint } = await explained(answer);
    if (answer.status === 429 || answer.status >= 500) {
      this.onState("warn", error || `the server answers ${answer.status}`);
      const after = Number(answer.headers.get("Retry-After"));
      return after > 0 ? after * 1000 : undefined;
    }
    this.onRefused(answer.status, error, hint);
    return "refused";
  }
}

function reasonOf(event) {
  try { return JSON.parse(event.data).reason; } catch { return ""; }
}

async function explained(answer) {
  try {
    const { error = "", hint = "" } = await answer.json();
    return { error, hint };
  } catch {
    return { error: `the server answers ${answer.status}`, hint: "" };
  }
}

// ---- The feed

const feed = {
  list: find("feed"),
  waiting: [],        // what has come and is not shown yet
  shown: 0,
  dropped: 0,         // what came while paused and did not fit
  paused: false,
  frame: 0,
  heard: 0,
  spokenAt: 0,

  get keep() { return Number(find("keep").value); },

  take(items) {
    this.waiting.push(...items);
    if (this.waiting.length > this.keep) {
      const over = this.waiting.length - this.keep;
      this.waiting.splice(0, over);
      if (this.paused) this.dropped += over;
    }
    this.heard += items.length;
    if (this.paused) this.tell();
    else if (!this.frame) this.frame = requestAnimationFrame(() => this.show());
  },

  show() {
    this.frame = 0;
    if (this.paused || this.waiting.length === 0) return;
    const list = this.list;
    const fresh = document.createDocumentFragment();
    const made = this.waiting.splice(0).map((item) => item.reset ? makeReset(item) : makeChange(item));
    for (const element of made.reverse()) fresh.append(element);
    const held = list.scrollTop > 0 ? list.scrollHeight : null;
    list.prepend(fresh);
    while (list.children.length > this.keep) list.lastElementChild.remove();
    if (held !== null) list.scrollTop += list.scrollHeight - held; // who reads further down stays there
    this.tell();
    this.speak();
  },

  /** Say how many have come, at most every few seconds. */
  speak() {
    const now = performance.now();
    if (now - this.spokenAt < 5000) return;
    this.spokenAt = now;
    say(many(this.heard, "new change"));
    this.heard = 0;
  },

  tell() {
    const shown = this.list.children.length;
    find("feed-empty").hidden = shown > 0;
    const parts = [`${count(shown)} shown`];
    if (this.paused) parts.push(`${count(this.waiting.length)} waiting`);
    if (this.dropped) parts.push(`${count(this.dropped)} not kept`);
    find("feed-count").textContent = parts.join(", ");
  },

  pause(yes) {
    this.paused = yes;
    const button = find("pause");
    button.setAttribute("aria-pressed", String(yes));
    button.textContent = yes ? "Continue" : "Pause";
    if (!yes) { this.show(); this.dropped = 0; }
    this.tell();
  },

  clear() {
    this.list.replaceChildren();
    this.waiting = [];
    this.dropped = 0;
    this.tell();
  },
};

function makeReset({ reason, since, begins }) {
  const told = [reason, since && `asked for ${since}`, begins && `what is kept begins at ${begins}`];
  return make("li", { class: "reset", "data-op": "reset" },
    make("span", { class: "op", "data-op": "reset" }, "reset"),
    make("span", {}, "Changes before this line are not all here: ", told.filter(Boolean).join("; "), "."));
}

function makeChange(change) {
  const { operation, table } = change;
  const leaving = change.leaving === true || (operation === "update" && change.row === null);
  const summary = make("summary", {},
    make("time", { datetime: change.commit_time, title: change.commit_time }, timeOf(change.commit_time)),
    make("span", { class: "op", "data-op": leaving ? "leaving" : operation }, leaving ? "leaving" : operation),
    make("span", { class: "table", title: change.root ? `a partition of ${change.root}` : null }, `${change.schema}.${table}`),
    preview(change));
  const details = make("details", {}, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(inside(change));
  });
  return make("li", { class: "change new", "data-id": change.id, "data-op": operation }, details);
}

const PREVIEW_COLUMNS = 12;
const PREVIEW_LENGTH = 80;

/** In a line: of an update what it changed, of others what the row has. */
function preview({ operation, row, identity }) {
  const line = make("span", { class: "values" });
  let columns = Object.entries(row ?? identity ?? {});
  const changed = row && identity ? columns.filter(([name, value]) => Object.hasOwn(identity, name) && textOf(identity[name]) !== textOf(value)) : [];
  if (operation === "update" && changed.length) {
    const key = columns[0];
    columns = changed.includes(key) ? changed : [key, ...changed];
  }
  for (const [name, value] of columns.slice(0, PREVIEW_COLUMNS)) {
    const shown = make("span", {});
    if (changed.some(([one]) => one === name)) shown.append(make("i", {}, `${cut(textOf(identity[name]))} → `));
    shown.append(value === null ? make("i", {}, "null") : cut(textOf(value)));
    line.append(make("b", {}, name), shown);
  }
  return line;
}

function cut(text) {
  return text.length > PREVIEW_LENGTH ? `${text.slice(0, PREVIEW_LENGTH)}…` : text;
}

function inside(change) {
  const { row, identity, unchanged = [] } = change;
  const names = [...new Set([...Object.keys(row ?? {}), ...unchanged, ...Object.keys(identity ?? {})])];
  const head = make("tr", {}, make("th", { scope: "col" }, "Column"));
  if (identity) head.append(make("th", { scope: "col" }, row ? "Before" : "Identity"));
  if (row) head.append(make("th", { scope: "col" }, identity ? "After" : "Value"));
  const body = make("tbody", {});
  for (const name of names) {
    const line = make("tr", {}, make("th", { scope: "row" }, name));
    const differs = row && identity && Object.hasOwn(row, name) && Object.hasOwn(identity, name) && textOf(row[name]) !== textOf(identity[name]);
    if (identity) line.append(cell(identity, name, false));
    if (row) {
      const after = cell(row, name, unchanged.includes(name));
      if (differs) after.classList.add("changed");
      line.append(after);
    }
    body.append(line);
  }
  const facts = make("dl", {});
  for (const [name, value] of [["id", change.id], ["transaction", change.xid], ["commit LSN", change.commit_lsn], ["committed", change.commit_time], ["partition of", change.root]]) {
    if (value !== undefined && value !== null) facts.append(make("div", {}, make("dt", {}, name), make("dd", {}, textOf(value))));
  }
  const box = make("div", { class: "inside" });
  if (names.length) box.append(make("table", {}, make("thead", {}, head), body));
  box.append(facts);
  return box;
}

function cell(values, name, isUnchanged) {
  if (!Object.hasOwn(values, name)) return make("td", { class: "none" }, isUnchanged ? "unchanged, not sent" : "–");
  const value = values[name];
  return value === null ? make("td", { class: "none" }, "null") : make("td", {}, textOf(value));
}

const CHANGES = new Set(["insert", "update", "delete", "truncate", "read"]);

const link = {
  goal: null,

  events(events) {
    const shown = [];
    for (const event of events) {
      if (CHANGES.has(event.type)) {
        const change = parseExact(event.data);
        if (this.goal === null) noteTable(`${change.schema}.${change.table}`);
        shown.push(change);
      } else if (event.type === "reset") {
        shown.push({ reset: true, ...JSON.parse(event.data) });
        say("A reset: changes before it are not all here");
      } else if (event.type === "streaming") {
        this.goal = positionOf(JSON.parse(event.data).position);
      }
    }
    if (shown.length) feed.take(shown);
    const reached = positionOf(events.at(-1).id);
    if (this.goal === null || reached === null || reached >= this.goal) {
      this.goal = null;
      link.state("good", "live");
    } else {
      link.state("busy", "reading what was missed");
    }
  },

  state(tone, text) {
    const before = find("link").dataset.tone;
    setState(find("link"), tone, text);
    if (tone !== before && (tone === "good" || tone === "warn")) say(tone === "good" ? "Live" : "The connection is cut off");
  },
};

/** `0/16274F8:3` as a number that compares; null for none. A plain LSN is behind all that ends there. */
function positionOf(text) {
  const matched = /^([0-9A-F]+)\/([0-9A-F]+)(?::(\d+))?$/i.exec(text ?? "");
  if (!matched) return null;
  const ordinal = matched[3] === undefined ? (1n << 31n) - 1n : BigInt(matched[3]);
  return (BigInt(`0x${matched[1]}`) << 64n) + (BigInt(`0x${matched[2]}`) << 32n) + ordinal;
}

const stream = new Stream({
  onEvents: (events) => link.events(events),
  onState: (tone, text) => link.state(tone, text),
  onRefused(status, error, hint) {
    const sentence = [error, hint].filter(Boolean).join(" — ");
    link.state("bad", "not connected");
    if (status === 401) { noticeToken(sentence); return; }
    find("filter-error").textContent = sentence;
    find("filter-error").hidden = false;
  },
});

// ---- The filter: a form, kept in the fragment so that a page can be found again

const FIELDS = ["table", "where", "columns"];

function loadFilter() {
  const given = new URLSearchParams(location.hash.slice(1));
  const form = find("filter");
  for (const name of FIELDS) if (given.has(name)) form.elements[name].value = given.get(name);
  if (given.has("operations")) {
    const wanted = given.get("operations").split(",");
    for (const box of form.elements.operations) box.checked = wanted.includes(box.value);
  }
  form.elements.leaving.checked = given.get("leaving") === "true";
}

function applyFilter() {
  const form = find("filter");
  const wanted = [...form.elements.operations].filter((box) => box.checked).map((box) => box.value);
  find("filter-error").hidden = true;
  if (wanted.length === 0) {
    find("filter-error").textContent = "Choose at least one operation.";
    find("filter-error").hidden = false;
    return;
  }
  const query = new URLSearchParams({ table: form.elements.table.value.trim() });
  if (wanted.length < form.elements.operations.length) query.set("operations", wanted.join(","));
  for (const name of ["where", "columns"]) {
    const value = form.elements[name].value.trim();
    if (value) query.set(name, value);
  }
  if (form.elements.leaving.checked) query.set("leaving", "true");
  replaceFragment(query);
  const ago = Number(form.elements.since.value);
  if (ago) query.set("since", new Date(Date.now() - ago * 1000).toISOString());
  feed.clear();
  feed.list.classList.toggle("one-table", !/[*]/.test(query.get("table"))); // said above, not in each line
  link.goal = null;
  stream.begin(query.toString());
}

const tables = new Set();

function noteTable(name) {
  if (tables.has(name) || tables.size > 500) return;
  tables.add(name);
  find("tables").append(make("option", { value: name }));
}

// ---- Charts: of the last five minutes, in SVG of our own

const SVG = "http://www.w3.org/2000/svg";
const WINDOW_MS = 300_000;

class Chart {
  constructor(figure, names, format) {
    this.plot = figure.querySelector(".plot");
    this.summary = figure.querySelector(".summary");
    this.names = names;
    this.format = format;
    this.points = []; // [time in ms, value, value, ...]; a value is null where nothing is known
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", "0 0 1000 100");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("aria-hidden", "true");
    this.paths = ["grid", "area", ...names.map((_, index) => index ? "line second" : "line")].map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", name);
      this.svg.append(path);
      return path;
    });
    this.top = make("span", {});
    this.middle = make("span", {});
    this.plot.append(this.svg, this.top, this.middle);
  }

  add(time, ...values) {
    this.points.push([time, ...values]);
    while (this.points.length && this.points[0][0] < time - WINDOW_MS) this.points.shift();
    this.draw(time);
  }

  draw(now) {
    const known = this.points.flatMap((point) => point.slice(1)).filter((value) => value !== null);
    const highest = Math.max(0, ...known);
    const top = nice(highest);
    const x = (time) => (1000 * (1 - (now - time) / WINDOW_MS)).toFixed(1);
    const y = (value) => (100 - 88 * value / top).toFixed(2);
    const [grid, area, ...lines] = this.paths;
    grid.setAttribute("d", `M0 ${y(top)}H1000M0 ${y(top / 2)}H1000`);
    lines.forEach((line, index) => line.setAttribute("d", path(this.points, index + 1, x, y)));
    area.setAttribute("d", path(this.points, 1, x, y, true));
    this.label(this.top, top, y);
    this.label(this.middle, top / 2, y);
    const latest = this.points.at(-1)?.[1];
    this.summary.textContent = `Now ${this.format(latest)}; highest of five minutes ${this.format(highest)}`;
  }

  label(span, value, y) {
    span.textContent = this.format(value);
    span.style.top = `${y(value)}%`;
  }
}

/** The next of 1, 2, 5, 10, 20 ... */
function nice(value) {
  if (value <= 1) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

function path(points, index, x, y, closed = false) {
  let text = "";
  let begun = null;
  const end = (last) => { if (closed && begun !== null) text += `L${x(last)} 100L${x(begun)} 100Z`; begun = null; };
  let last = null;
  for (const point of points) {
    if (point[index] === null) { end(last); continue; }
    text += `${begun === null ? "M" : "L"}${x(point[0])} ${y(point[index])}`;
    begun ??= point[0];
    last = point[0];
  }
  end(last);
  return text;
}

const rates = new Chart(find("rate-chart"), ["received", "delivered"], rate);
const lags = new Chart(find("lag-chart"), ["lag"], seconds);

// ---- The figures

const POLL_MS = 1000;
const POLL_FAILED_MS = 3000;

const figures = {
  before: null,
  timer: 0,
  asking: null,
  refused: false,

  begin() {
    this.asking?.abort();
    clearTimeout(this.timer);
    this.before = null;
    this.refused = false;
    this.poll();
  },

  async poll() {
    const asking = new AbortController();
    this.asking = asking;
    const timeout = setTimeout(() => asking.abort(), 10_000);
    let pause = POLL_MS;
    try {
      const answer = await fetch("status.json", {
        headers: tokens.headers(), cache: "no-store", credentials: "omit", signal: asking.signal,
      });
      if (answer.ok) this.show(await answer.json());
      else if (answer.status === 401 || answer.status === 403) { await this.refuse(answer); return; }
      else pause = POLL_FAILED_MS;
    } catch {
      if (asking !== this.asking) return; // begun anew meanwhile
      pause = POLL_FAILED_MS;
      setState(find("phase"), "bad", "no answer");
      rates.add(Date.now(), null, null);
      lags.add(Date.now(), null);
      this.before = null;
    } finally {
      clearTimeout(timeout);
    }
    if (asking === this.asking) this.timer = setTimeout(() => this.poll(), pause);
  },

  async refuse(answer) {
    const { error, hint } = await explained(answer);
    this.refused = true;
    setState(find("phase"), "quiet", answer.status === 401 ? "figures need a token" : "figures are not for this role");
    find("figures").classList.add("unknown");
    if (answer.status === 401) noticeToken([error, hint].filter(Boolean).join(" — "));
    letters.refuse(answer.status === 401 ? "A token is needed." : "Not for this role.");
  },

  show(status) {
    const passed = this.before ? (status.at - this.before.at) : 0;
    const delivered = sum(status.destinations, "delivered");
    const per = (now, past) => passed > 0 && now >= past ? (now - past) / passed : null;
    const received = this.before && per(status.counters.changes, this.before.counters.changes);
    rates.add(status.at * 1000, received, this.before && per(delivered, sum(this.before.destinations, "delivered")));
    lags.add(status.at * 1000, status.lag.seconds);
    showPhase(status);
    showSigns(status, received);
    showStream(status);
    showSlot(status);
    showJournal(status.journal);
    showClients(status.live, status.reach);
    showRoutes(status, this.before, per);
    showDestinations(status);
    showTables(status);
    find("foot").textContent = `walstream ${status.version} · you read as ${status.reader.role}${expiry(status.reader.expires_at)}`;
    find("token-state").textContent = `You read as ${status.reader.role}${expiry(status.reader.expires_at)}.`;
    letters.follow(status);
    this.before = status;
  },
};

function sum(list, name) {
  return list.reduce((total, one) => total + one[name], 0);
}

function expiry(at) {
  if (!at) return "";
  const rest = at - Date.now() / 1000;
  return rest > 0 ? `, for another ${lasting(rest)}` : ", until now";
}

const PHASES = { streaming: "good", connecting: "busy", standing_by: "warn", waiting: "warn", stopping: "warn", stopped: "bad" };

function showPhase(status) {
  const words = status.phase.replace("_", " ");
  let tone = PHASES[status.phase] ?? "quiet";
  let text = words;
  if (!status.alive) { tone = "bad"; text = `${words}, stuck`; }
  else if (status.phase === "streaming" && !status.ready) { tone = "bad"; text = `${words}, stalled`; }
  setState(find("phase"), tone, text);
  find("slot-name").textContent = status.slot_name;
  document.title = `${tone === "good" ? "" : `${text} · `}${status.slot_name} · walstream`;
}

function sign(id, text, tone) {
  const element = find(id);
  const [amount, unit] = text.split(" ");
  element.replaceChildren(amount, ...(unit ? [make("small", {}, unit)] : []));
  if (tone) element.dataset.tone = tone; else delete element.dataset.tone;
}

function showSigns(status, received) {
  sign("sign-rate", rate(received));
  sign("sign-lag", seconds(status.lag.seconds), status.ready ? "" : "bad");
  sign("sign-flight", count(status.in_flight.changes));
  sign("sign-wal", bytes(status.slot?.retained_wal_bytes));
  sign("sign-letters", count(status.dead_letters), status.dead_letters ? "warn" : "");
}

/** Facts as rows of a description list; what did not change is left alone. */
function showFacts(id, facts) {
  const list = find(id);
  const text = JSON.stringify(facts);
  if (list.dataset.shown === text) return;
  list.dataset.shown = text;
  list.replaceChildren(...facts.filter(Boolean).map(({ name, value, tone, part, say: sentence }) => {
    if (sentence) return make("div", {}, make("dd", { class: "say" }, sentence));
    const shown = make("dd", { "data-tone": tone }, value);
    if (part !== undefined && part !== null) {
      const bar = make("i", {});
      bar.style.width = `${Math.min(100, 100 * part).toFixed(1)}%`;
      shown.append(make("span", { class: "gauge" }, bar));
    }
    return make("div", {}, make("dt", {}, name), shown);
  }));
}

function fact(name, value, more = {}) {
  return { name, value, ...more };
}

function showStream({ heartbeat_seconds, phase, phase_seconds, reason, stalled_seconds, stalled_because, positions, lag, in_flight, counters }) {
  const reconnects = Object.entries(counters.reconnects);
  showFacts("stream", [
    fact("Phase", `${phase.replace("_", " ")} for ${lasting(phase_seconds)}`),
    reason && phase !== "streaming" && { say: reason },
    stalled_because && { say: `Stalled for ${lasting(stalled_seconds)}: ${stalled_because}` },
    fact("Behind", `${bytes(lag.bytes)} of WAL`),
    fact("Received", positions.received_lsn),
    fact("All taken up to", positions.flush_lsn),
    fact("End of WAL", positions.server_lsn),
    heartbeat_seconds !== null && fact("Heartbeat through the WAL", seconds(heartbeat_seconds)),
    fact("In flight", `${many(in_flight.changes, "change")}, ${bytes(in_flight.bytes)}`),
    fact("Transactions", count(counters.transactions)),
    fact("Changes", count(counters.changes)),
    counters.messages > 0 && fact("Messages", count(counters.messages)),
    fact("Sessions", count(counters.sessions)),
    ...reconnects.map(([name, number]) => fact(`Ended by ${name}`, `${count(number)}×`)),
    counters.reloads + counters.reloads_refused > 0
      && fact("Reloads", `${count(counters.reloads)}, ${count(counters.reloads_refused)} refused`),
  ]);
}

const WAL_TONES = { reserved: undefined, extended: undefined, unreserved: "warn", lost: "bad" };

function showSlot({ slot, slot_name, lost }) {
  if (!slot) { showFacts("slot", [fact("Name", slot_name), { say: "The server has not told of it yet." }]); return; }
  const { retained_wal_bytes: retained, safe_wal_size_bytes: safe } = slot;
  showFacts("slot", [
    fact("Name", slot_name),
    fact("Confirmed", slot.confirmed_flush_lsn),
    slot.restart_lsn && fact("WAL kept from", slot.restart_lsn),
    slot.wal_status && fact("State of its WAL", slot.wal_status, { tone: WAL_TONES[slot.wal_status] }),
    fact("Retained WAL", bytes(retained), { part: safe ? retained / (retained + safe) : null }),
    safe !== null && fact("Room before it is lost", bytes(safe), { tone: safe <= 0 ? "bad" : undefined }),
    slot.spilled_transactions > 0 && fact("Spilled by the server", `${many(slot.spilled_transactions, "transaction")}, ${bytes(slot.spilled_bytes)}`),
    ...lost.map(({ table, operation, count: times }) => fact(`Never sent: ${operation} of ${table}`, count(times), { tone: "bad" })),
  ]);
}

function showJournal(journal) {
  if (!journal) { showFacts("journal", [{ say: "No journal is configured: clients get back what is in memory." }]); return; }
  showFacts("journal", [
    journal.failure && fact("State", journal.failure, { tone: "bad" }),
    fact("Size", journal.max_bytes ? `${bytes(journal.bytes)} of ${bytes(journal.max_bytes)}` : bytes(journal.bytes), { part: journal.max_bytes ? journal.bytes / journal.max_bytes : null }),
    fact("Changes", count(journal.changes)),
    fact("Oldest", moment(journal.oldest_time)),
    fact("Newest", moment(journal.newest_time)),
    journal.begins && fact("Begins behind", journal.begins),
    fact("On disk before the slot moves", journal.durable ? "yes" : "no"),
  ]);
}

const END_WORDS = { slow: "Cut off as slow", expired: "Ended by an expired token", closing: "Sent away at the end", left: "Have left" };

function showClients(live, reach) {
  if (!live) { showFacts("clients", [{ say: "No route leads to a live sink: there is nothing for clients." }]); return; }
  showFacts("clients", [
    fact("Connected", count(live.clients)),
    live.clients > 0 && fact("See different things", count(live.cohorts)),
    fact("Changes published", count(live.published_changes)),
    fact("Changes sent", count(live.sent_changes)),
    ...Object.entries(live.ended).map(([why, number]) => fact(END_WORDS[why] ?? why, count(number), { tone: why === "slow" ? "warn" : undefined })),
    reach && fact("Position", reach.position),
    reach && fact("Replay reaches back to", reach.begins),
  ]);
}

/** Fill a table: `rows` are lists of [text, class, tone]; the first cell is the row's header. */
function showTable(id, rows, empty) {
  const body = find(id).tBodies[0];
  const text = JSON.stringify(rows);
  if (body.dataset.shown === text) return;
  body.dataset.shown = text;
  const labels = [...find(id).tHead.rows[0].cells].map((one) => one.textContent);
  if (rows.length === 0) {
    body.replaceChildren(make("tr", {}, make("td", { colspan: labels.length, class: "none" }, empty)));
    return;
  }
  body.replaceChildren(...rows.map((cells) => make("tr", {}, ...cells.map(([content, style, tone], index) =>
    index === 0
      ? make("th", { scope: "row" }, content)
      : make("td", { class: style, "data-tone": tone, "data-label": labels[index] }, content)))));
}

function showRoutes({ routes }, before, per) {
  showTable("routes", routes.map(({ name, matched, filtered, absent }, index) => {
    const past = before?.routes[index];
    const now = past && past.name === name ? per(matched, past.matched) : null;
    return [[name], [count(matched), "n"], [count(filtered), "n"], [count(absent), "n", absent ? "warn" : undefined], [rate(now), "n"]];
  }), "No route.");
}

function showDestinations({ destinations }) {
  showTable("destinations", destinations.map((one) => [
    [one.name], [count(one.delivered), "n"], [count(one.waiting), "n"],
    [count(one.retries), "n", one.retries ? "warn" : undefined],
    [count(one.skipped), "n", one.skipped ? "bad" : undefined],
    [count(one.dead_lettered), "n", one.dead_lettered ? "warn" : undefined],
    [count(one.parked), "n", one.parked ? "warn" : undefined],
    [one.calls.count ? seconds(one.calls.seconds / one.calls.count) : "–", "n"],
    [one.calls.count === 0 ? "–" : one.calls.p99_seconds === null ? "> 30 s" : `≤ ${seconds(one.calls.p99_seconds)}`, "n"],
    [one.held_seconds > 0.5 ? seconds(one.held_seconds) : "–", "n", one.held_seconds > 10 ? "bad" : undefined],
  ]), "No destination.");
}

const COLUMN_OF = { insert: 0, update: 1, delete: 2, truncate: 3 };

function showTables({ tables: counts }) {
  const rows = new Map();
  for (const { schema, table, operation, outcome, count: number } of counts) {
    const name = `${schema}.${table}`;
    if (!rows.has(name)) rows.set(name, [0, 0, 0, 0, 0]);
    const row = rows.get(name);
    if (operation in COLUMN_OF) row[COLUMN_OF[operation]] += number;
    if (outcome === "dropped") row[4] += number;
    noteTable(name);
  }
  showTable("changes", [...rows].sort(([a], [b]) => a < b ? -1 : 1).map(([name, row]) => [[name], ...row.map((one) => [count(one), "n"])]), "No change yet.");
}

// ---- Dead letters

const letters = {
  chosen: new Set(),
  known: null,
  timer: 0,
  isAsking: false,
  mayOperate: false,
  wasRunning: false,

  refuse(sentence) {
    clearTimeout(this.timer);
    this.mayOperate = false;
    find("letters-state").textContent = sentence;
    find("letters-tools").hidden = true;
    find("letters").hidden = true;
  },

  /** Ask anew when the number of letters has changed, and now and then. */
  follow(status) {
    if (!status.reader.can_operate) {
      this.refuse(status.dead_letters ? `There are ${count(status.dead_letters)}; this role may not look at them.` : "Not for this role.");
      return;
    }
    if (this.mayOperate && status.dead_letters === this.known) return;
    this.mayOperate = true;
    this.known = status.dead_letters;
    this.ask();
  },

  async ask() {
    clearTimeout(this.timer);
    if (this.isAsking) return;
    this.isAsking = true;
    let pause = 10_000;
    try {
      const answer = await fetch("dead-letters.json", { headers: tokens.headers(), cache: "no-store", credentials: "omit" });
      if (answer.ok) {
        const found = await answer.json();
        this.show(found);
        if (found.replay?.running) pause = 500;
      } else {
        find("letters-state").textContent = (await explained(answer)).error;
      }
    } catch {
      pause = POLL_FAILED_MS;
    } finally {
      this.isAsking = false;
    }
    if (this.mayOperate) this.timer = setTimeout(() => this.ask(), pause);
  },

  show({ letters: list, count: total, replay }) {
    const here = new Set(list.map((letter) => letter.id));
    for (const id of this.chosen) if (!here.has(id)) this.chosen.delete(id);
    find("letters").hidden = list.length === 0;
    find("letters-tools").hidden = list.length === 0;
    const shown = list.length < total ? `the first ${count(list.length)} of ${count(total)}` : count(total);
    find("letters-state").textContent = total ? shown : "None: all that was tried was delivered.";
    this.showRows(list);
    this.showRoutes([...new Set(list.map((letter) => letter.route))].sort());
    this.showReplay(replay);
    this.enable(replay);
  },

  showRows(list) {
    const body = find("letters").tBodies[0];
    const text = JSON.stringify(list);
    if (body.dataset.shown === text) return;
    body.dataset.shown = text;
    const focused = document.activeElement?.dataset?.letter;
    const labels = [...find("letters").tHead.rows[0].cells].map((one) => one.textContent);
    body.replaceChildren(...list.map((letter) => {
      const box = make("input", { type: "checkbox", "data-letter": letter.id, "aria-label": `Letter ${letter.id}` });
      box.checked = this.chosen.has(letter.id);
      box.addEventListener("change", () => {
        if (box.checked) this.chosen.add(letter.id); else this.chosen.delete(letter.id);
        this.enable();
      });
      const cells = [
        [letter.id], [letter.route], [letter.change_id, "mono"], [letter.table ? `${letter.schema}.${letter.table}` : "–"],
        [letter.operation ?? "message"], [letter.attempts, "n"], [letter.parked ? "waits behind another" : letter.error, "error"],
        [moment(letter.stored_at)],
      ];
      return make("tr", {}, make("td", { class: "choose", "data-label": labels[0] }, box),
        ...cells.map(([content, style], index) => make("td", { class: style, "data-label": labels[index + 1] }, String(content))));
    }));
    if (focused) body.querySelector(`[data-letter="${CSS.escape(focused)}"]`)?.focus();
  },

  showRoutes(names) {
    const select = find("replay-route");
    if ([...select.options].map((one) => one.value).join("\n") === names.join("\n")) return;
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
    if (names.includes(chosen)) select.value = chosen;
  },

  enable(replay = this.replay) {
    this.replay = replay;
    const busy = replay?.running === true;
    find("replay-chosen").disabled = busy || this.chosen.size === 0;
    find("replay-chosen").textContent = this.chosen.size ? `Replay ${count(this.chosen.size)} chosen` : "Replay chosen";
    find("replay-all").disabled = busy;
  },

  showReplay(replay) {
    const box = find("replay-report");
    box.hidden = !replay;
    if (!replay) return;
    const lines = replay.running ? ["A replay is running."] : replay.error
      ? [`The replay ended with an error: ${replay.error}${replay.hint ? ` — ${replay.hint}` : ""}`]
      : replay.reports.length === 0 ? ["The replay has found no letter."]
      : replay.reports.map((one) => `${one.route}: ${count(one.delivered)} delivered, ${count(one.failed)} failed again, ${count(one.left)} left${one.reason ? ` — ${one.reason}` : ""}.`);
    const text = lines.join("\n");
    if (box.dataset.shown === text) return;
    box.dataset.shown = text;
    box.replaceChildren(...lines.map((line) => make("p", {}, line)));
    if (replay.running || this.wasRunning) say(lines.join(" "));
    this.wasRunning = replay.running;
  },

  async confirm(question, body) {
    const dialog = find("replay-dialog");
    find("replay-question").textContent = question;
    dialog.returnValue = "";
    dialog.showModal();
    await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
    if (dialog.returnValue === "replay") await this.replayNow(body);
  },

  async replayNow(body) {
    try {
      const answer = await fetch("dead-letters/replay", {
        method: "POST", body: JSON.stringify(body), credentials: "omit",
        headers: { "Content-Type": "application/json", ...tokens.headers() },
      });
      if (!answer.ok) {
        const { error, hint } = await explained(answer);
        this.showReplay({ running: false, error, hint, reports: [] });
        return;
      }
      this.chosen.clear();
      find("letters").tBodies[0].dataset.shown = "";
      this.wasRunning = true;
    } catch {
      this.showReplay({ running: false, error: "the server does not answer", hint: "", reports: [] });
      return;
    }
    await this.ask();
  },
};

// ---- The token's dialog, and the rest of what can be pressed

function noticeToken(sentence) {
  find("notice").querySelector("p").textContent = sentence || "A token is needed.";
  find("notice").hidden = false;
}

function openToken() {
  find("token").value = "";
  find("token-forget").hidden = !tokens.value;
  find("token-dialog").showModal();
}

function useToken(value) {
  tokens.keep(value.trim().replace(/^Bearer\s+/i, ""));
  find("notice").hidden = true;
  find("figures").classList.remove("unknown");
  begin();
}

function begin() {
  figures.begin();
  applyFilter();
}

document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); find("live").focus(); });
find("token-open").addEventListener("click", openToken);
find("notice-token").addEventListener("click", openToken);
find("token-cancel").addEventListener("click", () => find("token-dialog").close());
find("token-forget").addEventListener("click", () => { find("token-dialog").close(); useToken(""); });
find("token-form").addEventListener("submit", () => useToken(find("token").value));
find("filter").addEventListener("submit", (event) => { event.preventDefault(); applyFilter(); });
find("pause").addEventListener("click", () => feed.pause(!feed.paused));
find("clear").addEventListener("click", () => feed.clear());
find("keep").addEventListener("change", () => feed.take([]));
find("replay-chosen").addEventListener("click", () => {
  const ids = [...letters.chosen];
  letters.confirm(`${count(ids.length)} ${ids.length === 1 ? "letter is" : "letters are"} delivered again.`, { ids });
});
find("replay-all").addEventListener("click", () => {
  const route = find("replay-route").value;
  letters.confirm(`All letters of the route ${route} are delivered again.`, { route });
});
window.addEventListener("online", () => stream.hurry());
window.addEventListener("hashchange", () => {
  if (new URLSearchParams(location.hash.slice(1)).has("token")) { tokens.load(); useToken(tokens.value ?? ""); }
  else if (location.hash.length > 1 && location.hash !== "#live") { loadFilter(); applyFilter(); }
});

tokens.load();
loadFilter();
begin();
