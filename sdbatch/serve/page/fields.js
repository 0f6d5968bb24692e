/* The fields of the form: their values, their limits, what is wrong with them, and what survives a reload. */

import { LABELS, count, grouped, summary } from "./words.js";

const $ = (id) => document.getElementById(id);
const TEXTS = ["prompt", "negative_prompt"];
const SIDES = ["width", "height"];
const WHOLE = ["num_inference_steps", "width", "height", "n"];
const NUMBERS = [...WHOLE, "guidance_scale", "strength"];
const SENT = [...TEXTS, "num_inference_steps", "guidance_scale", "width", "height", "sampler", "strength"];
const KEPT = [...SENT, "n", "seed", "only_masked", "lock", "exact"];
const PLACE = "sdbatch form " + location.pathname; // two services may have one address
let model = null; // as the service describes it

/* Gives each field a place for its error, which screen readers find. */
export function prepareFields() {
  for (const field of document.querySelectorAll(".field")) {
    const input = field.querySelector(":scope > :is(input, select, textarea, canvas), :scope > .row > input");
    if (!input || field.id === "for-job") continue;
    const error = document.createElement("p");
    error.className = "error"; error.id = input.id + "-error"; error.hidden = true;
    field.append(error);
    const help = field.querySelector(":scope > .help");
    if (help) help.id ||= input.id + "-help";
    input.setAttribute("aria-describedby", [help?.id, error.id].filter(Boolean).join(" "));
    input.addEventListener("input", () => { mark(input.id, ""); recheck(input.id); });
  }
  for (const id of SIDES) {
    $(id).setAttribute("aria-describedby", `${id}-error size-error size-help`);
    $(id).addEventListener("input", () => mark("size", ""));
  }
  $("form").addEventListener("input", save);
  $("form").addEventListener("change", summarise);
}

/* Shows the model's limits, and its defaults unless the form was kept for this model. */
export function useModel(described) {
  const isFirst = model === null, { limits } = model = described;
  if (isFirst) for (const [name, title] of Object.entries(model.samplers)) $("sampler").add(new Option(title, name));
  for (const id of NUMBERS) {
    $(id).min = limits[id].minimum; $(id).max = limits[id].maximum;
    if (limits[id].multiple_of) $(id).step = limits[id].multiple_of;
  }
  const perMinute = limits.images_per_minute?.maximum, side = Math.floor(Math.sqrt(limits.pixels.maximum));
  $("n-help").textContent = `up to ${limits.n.maximum} at once` + (perMinute ? `, ${perMinute} a minute` : "");
  $("num_inference_steps-help").textContent = `up to ${limits.num_inference_steps.maximum}`;
  $("size-help").textContent = `In pixels, each a multiple of ${limits.width.multiple_of}. Width times height: up to ` +
    `${grouped(limits.pixels.maximum)}, as ${side} × ${Math.floor(limits.pixels.maximum / side)}.`;
  if (!isFirst) return;
  setDefaults();
  const kept = readKept();
  for (const id of kept.model === model.id ? KEPT : TEXTS) if (id in kept) setValue(id, kept[id]);
  summarise();
}

/* Returns the number of pixels that the model's own images have. */
export const defaultArea = () => model.defaults.width * model.defaults.height;

export function setDefaults() {
  for (const id of SENT) if (id !== "prompt") setValue(id, model.defaults[id]);
  for (const [id, value] of [["n", 1], ["seed", ""], ["lock", false], ["exact", false], ["only_masked", false]]) {
    setValue(id, value);
  }
}

export function setValue(id, value) {
  if ($(id).type === "checkbox") $(id).checked = value;
  else $(id).value = value;
  mark(id, "");
  summarise();
}

/* Writes the values of an image that was drawn, so that it can be drawn again. */
export function useValues(body) {
  for (const id of SENT) setValue(id, body[id]);
  setValue("n", 1); setValue("seed", body.seed); setValue("lock", true); setValue("exact", !!body.exact);
  save();
}

/* Returns the bodies of the images that the form describes. */
export function bodies() {
  const body = {};
  for (const id of SENT) body[id] = NUMBERS.includes(id) ? Number($(id).value) : $(id).value;
  if ($("exact").checked) body.exact = true;
  const first = $("lock").checked && $("seed").value.trim() ? BigInt($("seed").value.trim()) : null;
  return Array.from({ length: Number($("n").value) }, (_, i) =>
    first === null ? { ...body } : { ...body, seed: String(first + BigInt(i)) });
}

/* Marks the fields whose values cannot be drawn; returns a sentence about them, or "". */
export function check() {
  const found = new Map();
  for (const id of Object.keys(LABELS)) mark(id, "");
  for (const id of [...TEXTS, ...NUMBERS, "seed"]) {
    const text = $(id).closest("[hidden]") ? "" : fault(id);
    mark(id, text);
    if (text) found.set(id, text);
  }
  const text = SIDES.some((id) => found.has(id)) ? "" : sizeFault();
  mark("size", text);
  if (text) found.set("size", text);
  return summary(found);
}

export function markAll(fields) {
  for (const [id, text] of fields) mark(id, text);
}

/* Brings the first marked field into view. */
export function goToError() {
  const field = document.querySelector("#form [aria-invalid='true']");
  if (!field) return;
  if ($("settings").contains(field)) $("settings").open = true;
  field.focus({ preventScroll: true });
  field.scrollIntoView({ block: "center" });
}

/* Shows an error next to a field; "" removes it. The size has two fields, and the picture its canvas. */
export function mark(id, text) {
  const inputs = { size: SIDES, picture: ["canvas"] }[id] || [id], error = $((id === "picture" ? "canvas" : id) + "-error");
  if (!error) return;
  error.textContent = text; error.hidden = !text;
  for (const input of inputs) {
    if (text) $(input).setAttribute("aria-invalid", "true");
    else if (id === "size" && $(input + "-error").textContent) continue; // its own error stays
    else $(input).removeAttribute("aria-invalid");
  }
}

/* Says at once what is wrong with a prompt that is too long; of numbers, when they are complete. */
function recheck(id) {
  if (!model || !TEXTS.includes(id)) return;
  mark(id, fault(id));
}

function fault(id) {
  const text = $(id).value.trim(), label = LABELS[id], limit = model.limits[id];
  if (TEXTS.includes(id)) {
    const length = [...$(id).value].length; // in characters, as the service counts
    return length > limit.max_length
      ? `The text has ${count(length, "character")}, and at most ${grouped(limit.max_length)} are read. Shorten it.` : "";
  }
  if (id === "seed") return seedFault(text, limit);
  const { minimum, maximum, multiple_of: multiple } = limit, value = Number(text);
  const range = `from ${minimum} to ${maximum.toLocaleString("en")}`;
  if (!text || Number.isNaN(value)) return `${label} must be a number ${range}.`;
  if (value < minimum || value > maximum) return `${label} must be ${range}.`;
  if (WHOLE.includes(id) && !Number.isInteger(value)) return `${label} must be a whole number.`;
  if (multiple && value % multiple) {
    const below = Math.max(minimum, value - value % multiple);
    return `${label} must be a multiple of ${multiple}, such as ${below} or ${below + multiple}.`;
  }
  return "";
}

function seedFault(text, limit) {
  if (!$("lock").checked || !text) return "";
  const last = BigInt(limit.maximum) - BigInt(Math.max(1, Number($("n").value)) - 1);
  return /^\d{1,30}$/.test(text) && BigInt(text) <= last ? "" : `Seed must be a whole number from 0 to ${grouped(last)}.`;
}

function sizeFault() {
  const width = Number($("width").value), height = Number($("height").value);
  const most = model.limits.pixels.maximum, multiple = model.limits.width.multiple_of;
  if (width * height <= most) return "";
  const less = Math.floor(most / width / multiple) * multiple;
  return `The picture is too large: width times height may be up to ${grouped(most)}` +
    (less ? `, so at this width the height may be up to ${less}.` : ".");
}

function summarise() {
  $("summary").textContent = `${$("width").value} × ${$("height").value}, ${$("num_inference_steps").value} steps` +
    ($("n").value > 1 ? `, ${$("n").value} pictures` : "");
}

export function save() {
  if (!model) return;
  const kept = { model: model.id };
  for (const id of KEPT) kept[id] = $(id).type === "checkbox" ? $(id).checked : $(id).value;
  try { localStorage.setItem(PLACE, JSON.stringify(kept)); } catch { /* this browser keeps nothing */ }
}

function readKept() {
  try { return JSON.parse(localStorage.getItem(PLACE)) || {}; } catch { return {}; }
}
