/* The page at /: starts, draws, and joins its parts. */

import { bodies, check, goToError, markAll, mark as markField, prepareFields, save, setDefaults, useModel, useValues }
  from "./fields.js";
import { addTask, clearHistory, finishTask, has, mark, moveByKey, newest, openHistory, removeEntry, removeTask,
  showPreview } from "./history.js";
import { clearPaint, pictureForm, removePicture, setPicture } from "./picture.js";
import { describeJob, describeModel, drawEvents, hasKey, imageFile, useKey } from "./service.js";
import { showEntry, showNothing, showTask } from "./stage.js";
import { tab } from "./store.js";
import { count, explain } from "./words.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4; // browsers open six connections to a service, and other tabs need some
const INTERRUPTED = "sdbatch drawing " + location.pathname; // in the tab's storage while it draws
let running = null; // {controller, tasks, follows}
let shown = null; // the item on the stage
let retry = null; // what "Try again" does
let clock = null; // of the countdown
let taking = true; // when the picture to start from is read: whether it could be

function say(text, bad = false) {
  $("status").textContent = text;
  $("news").classList.toggle("bad", bad);
  $("steps").textContent = "";
  stopCountdown();
}

/* Says what failed; offers to try again, at once or when the service asks for it. */
function sayError(error, again, before = "") {
  const { text, fields, seconds, retry: canRetry } = explain(error, hasKey());
  say(before + text, true);
  markAll(fields);
  goToError();
  if (error.status === 401) showKeyForm();
  if (!canRetry) return;
  retry = again;
  $("retry").hidden = false;
  if (seconds) countDown(seconds);
}

function countDown(seconds) {
  const end = performance.now() + seconds * 1000;
  $("retry").setAttribute("aria-disabled", "true");
  const tick = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    $("countdown").textContent = left > 0 ? `Try again in ${left} s.` : "You can try again now.";
    if (left > 0) return;
    clearInterval(clock);
    $("retry").setAttribute("aria-disabled", "false");
  };
  tick();
  clock = setInterval(tick, 250);
}

function stopCountdown() {
  clearInterval(clock);
  retry = null;
  $("countdown").textContent = "";
  $("retry").hidden = true;
  $("retry").setAttribute("aria-disabled", "false");
}

async function start() {
  say("Connecting …");
  try {
    const model = await describeModel();
    $("for-key").hidden = true;
    $("change-key").hidden = !hasKey();
    markField("key", "");
    useModel(model);
    $("model").textContent = model.id;
    $("draw").disabled = false;
    const wasInterrupted = tab.get(INTERRUPTED);
    tab.remove(INTERRUPTED);
    say(wasInterrupted ? "The page was left while it drew, which cancelled the drawing. Draw again." : "Ready.");
  } catch (error) {
    if (!("status" in error)) throw error;
    sayError(error, start);
  }
}

function showKeyForm() {
  $("for-key").hidden = false;
  $("key").focus();
}

function sendKey(event) {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    return markField("key", key ? "A key has only letters, digits and signs without accents." : "Enter a key.");
  }
  useKey(key);
  start();
}

async function drawForm() {
  if (!await taking) return;
  if (running || $("draw").disabled) return;
  const text = check();
  if (text) { say(text, true); return goToError(); }
  save();
  const form = pictureForm(), now = Date.now() * 100, random = Math.random().toString(36).slice(2, 8);
  run(bodies().map((body, i) => ({ body, form, url: null, step: 0, steps: 0, id: `${now + 99 - i}-${random}` })));
}

/* Draws images, some at a time, and shows what comes of them. */
async function run(tasks) {
  const controller = new AbortController(), before = shown;
  running = { controller, tasks, follows: true, began: performance.now() };
  tab.set(INTERRUPTED, "yes");
  setBusy(true);
  say("Waiting …");
  for (const task of tasks) addTask(task);
  follow();
  bringIntoView();
  const left = [...tasks], failed = [];
  const work = async () => {
    for (let task; !failed.length && (task = left.shift());) {
      try { await draw(task, controller.signal); }
      catch (error) { failed.push([task, error]); }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  const { follows, began } = running;
  running = null;
  tab.remove(INTERRUPTED);
  setBusy(false);
  conclude({ tasks, undrawn: [...failed.map(([task]) => task), ...left], failed, follows, began, before });
}

/* Says how a run ended, and shows its picture, or none if it failed. */
function conclude({ tasks, undrawn, failed, follows, began, before }) {
  const drawn = tasks.length - undrawn.length, seconds = ((performance.now() - began) / 1000).toFixed(1);
  for (const task of undrawn) removeTask(task);
  const first = tasks.find(({ entry }) => entry)?.entry;
  if (follows && first) display(first);
  if (!undrawn.length) {
    say(tasks.length > 1 ? `${count(drawn, "picture")} drawn in ${seconds} s.` : `Drawn in ${seconds} s.`);
    return;
  }
  const errors = failed.map(([, error]) => error), error = errors.find(({ name }) => name !== "AbortError");
  if (!error) {
    say(drawn ? `Cancelled; ${drawn} of ${tasks.length} were drawn.` : "Cancelled.");
    if (undrawn.includes(shown)) display(first || (before?.file && has(before) ? before : null));
    return;
  }
  if (!("status" in error)) throw error; // a fault of the page: into the console
  const again = () => run(undrawn.map((task) => ({ ...task, url: null, step: 0, steps: 0 })));
  if (undrawn.includes(shown)) display(first || null, "No picture was drawn.");
  sayError(error, again, drawn ? `${drawn} of ${tasks.length} were drawn. ` : "");
}

async function draw(task, signal) {
  const began = performance.now();
  for await (const event of drawEvents(task.body, task.form, signal)) {
    if (event.b64_json === undefined) { progress(task, event); continue; }
    const file = imageFile(event), old = task.url;
    task.url = URL.createObjectURL(file);
    if (event.type.endsWith(".partial_image")) {
      showPreview(task);
      if (shown === task) showTask(task);
      else if (running.follows) follow();
    } else await finish(task, event, file, performance.now() - began);
    if (old) URL.revokeObjectURL(old);
  }
}

async function finish(task, event, file, milliseconds) {
  const { b64_json: _, usage: __, ...facts } = event;
  const [width, height] = event.size.split("x").map(Number);
  Object.assign(facts, { width, height, seconds: (milliseconds / 1000).toFixed(1) });
  const { id, url } = task, body = { ...task.body, seed: String(event.seed) };
  const entry = { id, url, body, facts, file, edited: task.form !== null };
  Object.assign(task, { entry, done: true });
  if (!$("lock").checked) $("seed").value = body.seed;
  const wasShown = shown === task;
  const kept = finishTask(task, entry);
  if (wasShown) display(entry);
  if (running.follows) follow();
  await kept;
}

/* Shows the first image that is not finished; when all are, the last one that was shown stays. */
function follow() {
  const next = running.tasks.find(({ done }) => !done);
  if (next && shown !== next) display(next);
}

function progress(task, event) {
  if (event.steps) Object.assign(task, { step: event.step, steps: event.steps });
  const { tasks } = running, done = tasks.filter((each) => each.done).length;
  const share = tasks.reduce((sum, each) => sum + (each.done ? 1 : each.steps ? each.step / each.steps : 0), 0);
  if (event.steps) {
    $("progress").value = share / tasks.length;
    if ($("status").textContent !== "Drawing.") $("status").textContent = "Drawing.";
    $("steps").textContent = (tasks.length > 1 ? `${done} of ${tasks.length} are drawn. ` : "") +
      `Step ${event.step} of ${event.steps}`;
  } else if (event.queue_position && !share) {
    $("status").textContent = "Waiting.";
    $("steps").textContent = `${count(event.queue_position, "picture")} before this one`;
  }
}

function setBusy(busy) {
  $("draw").setAttribute("aria-disabled", String(busy));
  $("cancel").setAttribute("aria-disabled", String(!busy));
  $("progress").hidden = !busy;
  $("progress").removeAttribute("value");
  document.title = busy ? "Drawing … sdbatch" : "sdbatch";
}

/* Puts an item on the stage, or nothing, and marks it in the list. */
function display(item, text = "Your picture appears here.") {
  shown = item;
  mark(item);
  if (!item) showNothing(text);
  else if (item.file) showEntry(item);
  else showTask(item);
}

function chooseItem(item) {
  if (running) running.follows = !item.file;
  display(item);
  bringIntoView();
}

/* Scrolls to the picture, unless all of it is in sight. */
function bringIntoView() {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const [frame, bar, side] = ["frame", "bar", "side"].map((id) => $(id).getBoundingClientRect());
  const end = bar.right <= side.left ? innerHeight : bar.top; // in a narrow window the bar is under the picture
  if (frame.top >= Math.max(0, side.top) && frame.bottom <= end) return;
  $("stage").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
}

function cancel() {
  running?.controller.abort();
}

/* Takes a file as the picture to start from. What is drawn meanwhile waits for it; if it cannot be read, nothing is. */
async function takePicture(file) {
  if ($("draw").disabled) return;
  taking = setPicture(file).then(() => true, (error) => { say(error.message, true); return false; });
  const isTaken = await taking;
  taking = true;
  if (!isTaken) return;
  save();
  $("picture").scrollIntoView({ block: "nearest" });
}

async function copy() {
  try {
    $("job").value = await describeJob(shown.body);
    $("for-job").hidden = false;
    try { await navigator.clipboard.writeText($("job").value); }
    catch { $("job").select(); document.execCommand("copy"); } // without TLS there is no clipboard
    say("Copied.");
  } catch (error) {
    if (!("status" in error)) throw error;
    sayError(error, copy);
  }
}

function again() {
  useValues(shown.body);
  say("These values are in the form now.");
  $("prompt").focus();
}

/* Takes the picture of a drop or a paste. A paste of text with a picture into a field is a paste of text. */
function receive(event) {
  const data = event.dataTransfer || event.clipboardData, isDrop = event.type === "drop";
  const file = [...data.files].find((each) => each.type.startsWith("image/"));
  document.body.classList.remove("over");
  if (!isDrop && (!file || (data.types.includes("text/plain") && event.target.closest?.("input, textarea")))) return;
  event.preventDefault();
  if (file) takePicture(file);
  else say("That is not a picture's file.", true);
}

function listen() {
  const on = (id, event, work) => $(id).addEventListener(event, work);
  on("for-key", "submit", sendKey);
  on("change-key", "click", showKeyForm);
  on("form", "submit", (event) => { event.preventDefault(); drawForm(); });
  on("cancel", "click", cancel);
  on("retry", "click", () => { if ($("retry").ariaDisabled !== "true" && !running) retry(); });
  on("copy", "click", copy);
  on("again", "click", again);
  on("from", "click", () => takePicture(shown.file));
  on("forget", "click", () => removeEntry(shown));
  on("clear-history", "click", () => $("sure").showModal());
  on("sure", "close", () => { if ($("sure").returnValue === "delete") clearHistory(); });
  on("reset", "click", () => { setDefaults(); save(); say("All settings are as the service's own."); });
  on("seed", "input", () => { $("lock").checked = $("seed").value !== ""; });
  on("choose", "click", () => $("file").click());
  on("file", "change", () => { if ($("file").files[0]) takePicture($("file").files[0]); $("file").value = ""; });
  on("clear", "click", clearPaint);
  on("remove", "click", removePicture);
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("over");
  });
  document.addEventListener("drop", receive);
  document.addEventListener("paste", receive);
  document.addEventListener("keydown", (event) => {
    if ($("sure").open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); drawForm(); }
    else if (event.key === "Escape" && running) cancel();
    else moveByKey(event);
  });
}

$("settings").open = matchMedia("(min-width: 46rem)").matches;
prepareFields();
listen();
await Promise.all([start(), openHistory(chooseItem, () => { if (!running) display(null); })]);
if (!shown && newest()) display(newest());
