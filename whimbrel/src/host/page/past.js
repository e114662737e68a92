// What became of the moves from and to this host.

import { rounds, waterfall } from "./charts.js";
import { facts, keyed, make, moment, peer, size, time } from "./tools.js";

const KINDS = { moved: "good", arrived: "good", stayed: "warn", held: "bad", refused: "bad" };

let first = true;

// Entries from the oldest on, as the host tells them.
export function showHistory(entries) {
  const list = document.getElementById("history");
  const known = new Set(list.children);
  const key = (entry) => [entry.at, entry.name, entry.pid, entry.arrival ? "in" : "out"].join(" ");
  keyed(list, entries.toReversed(), key, row);
  // Of those that are new, the blackouts that somebody has waited for are to be seen at once; of the old ones, the last.
  const news = [...list.children].filter((item) => !known.has(item) && item.querySelector(".waterfall"));
  for (const item of first ? news.slice(0, 1) : news) item.querySelector("details").open = true;
  first = false;
}

function row(entry) {
  const { migration, arrival } = entry;
  const report = migration?.report;
  const failure = report?.failure ?? arrival?.failure;
  const what = arrival ? (failure ? "refused" : "arrived") : report?.verdict ?? "unknown";
  const where = arrival ? `from ${peer(arrival.from, arrival.secured)}` : `to ${peer(migration?.to, migration?.secured)}`;
  const took = report?.blackout_us > 0 ? `blackout ${time(report.blackout_us)}` : "";
  const summary = make("summary", {},
    make("span", { class: `pill ${KINDS[what] ?? ""}` }, what),
    make("span", {}, make("b", {}, entry.name || "unnamed"), ` ${where}`),
    make("span", { class: "quiet" }, took ? `${took} · ` : "", make("time", { datetime: entry.at }, moment(entry.at))));
  if (failure) {
    summary.append(make("span", { class: "why" }, make("code", {}, failure.code), ` ${failure.message}`));
  }
  const detail = make("div", { class: "detail" });
  if (report) departed(detail, migration, report);
  else if (arrival) arrived(detail, arrival);
  return make("li", { "data-machine": entry.name, "data-what": what }, make("details", {}, summary, detail));
}

function departed(detail, migration, report) {
  const all = report.rounds ?? [];
  const sent = all.reduce((sum, round) => sum + round.sent, 0);
  if (report.spans?.length > 0 && report.blackout_us > 0) detail.append(waterfall(report.spans, report.blackout_us));
  detail.append(facts(make("dl", { class: "figures" }), [
    ["In all", time(report.total_us)],
    report.transport && ["Over", [report.transport, migration.secured?.cipher].filter(Boolean).join(", ")],
    ["Memory", size(report.memory)],
    all.length > 0 && ["Sent", `${size(sent)} in ${all.length} rounds`],
    migration.downtime_limit_ms !== undefined && ["Limit", time(migration.downtime_limit_ms * 1000)],
  ]));
  for (const declined of report.declined ?? []) {
    detail.append(make("p", { class: "quiet" }, `${declined.transport} was not used: ${declined.why.message}`));
  }
  if (report.over_limit) detail.append(make("p", { class: "quiet" }, `Switched over beyond the limit: ${report.over_limit}`));
  // The last round is the one in the blackout, after which nothing was predicted.
  const before = report.blackout_us > 0 ? all.slice(0, -1) : all;
  if (before.length > 0) detail.append(rounds(before, undefined, migration.downtime_limit_ms, 240));
}

function arrived(detail, arrival) {
  detail.append(facts(make("dl", { class: "figures" }), [
    ["In all", time(arrival.progress.elapsed_us)],
    ["Memory", size(arrival.progress.memory)],
    ["Placed", size(arrival.progress.placed)],
    ["From", String(arrival.from)],
    arrival.sender && ["Sent by", arrival.sender],
  ]));
}
