// Elements, and figures for people. Whatever comes from the host becomes text, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) element.setAttribute(name, value);
  }
  // Strings become text.
  element.append(...children.filter((child) => child !== undefined && child !== ""));
  return element;
}

// An element of the page.
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// An element of a drawing.
export function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

const shown = new WeakMap();

// Shows one element for each item. Those whose items are as they were stay as they are, with all that somebody has
// marked or opened in them.
export function keyed(container, items, key, build) {
  const before = new Map([...container.children].map((element) => [shown.get(element)?.key, element]));
  const elements = items.map((item) => {
    const is = { key: key(item), text: JSON.stringify(item) };
    const old = before.get(is.key);
    if (old && shown.get(old).text === is.text) return old;
    const element = build(item);
    shown.set(element, is);
    return element;
  });
  const same = elements.length === container.children.length
    && elements.every((element, at) => element === container.children[at]);
  if (!same) container.replaceChildren(...elements);
}

// Names and values; a value may be of some kind, and have something small below it.
export function facts(list, entries) {
  const parts = entries.filter(Boolean).map(([name, value, { kind, small } = {}]) =>
    make("div", {}, make("dt", {}, name), make("dd", { class: kind }, value),
      small ? make("dd", { class: "small" }, small) : undefined));
  list.replaceChildren(...parts);
  return list;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

// A number of bytes in the largest binary unit that it fills.
export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit + 1 < UNITS.length) {
    bytes /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? Math.round(bytes) : bytes.toFixed(bytes < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

// A time of so many microseconds.
export function time(us) {
  if (us < 1e6) return `${(us / 1e3).toFixed(us < 1e5 ? 2 : 0)} ms`;
  const seconds = us / 1e6;
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
}

// The same to the microsecond: parts add up as they are read.
export function exact(us) {
  return `${(us / 1e3).toFixed(3)} ms`;
}

// A moment in this browser's zone, with its day unless that is today.
export function moment(text) {
  const at = new Date(text);
  if (Number.isNaN(at.getTime())) return text;
  const clock = at.toLocaleTimeString([], { hour12: false });
  return at.toDateString() === new Date().toDateString() ? clock : `${at.toLocaleDateString()} ${clock}`;
}

// A peer by its certificate, or else by its address.
export function peer(address, secured) {
  return secured?.peer ?? address ?? "";
}
