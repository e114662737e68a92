// Drawings: a small chart of the rounds, and the waterfall of a blackout.

import { draw, exact, make, size, time } from "./tools.js";

const [TOP, BASE, HEIGHT] = [14, 92, 108];

// One bar for each round. `open` marks the round that is not over, and what is not known is left out. A limit is a line
// across.
function bars({ title, entries, format, limit, width }) {
  const most = Math.max(...entries.map((entry) => entry.value ?? 0), limit ?? 0) || 1;
  const y = (value) => BASE - (BASE - TOP) * (value / most);
  const step = width / Math.max(entries.length, width / 54);
  const wide = Math.min(step * 0.62, 34);
  // Labels that would touch each other are left out: of many bars the highest has one, and the last if there is room.
  const every = Math.ceil(entries.length / 10);
  const highest = entries.findIndex((entry) => entry.value === most);
  const last = entries.length - 1;
  const labelled = (at) => step >= 44 || at === highest || (at === last && (last - highest) * step >= 48);
  const parts = [draw("line", { x1: 0, x2: width, y1: BASE + 0.5, y2: BASE + 0.5 })];
  entries.forEach((entry, at) => {
    if (entry.value === undefined) return;
    const [x, high] = [at * step + step / 2, Math.max(BASE - y(entry.value), entry.value > 0 ? 1.5 : 0)];
    const kind = entry.open ? "open" : limit !== undefined && entry.value > limit ? "over" : undefined;
    const bar = { class: kind, x: x - wide / 2, width: wide, y: BASE - high, height: high, rx: 1.5 };
    parts.push(draw("rect", bar));
    if (labelled(at)) {
      const within = Math.min(Math.max(x, 26), width - 26);
      parts.push(draw("text", { x: within, y: BASE - high - 4, "text-anchor": "middle", class: "value" }, format(entry.value)));
    }
    if (at % every === 0) {
      parts.push(draw("text", { x, y: HEIGHT - 3, "text-anchor": "middle" }, entry.round));
    }
  });
  if (limit !== undefined) {
    const line = y(limit);
    parts.push(draw("line", { class: "limit", x1: 0, x2: width, y1: line, y2: line }));
    parts.push(draw("text", { class: "limit", x: width, y: line - 4, "text-anchor": "end" }, `limit ${format(limit)}`));
  }
  const told = entries.filter((entry) => entry.value !== undefined).map((entry) => `round ${entry.round}: ${format(entry.value)}`).join(", ");
  const label = `${title}. ${told}${limit === undefined ? "" : `; limit ${format(limit)}`}`;
  const chart = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label }, ...parts);
  return make("figure", {}, make("figcaption", {}, title), chart);
}

// What each round sent, how fast memory was dirtied in it, and the blackout that it let expect. `now` is the round that
// is under way, if there is one.
export function rounds(over, now, limitMs, width = 320) {
  // All rounds that were made while somebody was waited for are told as one, with its last number. How long the waits
  // between them were is not told.
  const first = (at) => (at === 0 ? over[0].round : over[at - 1].round + 1);
  const name = (at) => (first(at) < over[at].round ? `${first(at)}–${over[at].round}` : String(over[at].round));
  const of = (value) => over.map((round, at) => ({ round: name(at), value: value(round, first(at) < round.round) }));
  const sent = of((round) => round.sent);
  if (now) sent.push({ round: String(now.round), value: now.sent, open: true });
  const charts = make("div", { class: "charts" }, bars({ title: "Sent by round", entries: sent, format: size, width }));
  if (over.length === 0) return charts;
  const seconds = (round) => Math.max(round.elapsed_us, 1) / 1e6;
  charts.append(
    bars({
      title: "Dirtied in each second",
      entries: of((round, several) => (several ? undefined : round.remaining / seconds(round))),
      format: (rate) => `${size(rate)}/s`,
      width,
    }),
    bars({
      title: "Blackout predicted after each round",
      entries: of((round) => round.predicted_blackout_us),
      format: time,
      limit: limitMs === undefined ? undefined : limitMs * 1000,
      width,
    }),
  );
  return charts;
}

// The steps of a blackout, one after the other. What passed between them is told at their end.
export function waterfall(spans, blackout) {
  const rest = blackout - spans.reduce((sum, span) => sum + span.us, 0);
  const steps = rest > 0 ? [...spans, { name: "between these steps", us: rest }] : spans;
  const scale = 1000 / Math.max(blackout, 1);
  const head = make("thead", { class: "head" }, make("tr", {},
    ...["Step", "When", "How long"].map((name) => make("th", { scope: "col" }, name))));
  let begun = 0;
  const rows = steps.map((step) => {
    const bar = { x: Math.min(begun * scale, 997), width: Math.max(step.us * scale, 3), y: 0, height: 10 };
    const lane = draw("svg", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("rect", { class: "track", width: 1000, height: 10 }), draw("rect", bar));
    begun += step.us;
    return make("tr", { "data-us": step.us }, make("th", { scope: "row" }, step.name),
      make("td", { class: "lane" }, lane), make("td", { class: "figure" }, exact(step.us)));
  });
  const foot = make("tfoot", {}, make("tr", { "data-us": blackout }, make("th", { scope: "row" }, "Blackout"),
    make("td"), make("td", { class: "figure" }, exact(blackout))));
  return make("table", { class: "waterfall" }, make("caption", {}, "The blackout, step by step"), head,
    make("tbody", {}, ...rows), foot);
}
