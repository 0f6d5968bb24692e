/* What the page says of errors: sentences for people, about the fields on the page. */

export const LABELS = {
  prompt: "What to draw", negative_prompt: "What to avoid", n: "Pictures", num_inference_steps: "Steps",
  guidance_scale: "Guidance", width: "Width", height: "Height", sampler: "Sampler", seed: "Seed", strength: "How much to change",
  size: "Size", picture: "Picture",
};
const FIELD_OF = { image: "picture", mask: "picture" }; // a parameter that has another name here
const BY_CODE = {
  no_connection: "There is no connection to the service. It may be stopped, or the network is down.",
  interrupted: "The connection was lost before the picture was finished.",
  no_keys: "This service answers only the machine that it runs on. Ask whoever runs it for a key.",
  rate_limit_exceeded: "This key has drawn all the pictures that it may draw in a minute.",
  queue_share: "As many pictures of yours are waiting as one key may have.",
  overloaded: "Too many pictures are waiting.",
  stopping: "The service is being stopped or restarted.",
  replica_lost: "The machine that drew this picture has failed.",
  front_lost: "The service is being restarted.",
  timeout: "This took longer than the service allows. Try fewer steps, a smaller size or fewer pictures.",
  internal: "The service has a fault. Whoever runs it finds the reason in its log.",
  request_too_large: "The picture's file is too large. Choose a smaller one.",
};
const BY_STATUS = {
  403: "This key may not do that.",
  408: "The connection was too slow, and the service stopped waiting.",
  413: BY_CODE.request_too_large,
  429: "Too many requests were sent.",
  502: "The service cannot be reached at the moment.",
  503: "The service cannot draw at the moment.",
  504: BY_CODE.timeout,
};
const VALUE = /^[\w.]+ = (?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^:]*): (.*)$/s; // how the API begins: `steps = 151: ...`

/* Returns {text, fields, seconds, retry}: a sentence; the sentence of each field by the field's id; seconds until a
   retry makes sense, or null; whether one does. */
export function explain(error, hasKey) {
  const fields = new Map(), others = [];
  const { status, code, seconds, requestId } = error;
  if (status === 401) {
    const text = hasKey
      ? "The service does not know this key, or no longer accepts it. Check that it is complete."
      : "This service needs a key.";
    return { text, fields: new Map(hasKey ? [["key", text]] : []), seconds: null, retry: false };
  }
  const known = BY_CODE[code] || BY_STATUS[status];
  if (!known && (status === 400 || error.faults.some((fault) => fault.param))) {
    for (const fault of error.faults) {
      const id = FIELD_OF[fault.param] || fault.param;
      const text = aboutField(id, fault.message);
      if (LABELS[id] && !fields.has(id)) fields.set(id, text);
      else others.push(text);
    }
    return { text: [summary(fields), ...others].filter(Boolean).join(" "), fields, seconds: null, retry: false };
  }
  const mark = requestId && status >= 500 ? ` Tell them this number: ${requestId}.` : "";
  const text = known || error.message || `The service answered with the error ${status}.`;
  return { text: text + (code === "internal" ? mark : ""), fields, seconds, retry: status === 0 || status === 408 ||
    status === 429 || status >= 500 };
}

/* Returns one sentence about all marked fields. */
export function summary(fields) {
  if (fields.size < 2) return [...fields.values()].join("");
  return "Please correct: " + [...fields.keys()].map((id) => LABELS[id]).join(", ") + ".";
}

function aboutField(id, message) {
  const rest = VALUE.exec(message)?.[1];
  if (!rest || !LABELS[id]) return message;
  return LABELS[id] + (rest.startsWith("must") ? " " : ": ") + rest;
}

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
export const grouped = (number) => BigInt(number).toLocaleString("en");
