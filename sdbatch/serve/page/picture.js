/* The picture that the next image starts from, and the paint over it. */

import { defaultArea, mark, setValue } from "./fields.js";

const $ = (id) => document.getElementById(id);
const MOST_BYTES = 31 * 2 ** 20; // of a picture's file, so that its mask has room
const MOST_SIDE = 1024; // of the canvas
const THINNEST = 3; // pixels of paint: less would leave no pixel of the mask transparent
const canvas = $("canvas");
let picture = null; // {file, bitmap, paint, last}

export const hasPicture = () => picture !== null;

/* Takes a file as the picture; raises an Error with a sentence if it cannot be one. */
export async function setPicture(file) {
  if (file.size > MOST_BYTES) throw new Error("The picture's file is larger than 31 MB. Choose a smaller one.");
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error("This browser cannot read the picture. Save it as PNG or JPEG.");
  });
  const { width, height } = bitmap;
  const small = Math.min(1, MOST_SIDE / Math.max(width, height)), drawn = Math.sqrt(defaultArea() / (width * height));
  canvas.width = Math.max(1, Math.round(width * small)); canvas.height = Math.max(1, Math.round(height * small));
  for (const [id, side] of [["width", width], ["height", height]]) {
    const multiple = Number($(id).step), nearest = multiple * Math.round(side * drawn / multiple);
    setValue(id, Math.min(Number($(id).max), Math.max(Number($(id).min), nearest)));
  }
  picture = { file, bitmap };
  mark("picture", "");
  $("picture").hidden = false;
  clearPaint();
}

export function removePicture() {
  picture = null;
  $("picture").hidden = true;
}

export function clearPaint() {
  picture.paint = null;
  showPicture();
}

function showPicture() {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture.bitmap, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = .6;
  if (picture.paint) context.drawImage(picture.paint, 0, 0);
  context.globalAlpha = 1;
}

/* Paints a line on the canvas, from the last place of the pointer to this one. */
function paint(event) {
  const box = canvas.getBoundingClientRect(), scale = box.width / canvas.width;
  const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
  picture.paint ||= new OffscreenCanvas(canvas.width, canvas.height);
  const context = picture.paint.getContext("2d"), [fromX, fromY] = event.type === "pointerdown" ? [x, y] : picture.last;
  context.strokeStyle = "#e03020"; context.lineCap = "round";
  context.lineWidth = Math.max(THINNEST, Math.max(canvas.width, canvas.height) * $("brush").value / 100);
  context.beginPath(); context.moveTo(fromX, fromY); context.lineTo(x + .01, y); context.stroke(); // + .01: a tap is a dot
  picture.last = [x, y];
  showPicture();
}

/* Returns the picture as it is now: what makes the form of /v1/images/edits. In the mask, what is painted is
   transparent. */
export function pictureForm() {
  if (!picture) return null;
  const { file, paint } = picture, onlyMasked = $("only_masked").checked;
  const mask = paint && maskOf(paint);
  return async (wanted) => {
    const form = new FormData();
    for (const [name, value] of Object.entries(wanted)) form.append(name, String(value));
    form.append("image", file, "picture");
    if (!mask) return form;
    form.append("mask", await mask, "mask.png");
    form.append("only_masked", String(onlyMasked));
    return form;
  };
}

function maskOf(paint) {
  const mask = new OffscreenCanvas(paint.width, paint.height), context = mask.getContext("2d");
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(paint, 0, 0);
  return mask.convertToBlob();
}

/* One finger, pen or the mouse's first button paints; a second finger does not continue the first one's line. */
canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  paint(event);
});
canvas.addEventListener("pointermove", (event) => { if (canvas.hasPointerCapture(event.pointerId)) paint(event); });
