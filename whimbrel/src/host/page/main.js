// Asks the host again and again, and shows what it answers. If it does not answer, what it told last stays.

import { showHistory } from "./past.js";
import { moment } from "./tools.js";
import { showHost, showMachines, showMoves, state } from "./views.js";

const [EACH, HIDDEN, PATIENCE] = [1000, 15000, 8000];

// How many entries of the history are shown.
const ENTRIES = 50;

const at = (id) => document.getElementById(id);

async function ask(path, headers = {}) {
  const answer = await fetch(path, { headers, signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 304) return undefined;
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error?.message ?? `${path} was answered with ${answer.status}`);
  return { body, version: answer.headers.get("etag") };
}

let version;
let states;
let answered;

async function look() {
  const known = version ? { "If-None-Match": version } : {};
  const [host, machines, history] = await Promise.all(
    [ask("v1/host"), ask("v1/machines"), ask(`v1/history?limit=${ENTRIES}`, known)]);
  showHost(host.body, machines.body);
  showMoves(machines.body);
  showMachines(machines.body);
  if (history) {
    showHistory(history.body);
    version = history.version;
  }
  announce(machines.body);
  document.body.classList.remove("asking");
}

// Tells those who hear the page what has changed.
function announce(machines) {
  const now = new Map(machines.map((machine) => [machine.name, state(machine)]));
  if (states) {
    const news = [...now].filter(([name, word]) => states.get(name) !== word).map(([name, word]) => `${name} is ${word}`);
    const gone = [...states.keys()].filter((name) => !now.has(name)).map((name) => `${name} is no longer here`);
    const all = [...news, ...gone];
    if (all.length > 0) at("told").textContent = all.slice(0, 4).join(", ") + (all.length > 4 ? ", and more" : "");
  }
  states = now;
}

function linked(why) {
  const link = at("link");
  const [word, kind] = why === undefined ? ["live", "good"] : ["no answer", "bad"];
  if (link.textContent !== word) {
    link.textContent = word;
    link.className = `pill ${kind}`;
  }
  document.body.classList.toggle("stale", why !== undefined);
  at("lost").hidden = why === undefined;
  if (why !== undefined) {
    const since = answered ? `What is shown is from ${moment(answered)}.` : "";
    const text = `The host does not answer${why && ` (${why})`}. ${since}`;
    // A text that is put in again would be read out again.
    if (at("lost").textContent !== text) at("lost").textContent = text;
  }
}

let timer;
let busy = false;

async function turn() {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  const began = performance.now();
  try {
    await look();
    answered = new Date().toISOString();
    linked();
  } catch (error) {
    linked(error.name === "TimeoutError" ? "" : error.message);
  }
  busy = false;
  // A host that takes long to answer is asked less often.
  const pause = Math.max(EACH, 4 * (performance.now() - began));
  timer = setTimeout(turn, document.hidden ? HIDDEN : pause);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) turn();
});

turn();
