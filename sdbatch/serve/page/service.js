/* The service's API: requests with the key, streams of events, and errors. */

import { tab } from "./store.js";

let key = tab.get("key") || ""; // until the tab is closed: others may use this browser

export const hasKey = () => key !== "";

export function useKey(text) {
  key = text;
  tab.set("key", key);
}

/* An error response, an error in a stream (status 0), or a lost connection (code no_connection or interrupted). */
export class ServiceError extends Error {
  constructor(status, error, headers = new Headers()) {
    super(error.message || "");
    this.status = status;
    this.code = error.code;
    this.faults = error.details || (error.message ? [error] : []); // {message, param} of each
    this.seconds = Number(headers.get("Retry-After")) || null; // until a retry makes sense
    this.requestId = headers.get("X-Request-ID");
  }
}

async function request(path, options = {}, type = null) {
  const headers = { ...(type && { "Content-Type": type }), ...(key && { Authorization: "Bearer " + key }) };
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new ServiceError(0, { code: "no_connection" });
  });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({})); // a proxy between us may answer anything
  throw new ServiceError(answer.status, body.error || {}, answer.headers);
}

export async function describeModel() {
  return parse(await (await request("v1/models")).text()).data[0];
}

export async function describeJob(body) {
  const options = { method: "POST", body: json(body) };
  return (await request("v1/images/job_file", options, "application/json")).text();
}

/* Draws an image; yields {step, steps}, {queue_position}, previews, and at last the image. `form`, if given, makes the
   multipart form of an image that starts from a picture. */
export async function* drawEvents(body, form, signal) {
  const wanted = { ...body, stream: true, partial_images: 3 };
  const answer = form
    ? await request("v1/images/edits", { method: "POST", signal, body: await form(wanted) })
    : await request("v1/images/generations", { method: "POST", signal, body: json(wanted) }, "application/json");
  for await (const event of events(answer.body)) {
    const drawn = parse(event);
    if (drawn.error) throw new ServiceError(0, drawn.error);
    yield drawn;
    if (drawn.type?.endsWith(".completed")) return;
  }
  throw new ServiceError(0, { code: "interrupted" });
}

/* Yields the JSON of each event and of each comment. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new ServiceError(0, { code: "interrupted" });
    });
    if (done) return;
    rest += value;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      for (const line of rest.slice(0, end).split("\n")) {
        const text = /^(?:data)?: (\{.*)/.exec(line);
        if (text) yield text[1];
      }
    }
  }
}

/* Numbers have up to 63 bits, and JavaScript's 53: long ones are read as text, and the seed is written as its digits. */
function parse(text) {
  return JSON.parse(text.replace(/("(?:seed|maximum)": ?)(\d{16,})/g, '$1"$2"'));
}

function json({ seed, ...rest }) {
  const text = JSON.stringify(rest);
  return seed === undefined ? text : text.slice(0, -1) + ',"seed":' + seed + "}";
}

export function imageFile(drawn) {
  const bytes = Uint8Array.from(atob(drawn.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: "image/" + drawn.output_format });
}
