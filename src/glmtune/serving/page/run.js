// A run as its files show it now: asked again every few seconds while the view is open.
import { both, find, language, make, named, textOf } from "./parts.js";
import { json, request } from "./server.js";

const PACE = { training: 2000, preparing: 2000, waiting: 2000 };
const SLOW = 10_000; // milliseconds, once the run has ended
const TONES = {
  waiting: "undecided", preparing: "undecided", training: "training", done: "better",
  stopped: "undecided", failed: "alarm", killed: "alarm",
};
const place = find("run");
let isShown = false;
let version = "";
let timer = 0;
let chosen = null; // the step whose answers are shown; null follows the newest
let parts = null;

function build() {
  parts = {
    name: make("span", "name"),
    verdict: make("p", "verdict"),
    progress: document.createElement("progress"),
    resume: make("p", "lead"),
    best: make("p", "lead"),
    figures: make("dl", "figures of-run"),
    plots: make("div", "panels plots"),
    samples: make("section", "panel samples"),
    files: make("p", "files"),
  };
  named(parts.progress, ["训练进度", "Progress of the training"]);
  parts.verdict.setAttribute("role", "status");
  place.replaceChildren(
    make("header", "", make("h1", "", both(["训练", "Run"]), " ", parts.name), parts.verdict,
      parts.progress, parts.resume, parts.best),
    parts.files, parts.figures, parts.plots, parts.samples,
  );
}

async function look() {
  clearTimeout(timer);
  if (!isShown) return;
  let pace = 2000;
  try {
    const status = await json(`/run/status?known=${encodeURIComponent(version)}`);
    pace = PACE[status.state] ?? SLOW;
    draw(status);
  } catch { /* the notice says it, and the next look may do */ }
  clearTimeout(timer);
  if (isShown) timer = setTimeout(look, document.hidden ? SLOW : pace);
}

function draw(status) {
  if (!parts) build();
  const sentence = [status.sentence.zh, status.sentence.en];
  parts.name.textContent = status.name;
  if (parts.verdict.dataset.said !== sentence.join()) { // not read out again when nothing changed
    parts.verdict.dataset.said = sentence.join();
    parts.verdict.className = `verdict ${TONES[status.state]}`;
    parts.verdict.replaceChildren(both(sentence));
  }
  find("pulse").hidden = status.state !== "training";
  parts.progress.hidden = !status.max_steps || status.state === "done";
  parts.progress.max = status.max_steps ?? 1;
  parts.progress.value = status.step;
  parts.resume.hidden = !status.resume;
  parts.resume.replaceChildren(both(["继续训练：", "Resume: "]), make("code", "", status.resume ?? ""));
  parts.best.hidden = !status.best;
  if (status.best) {
    parts.best.replaceChildren(both(["最好的检查点：", "Best so far: "]), make("b", "", status.best_name),
      " · ", both([status.best.zh, status.best.en]));
  }
  parts.files.replaceChildren(...status.files.map(fileLink));
  parts.figures.replaceChildren(...figures(status));
  if (status.plots) {
    // Drawn by the server from numbers, with every text in it escaped.
    const drawn = new DOMParser().parseFromString(status.plots.join(""), "text/html");
    parts.plots.replaceChildren(...drawn.body.children);
    rename(parts.plots);
    drawSamples(status.samples);
    version = status.version;
  }
}

function fileLink({ name, zh, en }) {
  const link = make("a", "", both([zh, en]));
  link.href = `/run/files/${name}`;
  link.target = "_blank";
  link.rel = "noopener";
  return link;
}

// Names that are read out, in the language that is shown.
function rename(within) {
  for (const one of within.querySelectorAll("[data-zh]")) {
    named(one, [one.dataset.zh, one.dataset.en]);
  }
}

const fixed = (value, digits) => value.toLocaleString("en", {
  minimumFractionDigits: digits, maximumFractionDigits: digits,
});

function figures(status) {
  const { numbers } = status;
  const { first } = numbers;
  const made = [];
  const add = (words, value, note = null, tone = "") => value !== null && made.push(
    make("div", `figure ${tone}`, make("dt", "", both(words)),
      make("dd", "", make("b", "", value), make("small", "", ...(note ? [note] : [])))));
  const since = (key, digits) =>
    first[key] !== null && first[key] !== numbers[key]
      ? both([`起初 ${fixed(first[key], digits)}`, `from ${fixed(first[key], digits)}`]) : null;
  const told = (key, digits) => (numbers[key] === null ? null : fixed(numbers[key], digits));
  add(["步", "Step"], status.step ? fixed(status.step, 0) : null,
    status.max_steps ? `/ ${fixed(status.max_steps, 0)}` : null);
  add(["剩余时间", "Time left"], status.state === "training" ? status.left : null);
  add(["损失", "Loss"], told("loss", 3), since("loss", 3), "of-tuned");
  add(["留出数据的损失", "Held-out loss"], told("eval_loss", 3), since("eval_loss", 3), "of-tuned");
  add(["通用题正确率", "General set right"],
    numbers.general === null ? null : `${fixed(numbers.general, 1)} %`, since("general", 1),
    numbers.general < first.general ? "of-tuned worse" : "of-tuned");
  add(["速度", "Speed"], told("tokens_per_second", 0), both(["词元/秒", "tokens/s"]));
  add(["内存至多", "Most memory"], told("memory_gib", 1), "GiB");
  return made;
}

// --- sample answers, as they change from one evaluation to the next ---

function drawSamples(samples) {
  parts.samples.hidden = samples.length === 0;
  if (!samples.length) return;
  const steps = [...new Set(samples.flatMap(({ answers }) => answers.map(([step]) => step)))]
    .sort((one, other) => one - other);
  const slider = named(document.createElement("input"), ["评估的步数", "Step of the evaluation"]);
  Object.assign(slider, { type: "range", min: 0, max: steps.length - 1, step: 1 });
  const at = Math.max(0, chosen === null ? steps.length - 1 : steps.findLastIndex((s) => s <= chosen));
  slider.value = at;
  const shows = make("output");
  const list = make("ol", "");
  const show = () => {
    const step = steps[slider.value];
    shows.replaceChildren(both([`第 ${fixed(step, 0)} 步`, `step ${fixed(step, 0)}`]));
    slider.setAttribute("aria-valuetext", language() === "zh" ? `第 ${step} 步` : `step ${step}`);
    list.replaceChildren(...samples.map((sample) => drawSample(sample, step)));
  };
  slider.addEventListener("input", () => {
    const isNewest = Number(slider.value) === steps.length - 1;
    chosen = isNewest ? null : steps[slider.value];
    show();
  });
  show();
  const isFocused = document.activeElement?.type === "range";
  parts.samples.replaceChildren(
    make("h2", "", both(["留出问题的回答，随训练变化", "Answers to held-out questions, as they change"])),
    make("p", "when", slider, shows), list);
  slider.hidden = steps.length < 2;
  if (isFocused) slider.focus();
}

function drawSample({ question, expected, answers }, step) {
  const known = answers.filter(([at]) => at <= step);
  const answer = known.at(-1)?.[1] ?? "";
  const before = known.at(-2)?.[1];
  return make("li", "",
    textOf("h3", "", question),
    make("div", "answers",
      make("div", "of-tuned", make("h4", "", make("span", "", both(["回答", "Answer"])),
        before !== undefined && before !== answer
          ? make("small", "", both(["有变化", "changed"])) : null),
      answer ? textOf("p", "", answer) : make("p", "none", both(["（空）", "(empty)"]))),
      make("div", "expected", make("h4", "", both(["参考答案", "Expected"])),
        textOf("p", "", expected))));
}

export function showRun(shown) {
  isShown = shown;
  look();
}

export function startRun() {
  // The cookie by which links to the run's files open.
  request("/run/session", { method: "POST" }).catch(() => {});
  document.addEventListener("visibilitychange", look);
}
