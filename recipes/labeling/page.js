"use strict";
// A task goes through two steps, each output rated, then all ranked. `work` is all of it, and stands in the browser's
// storage after every move, so that a reload or a crash goes on where it was. What is sent stands there too until the
// server has said that it is on disk, and is sent again under the same id.

const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHI";
let questions = {};
let labeler = localStorage.getItem("labeler") || "";
let task = null;
let work = null; // {step, place, ratings, metadata, groups, history, started}
let last = null; // id of this labeler's last answer
let sending = false;

function key(name) { return `${name}:${labeler}`; }
function draftKey(of = task) { return key(`draft:${of.id}:${of.version}`); }
function keep() { try { localStorage.setItem(draftKey(), JSON.stringify(work)); } catch { say("this browser keeps no drafts", true); } }
function say(text, bad = false) { $("state").textContent = text; $("state").classList.toggle("bad", bad); }
function newId() { const b = crypto.getRandomValues(new Uint8Array(16)); return [...b].map((x) => x.toString(16).padStart(2, "0")).join(""); }

// Asking and sending

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const detail = typeof answer.detail === "string" ? answer.detail : JSON.stringify(answer.detail || response.statusText);
  const error = new Error(detail);
  error.again = [502, 503, 504, 507].includes(response.status); // it may be able to later: a full disk, say
  error.keep = [401, 403, 500].includes(response.status); // not the answer's fault: a new token, a mistake of the server's
  throw error;
}

async function untilAnswered(path, body) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 4000)) {
    try {
      return await ask(path, body);
    } catch (error) {
      if (error.again === false) throw error;
      say(error.again ? error.message : "not saved yet: the server does not answer; trying again", true);
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

async function send(kind, answer) {
  const body = { id: newId(), labeler, task: task.id, version: task.version, ...answer };
  localStorage.setItem(`${key("pending")}:${body.id}`, JSON.stringify({ kind, body }));
  return flush();
}

async function flush() { // what was not confirmed, from before a crash and from other windows too
  const names = Object.keys(localStorage).filter((name) => name.startsWith(`${key("pending")}:`));
  if (!names.length) return "saved";
  setSending(true);
  say("saving ...");
  let became = "saved"; // of the last that was not
  for (const name of names) {
    const pending = JSON.parse(localStorage.getItem(name) || "null");
    if (!pending) continue;
    try {
      await untilAnswered(`/api/${pending.kind}`, pending.body);
      if (pending.kind !== "demonstration") localStorage.removeItem(key(`draft:${pending.body.task}:${pending.body.version}`));
      if (became === "saved") say("saved");
    } catch (error) { // refused, and never to be taken; or kept here for the next time the page is loaded
      became = error.keep ? "kept" : "refused";
      say(error.keep ? `not saved, but kept in this browser: ${error.message}` : error.message, true);
      if (error.keep) continue;
    }
    localStorage.removeItem(name);
  }
  setSending(false);
  return became;
}

function setSending(on) {
  sending = on;
  for (const button of document.querySelectorAll("#work button, #undo, #who, #again")) button.disabled = on || (button.id === "undo" && !last);
  if (!on && task && work && !$("work").hidden) draw(); // which knows the buttons that lead nowhere
}

async function next(quiet) {
  setSending(true); // until the next task is here, keys and buttons would still be the last one's
  let answer;
  try {
    answer = await untilAnswered(`/api/next?labeler=${encodeURIComponent(labeler)}`);
  } finally {
    setSending(false);
  }
  showProgress(answer.progress);
  open(answer.task);
  if (!quiet && $("state").textContent.startsWith("not saved")) say("");
}

function showProgress(progress) {
  last = progress.last;
  $("undo").disabled = !last;
  $("bar").max = progress.wanted || 1;
  $("bar").value = progress.given;
  $("progress").textContent = `${progress.given} of ${progress.wanted} labels, ${progress.mine} by you`;
  const { share, pairs } = progress.agreement;
  $("agreement").textContent = pairs ? `labelers agree on ${Math.round(100 * share)} % of ${pairs} pairs` : "";
  $("problem").textContent = progress.problem || "";
  $("problem").hidden = !progress.problem;
}

async function undo() {
  if (!last || sending) return;
  const id = last;
  let found, progress;
  setSending(true);
  try {
    found = await untilAnswered(`/api/answer?id=${encodeURIComponent(id)}&labeler=${encodeURIComponent(labeler)}`);
    if (found.answer && found.task) keepAnswer(found.answer, found.task); // before it is taken out there
    progress = (await untilAnswered("/api/undo", { id, labeler })).progress;
  } finally {
    setSending(false);
  }
  showProgress(progress);
  say(found.answer ? "taken back" : "nothing to take back");
  if (!found.answer || !found.task) return next(true);
  open(found.task);
  if (found.answer.kind === "demonstration") $("write").click();
}

function keepAnswer({ kind, ranks, ratings, metadata, text }, of) { // as a draft
  if (kind === "ranking") {
    const levels = [...new Set(ranks)].sort((a, b) => a - b);
    const groups = levels.map((level) => ranks.flatMap((rank, k) => (rank === level ? [k] : [])));
    localStorage.setItem(draftKey(of), JSON.stringify({ ...fresh(of), step: "rank", ratings, metadata, groups }));
  }
  if (kind === "demonstration") localStorage.setItem(`${draftKey(of)}:text`, text);
}

// A task on the page

function fresh(of = task) {
  const none = Object.fromEntries(Object.keys(questions).map((name) => [name, false]));
  return { step: "rate", place: 0, ratings: of.outputs.map(() => null), metadata: of.outputs.map(() => ({ ...none })), groups: null, history: [], started: Date.now() };
}

function open(given) {
  task = given;
  $("hello").hidden = true;
  $("done").hidden = !!task;
  $("work").hidden = !task;
  if (!task) return;
  work = JSON.parse(localStorage.getItem(draftKey()) || "null");
  if (!work || work.ratings.length !== task.outputs.length) work = fresh();
  fill($("prompt"), task.prompt);
  draw();
}

function fill(element, text) { // as text, never as markup
  element.replaceChildren();
  element.scrollTop = 0;
  if (typeof text === "string") {
    if (text.trim()) element.textContent = text;
    else nothing(element);
    return;
  }
  for (const message of text) {
    const role = document.createElement("span");
    role.className = "role";
    role.textContent = message.role;
    const said = document.createElement("div");
    if (message.content.trim()) said.textContent = message.content;
    else nothing(said);
    element.append(role, said);
  }
}

function nothing(element) {
  const mark = document.createElement("span");
  mark.className = "nothing";
  mark.textContent = "(nothing was said)";
  element.append(mark);
}

function draw() {
  const outputs = task.outputs.length;
  $("steps").hidden = !outputs;
  $("rate").hidden = !outputs || work.step !== "rate";
  $("rank").hidden = !outputs || work.step !== "rank";
  $("write").classList.toggle("main", !outputs);
  $("steps").replaceChildren(...task.outputs.map((_, k) => {
    const button = document.createElement("button");
    button.textContent = LETTERS[k];
    button.classList.toggle("rated", work.ratings[k] !== null);
    if (work.step === "rate" && work.place === k) button.setAttribute("aria-current", "step");
    button.onclick = () => goTo(k);
    return button;
  }));
  if (!outputs) return;
  if (work.step === "rate") drawRating();
  else drawRanks();
}

function drawRating() {
  const k = work.place;
  fill($("output"), task.outputs[k]);
  for (const input of document.querySelectorAll("#rating input")) input.checked = Number(input.value) === work.ratings[k];
  for (const input of document.querySelectorAll("#questions input")) input.checked = work.metadata[k][input.name];
  $("back").disabled = k === 0;
  $("forward").disabled = work.ratings[k] === null;
}

// What is on its way stays as it was sent
function rate(value) { if (!sending) { work.ratings[work.place] = value; keep(); } draw(); }
function answer(name, value) { if (!sending) { work.metadata[work.place][name] = value; keep(); } draw(); }
function goTo(k) { if (sending || !(k in task.outputs)) return; work.step = "rate"; work.place = k; keep(); draw(); }

function forward() {
  if (work.ratings[work.place] === null) return say("rate this output first", true);
  const open = work.ratings.findIndex((value) => value === null);
  if (work.place + 1 < task.outputs.length) work.place += 1;
  else if (open >= 0) work.place = open;
  else {
    work.step = "rank";
    work.groups ||= byRating();
  }
  keep();
  draw();
  if (work.step === "rank") document.querySelector(".card").focus();
}

function byRating() { // where ranking starts: the better rated above, equal ratings tied
  const levels = [...new Set(work.ratings)].sort((a, b) => b - a);
  return levels.map((level) => work.ratings.flatMap((value, k) => (value === level ? [k] : [])));
}

// Ranking: `groups` are the ranks from the best, each with the outputs that tie

function drawRanks() {
  const rows = [gap(0)];
  work.groups.forEach((group, level) => {
    const row = document.createElement("div");
    row.className = "level";
    row.dataset.level = level;
    const number = document.createElement("div");
    number.className = "number";
    number.textContent = level + 1;
    row.append(number, ...group.map(card));
    rows.push(row, gap(level + 1));
  });
  $("ranks").replaceChildren(...rows);
}

function gap(before) {
  const element = document.createElement("div");
  element.className = "gap";
  element.dataset.before = before;
  return element;
}

function card(k) {
  const element = document.createElement("div");
  element.className = "card";
  element.tabIndex = 0;
  element.dataset.output = k;
  element.setAttribute("aria-label", `output ${LETTERS[k]}, rank ${levelOf(k) + 1}`);
  const head = document.createElement("div");
  head.className = "head";
  head.append(LETTERS[k], document.createElement("span"));
  head.lastChild.textContent = `rated ${work.ratings[k]}`;
  const text = document.createElement("div");
  text.className = "text";
  text.dir = "auto";
  fill(text, task.outputs[k]);
  element.append(head, text);
  element.onpointerdown = (event) => drag(event, k, element);
  return element;
}

function levelOf(k) { return work.groups.findIndex((group) => group.includes(k)); }

function move(k, change) {
  if (sending) return;
  const before = JSON.stringify(work.groups);
  const groups = work.groups.map((group) => group.filter((other) => other !== k));
  change(groups);
  work.groups = groups.filter((group) => group.length);
  if (JSON.stringify(work.groups) !== before) work.history.push(JSON.parse(before));
  keep();
  drawRanks();
  document.querySelector(`.card[data-output="${k}"]`).focus();
}

function tie(k, level) { if (level < work.groups.length) move(k, (groups) => groups[level].push(k)); }
function put(k, before) { move(k, (groups) => groups.splice(before, 0, [k])); }

function step(k, up) { // half steps: out of a tie to a rank of its own, from that into the next rank
  const level = levelOf(k);
  if (work.groups[level].length > 1) return put(k, up ? level : level + 1);
  const other = up ? level - 1 : level + 1;
  if (other >= 0 && other < work.groups.length) tie(k, other);
}

function drag(event, k, element) {
  if (event.button !== 0 || sending) return;
  const start = [event.clientX, event.clientY];
  let ghost = null;
  const target = (at) => document.elementsFromPoint(at.clientX, at.clientY).find((one) => one.matches(".gap, .level"));
  const mark = (one) => {
    for (const other of document.querySelectorAll(".here")) other.classList.remove("here");
    if (one) one.classList.add("here");
  };
  const onMove = (at) => {
    if (!ghost) {
      if (Math.hypot(at.clientX - start[0], at.clientY - start[1]) < 5) return;
      ghost = element.cloneNode(true);
      ghost.classList.add("ghost");
      document.body.append(ghost);
      element.classList.add("dragged");
    }
    ghost.style.left = `${at.clientX + 8}px`;
    ghost.style.top = `${at.clientY + 8}px`;
    mark(target(at));
    if (at.clientY > innerHeight - 60) scrollBy(0, 12);
    if (at.clientY < 100) scrollBy(0, -12);
  };
  const end = (at) => {
    element.removeEventListener("pointermove", onMove);
    mark(null);
    element.classList.remove("dragged");
    if (!ghost) return element.focus();
    ghost.remove();
    const where = at.type === "pointerup" && target(at);
    if (!where) return;
    if (where.matches(".gap")) put(k, Number(where.dataset.before));
    else tie(k, Number(where.dataset.level));
  };
  element.setPointerCapture(event.pointerId);
  element.addEventListener("pointermove", onMove);
  element.addEventListener("pointerup", end, { once: true });
  element.addEventListener("pointercancel", end, { once: true });
}

async function save() {
  if (sending || work.step !== "rank") return;
  const ranks = task.outputs.map((_, k) => levelOf(k) + 1);
  const seconds = Math.max(0, (Date.now() - work.started) / 1000);
  if ((await send("ranking", { ranks, ratings: work.ratings, metadata: work.metadata, seconds })) !== "kept") await next(true);
}

// What else goes wrong is said too
window.addEventListener("unhandledrejection", (event) => say(event.reason.message, true));

// Keys and buttons

function typing() { return !!document.querySelector("dialog[open]") || document.activeElement.matches("input:not([type=radio]):not([type=checkbox]), textarea, select"); }

document.addEventListener("keydown", (event) => {
  if (!task || sending || typing() || $("work").hidden || !task.outputs.length) return;
  const letter = event.key.length === 1 ? event.key.toLowerCase() : "";
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  if (work.step === "rate") keyInRating(event, letter, plain);
  else keyInRanking(event, letter, plain);
});

function keyInRating(event, letter, plain) {
  const onButton = document.activeElement.matches("button");
  const name = Object.keys(questions)["abcdefghijk".indexOf(letter)];
  if (plain && letter >= "1" && letter <= "7") rate(Number(letter));
  else if (plain && letter && name) answer(name, !work.metadata[work.place][name]);
  else if (plain && (event.key === "ArrowRight" || (event.key === "Enter" && !onButton))) forward();
  else if (plain && event.key === "ArrowLeft" && work.place) goTo(work.place - 1);
  else return;
  event.preventDefault();
}

function keyInRanking(event, letter, plain) {
  const focused = document.activeElement.closest(".card");
  const k = focused && Number(focused.dataset.output);
  const chosen = letter && document.querySelector(`.card[data-output="${LETTERS.toLowerCase().indexOf(letter)}"]`);
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") save();
  else if ((event.ctrlKey || event.metaKey) && letter === "z") {
    if (work.history.length) { work.groups = work.history.pop(); keep(); drawRanks(); }
  } else if (plain && chosen) chosen.focus();
  else if (plain && focused && event.key === "ArrowUp") step(k, true);
  else if (plain && focused && event.key === "ArrowDown") step(k, false);
  else if (plain && focused && letter >= "1" && letter <= "9") tie(k, Number(letter) - 1);
  else return;
  event.preventDefault();
}

$("back").onclick = () => goTo(work.place - 1);
$("forward").onclick = forward;
$("to-rate").onclick = () => goTo(0);
$("save").onclick = save;
$("undo").onclick = undo;
$("again").onclick = () => next();
$("who").onclick = () => { localStorage.removeItem("labeler"); location.reload(); };
$("skip").onclick = () => { $("reason-text").value = ""; $("skip-dialog").showModal(); };
$("write").onclick = () => { $("demonstration").value = localStorage.getItem(draftKey() + ":text") || ""; $("write-dialog").showModal(); };
$("demonstration").oninput = () => localStorage.setItem(draftKey() + ":text", $("demonstration").value);
for (const button of document.querySelectorAll("dialog .close")) button.onclick = () => button.closest("dialog").close();

$("skip-form").onsubmit = async (event) => {
  const reason = [$("reason").value, $("reason-text").value.trim()].filter(Boolean).join(": ");
  if (!reason) { event.preventDefault(); $("reason-text").focus(); return; }
  if ((await send("skip", { reason: reason.toWellFormed() })) !== "kept") await next(true);
};

$("write-form").onsubmit = async (event) => {
  const text = $("demonstration").value;
  if (!text.trim()) { event.preventDefault(); return; }
  const draft = draftKey() + ":text";
  if ((await send("demonstration", { text: text.toWellFormed() })) !== "saved") return;
  localStorage.removeItem(draft);
  if (task.outputs.length) showProgress((await untilAnswered(`/api/next?labeler=${encodeURIComponent(labeler)}`)).progress);
  else await next(true);
};

$("hello-form").onsubmit = (event) => {
  event.preventDefault();
  labeler = $("name").value.trim().toWellFormed();
  if (!labeler) return;
  localStorage.setItem("labeler", labeler);
  start();
};

async function start() {
  $("who").textContent = labeler || "labeler";
  $("hello").hidden = !!labeler;
  if (!labeler) return $("name").focus();
  questions = await untilAnswered("/api/questions");
  for (let value = 1; value <= 7 && !$("rating").querySelector("input[value='7']"); value++) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "rating", value });
    input.onchange = () => rate(value);
    label.append(input, String(value));
    $("rating").append(label);
  }
  if (!$("questions").querySelector("input")) {
    Object.entries(questions).forEach(([name, text], number) => {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "checkbox", name });
      input.onchange = () => answer(name, input.checked);
      const hint = document.createElement("kbd");
      hint.textContent = "abcdefghijk"[number];
      label.append(input, " ", hint, " ", text);
      $("questions").append(label);
    });
  }
  await flush();
  await next(true);
}

start();
