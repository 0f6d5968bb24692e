/* The list of pictures: those that are being drawn, then those that are kept. One of them is chosen. */

import { MOST_PICTURES, Store } from "./store.js";

const $ = (id) => document.getElementById(id);
const list = $("history");
const elements = new Map(); // item -> its element; the items are in the order of the list
const saved = new Set(); // ids of items that the store had
let store = null; // null: this browser keeps nothing
let chosen = null;
let choose = () => {}; // is told of each choice
let gone = () => {}; // is told when the chosen picture is removed

/* Shows what is kept. `onChoose` is called with the item that the user chooses, `onGone` when that was removed. */
export async function openHistory(onChoose, onGone) {
  [choose, gone] = [onChoose, onGone];
  try {
    store = await Store.open(synchronise);
    await synchronise();
    $("past-help").textContent = `This browser alone keeps them and their prompts: the last ${MOST_PICTURES}, or fewer ` +
      "large ones.";
  } catch {
    keepNothing();
  }
}

function keepNothing() {
  store = null;
  $("past-help").textContent = "This browser cannot keep them: a reload removes them. Download what you need.";
}

/* Makes the list what is kept: another tab may have added or removed pictures. */
async function synchronise() {
  const kept = await store.all(), ids = new Set(kept.map(({ id }) => id));
  const known = new Set([...elements.keys()].map(({ id }) => id));
  for (const item of elements.keys()) if (saved.has(item.id) && !ids.has(item.id)) removeElement(item);
  for (const id of ids) saved.add(id);
  const missing = kept.filter(({ id }) => !known.has(id));
  for (const entry of missing) addElement({ ...entry, url: URL.createObjectURL(entry.file) });
}

/* Adds what is being drawn: {id, body, url or null}. */
export const addTask = (task) => addElement(task);

export const removeTask = (task) => removeElement(task);

/* Puts a finished picture in the place of its task, and keeps it. */
export async function finishTask(task, entry) {
  const hadFocus = elements.get(task)?.contains(document.activeElement), wasChosen = task === chosen;
  removeElement(task, false);
  addElement(entry);
  if (wasChosen) mark(entry);
  if (hadFocus) elements.get(entry).focus();
  if (!store) return;
  const { url, ...kept } = entry;
  try {
    const over = await store.add(kept);
    saved.add(entry.id);
    for (const id of over) {
      for (const item of elements.keys()) if (item.id === id) removeElement(item);
    }
  } catch { keepNothing(); }
}

export async function removeEntry(entry) {
  const items = [...elements.keys()], place = items.indexOf(entry);
  const next = items[place + 1] || items[place - 1];
  if (next) select(next); else gone();
  removeElement(entry, false);
  if (store) await store.remove(entry.id);
}

export async function clearHistory() {
  for (const item of [...elements.keys()]) if (item.file) removeElement(item, false);
  gone();
  if (store) await store.clear();
}

/* Shows a picture's preview in the list. */
export function showPreview(task) {
  const thumb = elements.get(task)?.querySelector(".thumb");
  if (!thumb) return;
  const image = thumb.querySelector("img") || thumb.appendChild(new Image());
  image.alt = ""; image.src = task.url;
  thumb.querySelector("span")?.remove();
}

/* Marks an item, or none, as the chosen one. */
export function mark(item) {
  chosen = item;
  for (const [each, element] of elements) element.setAttribute("aria-selected", String(each === item));
  const stop = elements.get(item) || list.firstElementChild; // the one place of the list that Tab reaches
  for (const element of list.children) element.tabIndex = element === stop ? 0 : -1;
}

export const has = (item) => elements.has(item);

export const newest = () => [...elements.keys()].find(({ file }) => file) || null;

function select(item, focus = false) {
  mark(item);
  const element = elements.get(item);
  if (focus) element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest" });
  choose(item); // last: it scrolls to the picture
}

function addElement(item) {
  const element = document.createElement("li"), thumb = document.createElement("div");
  const text = document.createElement("span");
  element.setAttribute("role", "option");
  thumb.className = "thumb";
  text.textContent = item.body.prompt || "(no words)";
  if (item.url) thumb.append(Object.assign(new Image(), { src: item.url, alt: "", loading: "lazy" }));
  else thumb.append(Object.assign(document.createElement("span"), { textContent: "…" }));
  element.append(thumb, text);
  element.addEventListener("click", () => select(item, true));
  const after = [...elements].find(([each]) => each.id < item.id)?.[1] || null;
  list.insertBefore(element, after);
  elements.set(item, element);
  sort();
}

function removeElement(item, release = true) {
  const element = elements.get(item);
  if (!element) return;
  element.remove();
  elements.delete(item);
  if (release && item.url && item !== chosen) URL.revokeObjectURL(item.url);
  if (release && item === chosen && item.file) gone();
  sort();
}

/* Keeps the order of the items that of the list. */
function sort() {
  const items = [...elements].sort(([a], [b]) => (a.id < b.id ? 1 : -1));
  elements.clear();
  for (const [item, element] of items) elements.set(item, element);
  $("past").hidden = elements.size === 0;
  mark(chosen);
}

/* Moves the choice by the arrow keys: in the list in all directions, elsewhere on the page left and right. */
export function moveByKey(event) {
  const inList = list.contains(event.target);
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || elements.size === 0) return;
  if (!inList && event.target.closest("input, textarea, select, summary, dialog, canvas")) return;
  const items = [...elements.keys()], place = items.indexOf(chosen), first = list.firstElementChild;
  const columns = [...list.children].filter((each) => each.offsetTop === first.offsetTop).length;
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  if (inList) Object.assign(steps, { ArrowUp: -columns, ArrowDown: columns, Home: -place, End: items.length - 1 - place });
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = items[place < 0 ? 0 : place + steps[event.key]];
  if (next) select(next, inList);
}
