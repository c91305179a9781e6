// Base and tuned side by side: a question goes to one model or two, each with its own request.
import {
  isOfHistory, load, loadAll, loadSettings, messagesBefore, newChat, remove, rowOf, save,
  saveSettings,
} from "./history.js";
import {
  both, button, download, find, language, make, named, notify, speakAs, textOf,
} from "./parts.js";
import { Gone, answer, json, whenBack } from "./server.js";

const NONE = ""; // the right side, where only one model answers
const IDEAS = [
  ["请用两句话介绍你自己。", "Introduce yourself in two sentences."],
  ["向新手解释什么是 LoRA 适配器。", "Explain what a LoRA adapter is to a newcomer."],
  ["给老师写一封请假的短信。", "Write a short note asking my teacher for a day off."],
];
const FINISH = {
  length: ["到达词元上限", "reached the most tokens"],
  stopped: ["已停止", "stopped"],
  gone: ["服务器中断了回答", "the server broke off"],
};
const pane = find("pane");
let models = [];
let alone = new Set(); // models that were taught single questions, and read nothing else
let chat = newChat();
let running = null; // the AbortController of the answers that are being generated

// --- settings ---

const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];
const settings = { temperature: "0", top_p: "1", max_tokens: "512", seed: "", system: "" };

function readSettings() {
  for (const [name, value] of Object.entries(loadSettings())) {
    if (name in settings || name === "left" || name === "right") settings[name] = String(value);
  }
  for (const name of [...FIELDS, "system"]) {
    find(name).value = settings[name];
    find(name).addEventListener("input", () => {
      settings[name] = find(name).value;
      keepSettings();
    });
  }
  summarise();
}

function keepSettings() {
  saveSettings(settings);
  summarise();
}

function summarise() {
  const shown = FIELDS.filter((name) => settings[name].trim())
    .map((name) => `${name} ${settings[name]}`);
  if (settings.system.trim()) shown.unshift("system");
  find("summary").textContent = shown.join(" · ");
}

// What goes into each request; raises nothing: the server judges the values.
function sampling() {
  const set = FIELDS.filter((name) => settings[name].trim() !== "");
  return Object.fromEntries(set.map((name) => [name, Number(settings[name])]));
}

function invalidField() {
  return FIELDS.map(find).find((field) => !field.checkValidity());
}

// --- models ---

async function readModels() {
  const found = await json("/v1/models");
  const sides = found.data.filter(({ id }) => id !== "both" && !id.startsWith("both:"));
  models = sides.map(({ id }) => id);
  alone = new Set(sides.filter(({ format }) => format === "alpaca").map(({ id }) => id));
  const first = models.find((id) => id !== "base") ?? NONE;
  const wanted = { left: settings.left ?? "base", right: settings.right ?? first };
  for (const place of ["left", "right"]) {
    const select = find(place);
    const options = models.map((id) => new Option(id, id));
    if (place === "right") options.push(named(new Option("", NONE), ["无", "none"]));
    select.replaceChildren(...options);
    const known = options.some(({ value }) => value === wanted[place]);
    select.value = known ? wanted[place] : place === "left" ? models[0] : first;
  }
}

const sides = () => [find("left").value, find("right").value].filter((id) => id !== NONE);

// --- one conversation ---

function open(id) {
  stop();
  chat = (id && load(id)) || newChat();
  for (const of of chat.turns.flatMap((turn) => turn.answers)) of.finish ??= "stopped";
  if (id) {
    settings.system = chat.system ?? "";
    find("system").value = settings.system;
    summarise();
  }
  find("turns").replaceChildren(...chat.turns.map(drawTurn));
  drawAround();
  showSide(false);
  pane.scrollTop = pane.scrollHeight;
  if (matchMedia("(hover: hover)").matches) find("question").focus();
}

function keep() {
  chat.at = Date.now();
  save(chat);
  drawAround();
}

// What depends on the conversation beside its turns.
function drawAround() {
  find("welcome").hidden = chat.turns.length > 0;
  find("export").disabled = rowOf(chat) === null;
  const chats = loadAll();
  find("chats").replaceChildren(...chats.map(drawEntry));
  find("no-chats").hidden = chats.length > 0;
  find("export-all").hidden = !chats.some((one) => rowOf(one));
  for (const [place, turn] of [...find("turns").children].entries()) {
    turn.classList.toggle("last", place === chat.turns.length - 1);
  }
}

function drawEntry(one) {
  const title = one.turns[0]?.question ?? "…";
  const isKept = one.turns.some((turn) => turn.kept);
  const opens = make("button", "entry", textOf("span", "", title),
    isKept ? named(make("i", "has-kept", "✓"), ["有保留的回答", "has a good answer"]) : null);
  opens.type = "button";
  opens.toggleAttribute("aria-current", one.id === chat.id);
  opens.querySelector("i")?.setAttribute("role", "img");
  opens.addEventListener("click", () => open(one.id));
  const removes = named(make("button", "icon", "×"), ["删除对话", "Delete the conversation"]);
  removes.type = "button";
  removes.addEventListener("click", () => {
    remove(one.id);
    if (one.id === chat.id) open(null);
    else drawAround();
    notify(["对话已删除。", "The conversation is deleted."],
      button("", ["撤销", "Undo"], () => {
        save(one);
        find("notice").hidden = true;
        drawAround();
      }), 10);
  });
  return make("li", "", opens, removes);
}

// --- a turn ---

function drawTurn(turn) {
  const place = chat.turns.indexOf(turn);
  const question = make("div", "question", textOf("p", "", turn.question),
    button("again only-last", ["重新回答", "Answer again"], () => ask(turn.question, place)));
  const made = make("li", "turn", question,
    make("div", "answers", ...turn.answers.map((_, side) => drawAnswer(turn, side))));
  made.dataset.sides = turn.answers.length;
  return made;
}

function redraw(turn) {
  const old = find("turns").children[chat.turns.indexOf(turn)];
  const made = drawTurn(turn);
  old.replaceWith(made);
  drawAround();
  return made;
}

function drawAnswer(turn, side) {
  const { model, text, finish, error } = turn.answers[side];
  const kept = turn.kept?.side === side ? turn.kept : null;
  const isEdited = kept !== null && kept.text !== text;
  const shown = textOf("p", "said", kept ? kept.text : text);
  const made = make("article", model === "base" ? "of-base" : "of-tuned",
    make("h3", "", make("span", "", model),
      turn.answers[side].alone
        ? make("small", "", both(["它学的是单个问题，没有读前面的话", "taught single questions: it read this one alone"]))
        : null,
      kept ? make("small", "kept-word", "✓ ", both(isEdited ? ["已修改并保留", "kept, edited"]
        : ["已保留", "kept"])) : null),
    shown,
    !text && !error && finish ? make("p", "none", both(["（空）", "(empty)"])) : null,
    error ? make("p", "fault", ...faultOf(error)) : null);
  made.classList.toggle("kept", kept !== null);
  if (!finish && !error) return made; // being generated
  made.append(make("footer", "", drawCost(turn.answers[side]), drawActions(turn, side, shown)));
  return made;
}

const faultOf = (error) =>
  error === "gone" ? [both(FINISH.gone)] : [both(["出错：", "Refused: "]), error];

function drawCost({ tokens, seconds, first, finish }) {
  const found = make("small", "cost");
  if (tokens) {
    const speed = seconds > 0.05 ? ` · ${(tokens / seconds).toFixed(tokens < 10 * seconds ? 1 : 0)}/s` : "";
    found.append(`${tokens} `, both(["词元", tokens === 1 ? "token" : "tokens"]), speed);
  }
  if (first) found.title = `${(1000 * first).toFixed(0)} ms`;
  if (FINISH[finish]) found.append(tokens ? " · " : "", make("span", "cut", both(FINISH[finish])));
  return found;
}

function drawActions(turn, side, shown) {
  const { text } = turn.answers[side];
  const kept = turn.kept?.side === side ? turn.kept : null;
  const keeps = button("keep", ["好回答", "Good answer"], () => {
    turn.kept = kept ? null : { side, text };
    redraw(turn).querySelectorAll(".keep")[side]?.focus();
    keep();
  });
  keeps.setAttribute("aria-pressed", kept !== null);
  keeps.disabled = !kept && !text;
  const edits = button("", ["修改", "Edit"], () => edit(turn, side, shown));
  const copies = navigator.clipboard
    ? button("", ["复制", "Copy"], async () => {
      await navigator.clipboard.writeText(kept ? kept.text : text);
      notify(["已复制。", "Copied."], null, 2);
    }) : null;
  return make("span", "actions", keeps, edits, copies);
}

function edit(turn, side, shown) {
  const field = named(make("textarea", "edit"), ["修改后的回答", "The corrected answer"]);
  field.value = shown.textContent;
  const saves = button("main", ["保留", "Keep"], () => {
    if (!field.value.trim()) return field.focus();
    turn.kept = { side, text: field.value };
    redraw(turn);
    return keep();
  });
  const made = make("div", "editing", field,
    make("span", "actions", saves, button("", ["取消", "Cancel"], () => redraw(turn))));
  const article = shown.parentElement;
  article.querySelector("footer").remove();
  shown.replaceWith(made);
  field.focus();
}

// --- asking ---

async function ask(question, place = chat.turns.length) {
  const invalid = invalidField();
  if (invalid) {
    find("settings").open = true;
    invalid.reportValidity();
    return false;
  }
  stop();
  const own = chat;
  own.system = settings.system.trim();
  const turn = {
    question, kept: null,
    answers: sides().map((model) => ({ model, text: "", tokens: 0, seconds: 0 })),
  };
  const hasBefore = own.system !== "" || place > 0;
  for (const of of turn.answers) of.alone = hasBefore && alone.has(of.model);
  own.turns.splice(place, 1, turn);
  const made = drawTurn(turn);
  if (find("turns").children[place]) find("turns").children[place].replaceWith(made);
  else find("turns").append(made);
  keep();
  pane.scrollTop = pane.scrollHeight;
  const control = new AbortController();
  setRunning(control);
  const saves = setInterval(() => own === chat && save(own), 1000);
  await Promise.all(turn.answers.map((_, side) => answerOne(own, turn, side, control)));
  clearInterval(saves);
  if (running === control) setRunning(null);
  own.at = Date.now();
  if (load(own.id)) save(own); // unless it was deleted meanwhile
  if (own === chat) drawAround();
  return true;
}

async function answerOne(own, turn, side, control) {
  const of = turn.answers[side];
  const draws = () => own === chat && own.turns.includes(turn);
  const article = () =>
    find("turns").children[own.turns.indexOf(turn)].querySelectorAll("article")[side];
  if (draws()) article().setAttribute("aria-busy", "true");
  const started = performance.now();
  const since = () => (performance.now() - started) / 1000;
  const before = of.alone ? [] : messagesBefore(own, own.turns.indexOf(turn), side);
  const messages = [...before, { role: "user", content: turn.question }];
  let pieces = 0;
  try {
    const found = await answer({ model: of.model, messages, ...sampling() }, control.signal,
      (piece) => {
        of.first ??= since();
        pieces += 1;
        of.text += piece;
        if (!draws()) return;
        const isAtEnd = pane.scrollTop + pane.clientHeight > pane.scrollHeight - 60;
        const said = article().querySelector(".said");
        said.append(piece);
        if (pieces % 16 === 1) speakAs(said, of.text);
        said.normalize();
        if (isAtEnd) pane.scrollTop = pane.scrollHeight;
      });
    of.finish = found.finish ?? "stop";
    of.tokens = found.usage?.completion_tokens ?? pieces;
  } catch (error) {
    of.tokens = pieces;
    if (error instanceof Gone) of.error = "gone";
    else if (error.name !== "AbortError") of.error = error.message;
    of.finish = of.error ? "error" : "stopped";
  }
  of.seconds = since();
  if (!draws()) return;
  const isAtEnd = pane.scrollTop + pane.clientHeight > pane.scrollHeight - 60;
  article().replaceWith(drawAnswer(turn, side));
  if (isAtEnd) pane.scrollTop = pane.scrollHeight;
}

function setRunning(control) {
  running = control;
  find("stop").hidden = control === null;
  find("send").hidden = control !== null;
  document.body.classList.toggle("answering", control !== null);
}

function stop() {
  running?.abort();
  setRunning(null);
}

async function submit() {
  const field = find("question");
  const question = field.value.trim();
  if (!question || running) return;
  field.value = "";
  fit();
  if (!(await ask(question)) && !field.value) field.value = question;
  fit();
}

function fit() { // as high as its lines
  const field = find("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// --- training rows ---

const fileName = (what) => `glmtune-${what}-${new Date().toISOString().slice(0, 10)}.jsonl`;

function exportRows(chats, what) {
  const rows = chats.map(rowOf).filter((row) => row !== null);
  download(fileName(what), rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
  notify([`导出 ${rows.length} 行训练数据。`,
    rows.length === 1 ? "One training row is exported." : `${rows.length} training rows are exported.`]);
}

function showSide(isShown) {
  document.body.classList.toggle("side", isShown);
  find("menu").setAttribute("aria-expanded", isShown);
  find("shade").hidden = !isShown;
}

function drawIdeas() {
  find("ideas").replaceChildren(...IDEAS.map((idea) => make("li", "",
    button("", idea, () => {
      find("question").value = idea[language() === "zh" ? 0 : 1];
      find("question").focus();
      fit();
    }))));
}

export async function startChat() {
  readSettings();
  drawIdeas();
  const field = find("question");
  field.addEventListener("input", fit);
  field.addEventListener("keydown", (event) => {
    // While an input method composes, Enter chooses its word; 229 is what some send after it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  });
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  find("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (document.body.classList.contains("side")) showSide(false);
    else stop();
  });
  find("new").addEventListener("click", () => open(null));
  find("menu").addEventListener("click", () => showSide(!document.body.classList.contains("side")));
  find("shade").addEventListener("click", () => showSide(false));
  find("export").addEventListener("click", () => exportRows([chat], "row"));
  find("export-all").addEventListener("click", () => exportRows(loadAll(), "rows"));
  for (const place of ["left", "right"]) {
    find(place).addEventListener("change", () => {
      settings[place] = find(place).value;
      keepSettings();
    });
  }
  addEventListener("pagehide", () => { // what is being generated is kept as far as it is
    if (!running) return;
    for (const of of chat.turns.flatMap((turn) => turn.answers)) of.finish ??= "stopped";
    save(chat);
  });
  addEventListener("storage", ({ key }) => { if (isOfHistory(key)) drawAround(); });
  whenBack(() => { readModels().catch(() => {}); });
  open(loadAll()[0]?.id ?? null);
  await readModels();
}
