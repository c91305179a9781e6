// What is asked of the server: its key, whether it is there, and answers as they are generated.
import { both, find, notify } from "./parts.js";

const KEY = "glmtune.key"; // of sessionStorage: closing the tab forgets it
const BEAT = 5000; // milliseconds between two looks whether the server is there
const BEAT_WHILE_GONE = 1500;

const key = () => sessionStorage.getItem(KEY);
const headers = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

export class Refused extends Error {} // with the server's own sentence
export class Gone extends Error {} // no answer at all

let waiting = null; // for a key that is being typed
let last = null; // the key that was refused

function askForKey() {
  waiting ??= new Promise((resolve) => {
    const dialog = find("key-wanted");
    find("key-wrong").hidden = last === null;
    find("key").value = "";
    if (!dialog.open) dialog.showModal();
    find("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, find("key").value.trim());
      dialog.close();
      waiting = null;
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
  return waiting;
}

// A request with the key, which is asked for where the server wants one.
export async function request(path, options = {}) {
  for (;;) {
    const used = key();
    let answer;
    try {
      answer = await fetch(path, {
        cache: "no-store", ...options, headers: { ...options.headers, ...headers() },
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      isGone(true);
      throw new Gone();
    }
    if (answer.status !== 401) return answer;
    if (used === key()) {
      last = used;
      sessionStorage.removeItem(KEY);
    }
    if (key() === null) await askForKey();
  }
}

export async function json(path, options) {
  const answer = await request(path, options);
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(sentenceOf(found) ?? `HTTP ${answer.status}`);
  return found;
}

const sentenceOf = (found) =>
  found?.error?.message ?? (typeof found?.detail === "string" ? found.detail : undefined);

// --- is it there? ---

let gone = false;
let onReturn = () => {};
export const whenBack = (act) => { onReturn = act; };

function isGone(now) {
  if (now === gone) return;
  gone = now;
  find("gone").hidden = !now;
  if (now) {
    schedule();
  } else {
    notify(["服务器已恢复。", "The server is back."]);
    onReturn();
  }
}

let beat = 0;
function schedule() {
  clearTimeout(beat);
  beat = setTimeout(look, gone ? BEAT_WHILE_GONE : BEAT);
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("/page/about.json", { cache: "no-store" });
      isGone(!answer.ok);
    } catch {
      isGone(true);
    }
  }
  schedule();
}

export function watchServer() {
  schedule();
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
}

// --- answers ---

// Asks one model; `onText` gets each piece. Returns why the answer ended and its usage.
export async function answer(body, signal, onText) {
  const reply = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!reply.ok) {
    throw new Refused(sentenceOf(await reply.json().catch(() => ({}))) ?? `HTTP ${reply.status}`);
  }
  const found = { finish: null, usage: null };
  let isWhole = false;
  try {
    for await (const event of events(reply.body)) {
      if (event === "[DONE]") {
        isWhole = true;
        break;
      }
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Refused(sentenceOf(chunk));
      if (chunk.usage) found.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) onText(choice.delta.content);
      for (const call of choice?.delta?.tool_calls ?? []) onText(callOf(call));
      if (choice?.finish_reason) found.finish = choice.finish_reason;
    }
  } catch (error) {
    if (error instanceof Refused || error.name === "AbortError") throw error;
    isGone(true);
    throw new Gone();
  }
  if (!isWhole && !found.finish) {
    look();
    throw new Gone();
  }
  return found;
}

const callOf = (call) => `${call.function?.name ?? ""}${call.function?.arguments ?? ""}`;

// The data of server-sent events; each may come in several pieces.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value.replaceAll("\r", "");
      for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
        const lines = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:"));
        text = text.slice(end + 2);
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
