/* The place of the chosen picture: the picture or its preview, what it is, and what can be done with it. */

const $ = (id) => document.getElementById(id);

/* Shows a finished picture. */
export function showEntry({ url, body, facts, edited, file }) {
  showImage(url, body, facts.width, facts.height);
  $("title").textContent = body.prompt || "(no words)";
  $("values").textContent = [
    `${facts.width} × ${facts.height}`, `${body.num_inference_steps} steps`, `guidance ${body.guidance_scale}`,
    `seed ${body.seed}`, facts.seconds + " s",
  ].join(" · ");
  $("notes").textContent = notes(facts);
  $("download").href = url;
  $("download").download = fileName(body, file);
  $("copy").hidden = edited; // a job file names its pictures by their paths
  $("caption").hidden = $("tools").hidden = false;
  $("for-job").hidden = true;
}

/* Shows the newest preview of what is being drawn, or the place that it will fill. */
export function showTask({ url, body }) {
  hideEntry();
  if (url) showImage(url, body, body.width, body.height);
  else showEmpty("It is about to be drawn.", body.width / body.height);
}

export function showNothing(text) {
  hideEntry();
  showEmpty(text);
}

function hideEntry() {
  $("caption").hidden = $("tools").hidden = $("for-job").hidden = true;
}

function showImage(url, body, width, height) {
  shape(width / height);
  $("image").src = url;
  $("image").alt = body.prompt;
  $("image").hidden = false; $("empty").hidden = true;
  $("image").classList.toggle("small", width < 256);
}

function showEmpty(text, ratio = null) {
  shape(ratio);
  $("image").hidden = true; $("image").removeAttribute("src");
  $("empty").hidden = false;
  $("empty").textContent = text;
}

function shape(ratio) {
  $("frame").classList.toggle("none", ratio === null);
  if (ratio) $("frame").style.setProperty("--ratio", ratio);
}

function notes(facts) {
  return [
    facts.exact ? "Exactly as a batch run draws it." : "As a batch run draws it, except for rounding.",
    facts.prompt_truncated ? "The text was too long for the model, which did not read its end." : "",
    facts.decoded_again ? "It was decoded twice, as its numbers were too large the first time." : "",
    facts.nsfw ? "Marked as not safe for work." : "",
  ].filter(Boolean).join(" ");
}

/* Returns a name that says what is in the file: a-red-dog-seed-77.png. */
function fileName({ prompt, seed }, file) {
  const words = prompt.normalize("NFC").toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu) || [];
  let name = "";
  for (const word of words) {
    if (name.length + word.length > 48) break;
    name += word + "-";
  }
  return `${name || "sdbatch-"}seed-${seed}.${file.type.replace("image/", "")}`;
}
