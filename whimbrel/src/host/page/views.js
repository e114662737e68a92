// The host, its machines, and the moves under way.

import { rounds } from "./charts.js";
import { facts, keyed, make, peer, size, time } from "./tools.js";

const at = (id) => document.getElementById(id);

const KINDS = { running: "good", paused: "warn", held: "bad", silent: "bad" };

export function state(machine) {
  return machine.vm?.state ?? "silent";
}

function pill(word, kind = KINDS[word]) {
  return make("span", { class: kind ? `pill ${kind}` : "pill" }, word);
}

export function showHost(host, machines) {
  const name = host.name || location.host;
  document.title = `${name} · Whimbrel`;
  at("host").textContent = name;
  at("software").textContent = host.software;
  const counts = new Map();
  machines.forEach((machine) => counts.set(state(machine), (counts.get(state(machine)) ?? 0) + 1));
  const told = [...counts].map(([word, count]) => `${count} ${word}`).join(", ");
  const memory = machines.reduce((sum, machine) => sum + (machine.vm?.memory ?? 0), 0);
  const { standbys, arriving } = host.processes;
  facts(at("facts"), [
    ["Guests are taken in at", host.listen.join(", ")],
    ["Admission", host.drained ? "drained" : "open", { kind: host.drained ? "over" : undefined, small: host.drained ? "takes nobody in" : `${standbys} waiting, ${arriving} taking a guest in` }],
    ["Machines", String(machines.length), { small: told || "none" }],
    ["Memory of all machines", size(memory)],
    ["Moves in progress", String(machines.filter(moving).length)],
  ]);
}

// Whether a guest goes, comes, or waits for an operator's decision.
function moving(machine) {
  return ["migrating", "held", "receiving"].includes(state(machine)) && (machine.migration ?? machine.arrival);
}

export function showMoves(machines) {
  const moves = machines.filter(moving).map(({ name, vm, migration, arrival }) => ({ name, vm, migration, arrival }));
  keyed(at("moves"), moves, (move) => move.name, (move) => (move.migration ? departure(move) : arrival(move)));
}

function departure({ name, vm, migration }) {
  const { progress, report } = migration;
  const held = vm.state === "held";
  const over = report?.rounds ?? migration.rounds ?? [];
  const card = make("article", { class: held ? "move attention" : "move", "data-machine": name });
  card.append(make("header", {},
    make("h3", {}, name),
    make("span", { class: "quiet" }, `to ${peer(migration.to, migration.secured)}`,
      migration.secured ? ` (${migration.to})` : ""),
    pill(held ? "held" : progress.phase),
    make("span", { class: "quiet end" }, [progress.transport, migration.secured?.cipher, time(progress.elapsed_us)].filter(Boolean).join(" · "))));
  if (held) {
    const why = report?.failure;
    card.append(make("p", {}, "The guest is paused here and may run at the destination. Decide by ", make("code", {}, `whimbrel quit ${name}`),
      " if it runs there, or ", make("code", {}, `whimbrel resume --force ${name}`), " if it certainly does not."));
    if (why) card.append(make("p", {}, make("code", {}, why.code), ` ${why.message}`));
    return card;
  }
  const left = Math.max(progress.round_bytes - progress.round_done, 0);
  const [predicted, limit] = [progress.predicted_blackout_us ?? undefined, migration.downtime_limit_ms];
  const within = predicted === undefined || limit === undefined || predicted <= limit * 1000;
  card.append(facts(make("dl", { class: "figures" }), [
    ["Round", String(progress.round)],
    ["Sent", size(progress.sent)],
    ["Rate", `${size(progress.rate)}/s`],
    ["Dirty rate", typeof progress.dirty_rate === "number" ? `${size(progress.dirty_rate)}/s` : "after round 0"],
    ["Left in this round", size(left)],
    ["Predicted blackout", predicted === undefined ? "after round 0" : time(predicted), { kind: predicted === undefined ? undefined : within ? "within" : "over" }],
    limit !== undefined && ["Limit", time(limit * 1000)],
  ]));
  card.append(make("progress", { class: "bar", max: Math.max(progress.round_bytes, 1), value: progress.round_done, "aria-label": `Round ${progress.round}` }));
  const before = over.reduce((sum, round) => sum + round.sent, 0);
  const under = progress.phase === "precopy" && { round: progress.round, sent: Math.max(progress.sent - before, 0) };
  // A program of an earlier version tells no rounds.
  if (under || over.length > 0) card.append(rounds(over, under, limit));
  return card;
}

function arrival({ name, arrival }) {
  const { progress } = arrival;
  return make("article", { class: "move", "data-machine": name },
    make("header", {},
      make("h3", {}, name),
      make("span", { class: "quiet" }, `from ${peer(arrival.from, arrival.secured)}`),
      pill("arriving"),
      make("span", { class: "quiet end" }, [progress.phase, arrival.secured?.cipher, time(progress.elapsed_us)].filter(Boolean).join(" · "))),
    facts(make("dl", { class: "figures" }), [["Memory", size(progress.memory)], ["Placed so far, in all rounds", size(progress.placed)]]),
    make("progress", { class: "bar", max: Math.max(progress.memory, 1), value: Math.min(progress.placed, progress.memory), "aria-label": "Memory placed" }));
}

export function showMachines(machines) {
  const rows = machines.map((machine) => {
    const came = machine.arrival && !machine.arrival.failure ? machine.arrival : undefined;
    return {
      name: machine.name,
      state: state(machine),
      trouble: machine.vm?.trouble,
      memory: machine.vm?.memory,
      vcpus: machine.vm?.vcpus || undefined,
      dirty: machine.migration && !machine.migration.report ? machine.migration.progress.dirty_rate : undefined,
      from: came ? peer(came.from, came.secured) : undefined,
      to: machine.migration?.to,
    };
  });
  keyed(at("machines"), rows, (row) => row.name, (row) => make("tr", { "data-machine": row.name },
    make("th", { scope: "row" }, row.name, row.from ? make("span", { class: "narrow" }, `from ${row.from}`) : undefined),
    make("td", {}, pill(row.state), row.trouble ? make("span", { class: "quiet" }, row.trouble) : undefined),
    make("td", { class: "figure" }, row.memory === undefined ? "" : size(row.memory)),
    make("td", { class: "figure wide" }, row.vcpus === undefined ? "" : String(row.vcpus)),
    make("td", { class: "figure" }, typeof row.dirty === "number" ? `${size(row.dirty)}/s` : ""),
    make("td", { class: "wide" }, row.from ?? (row.state === "silent" ? "" : "here"))));
}
