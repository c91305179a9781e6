// Conversations, kept in this browser: one entry of localStorage for each, so that two tabs do not
// overwrite each other's.
import { notify } from "./parts.js";

const PREFIX = "glmtune.chat.";
const SETTINGS = "glmtune.settings";

export function newChat() {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), at: Date.now(), turns: [] };
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

const isText = (value) => typeof value === "string";
const isAnswer = (answer) => answer && isText(answer.model) && isText(answer.text);
const isTurn = (turn) =>
  turn && isText(turn.question) && Array.isArray(turn.answers) && turn.answers.every(isAnswer) &&
  (!turn.kept || isText(turn.kept.text));

export function load(id) {
  const chat = read(PREFIX + id);
  const isWhole = chat?.id === id && Array.isArray(chat.turns) && chat.turns.every(isTurn);
  return isWhole ? chat : null;
}

// All of them, the newest first; what is damaged is left where it is.
export function loadAll() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => load(name.slice(PREFIX.length)))
    .filter((chat) => chat !== null)
    .sort((one, other) => other.at - one.at);
}

export function save(chat) {
  try {
    localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
  } catch {
    notify(["浏览器的存储已满：请导出并删除旧对话。",
      "The browser's storage is full: export and delete old conversations."], null, 20);
  }
}

export const remove = (id) => localStorage.removeItem(PREFIX + id);
export const isOfHistory = (name) => name === null || name.startsWith(PREFIX);
export const loadSettings = () => read(SETTINGS) ?? {};

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch { /* they hold for this visit */ }
}

// What was said before a turn, as one of the models is asked. An answer that was kept stands for
// both models, so that they continue from the same words.
export function messagesBefore(chat, end, side) {
  const messages = chat.system ? [{ role: "system", content: chat.system }] : [];
  for (const turn of chat.turns.slice(0, end)) {
    const content = answerOf(turn, side);
    if (!content) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content });
  }
  return messages;
}

const answerOf = (turn, side) =>
  turn.kept?.text || turn.answers[side]?.text || turn.answers.find(({ text }) => text)?.text || "";

// A training row in OpenAI's format; null where no answer was kept. Answers that were not kept
// are context (weight 0), and those after the last kept one are no part of it.
export function rowOf(chat) {
  const last = chat.turns.findLastIndex((turn) => turn.kept);
  if (last < 0) return null;
  const messages = chat.system ? [{ role: "system", content: chat.system }] : [];
  for (const turn of chat.turns.slice(0, last + 1)) {
    const content = answerOf(turn, turn.answers.length - 1);
    if (!content) continue;
    const said = { role: "assistant", content };
    messages.push({ role: "user", content: turn.question },
      turn.kept ? said : { ...said, weight: 0 });
  }
  return { messages };
}
