// Elements and labels in both languages. Text enters the page as text nodes alone.
export const find = (id) => document.getElementById(id);

export function make(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A label of which CSS shows one language.
export function both([zh, en]) {
  const made = document.createDocumentFragment();
  for (const [language, word] of [["zh", zh], ["en", en]]) {
    const span = make("span", language, word);
    span.lang = language === "zh" ? "zh-CN" : "en";
    made.append(span);
  }
  return made;
}

export const language = () => document.documentElement.dataset.ui;

// A name that is read out; language.js rewrites it when the language is switched.
export function named(element, [zh, en]) {
  element.dataset.zh = zh;
  element.dataset.en = en;
  const word = language() === "zh" ? zh : en;
  if (element.tagName === "OPTION") element.textContent = word;
  else element.setAttribute("aria-label", word);
  return element;
}

export function button(name, words, act) {
  const made = make("button", name, both(words));
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// A text of a model or a person.
export function textOf(tag, name, text) {
  const made = make(tag, `text ${name}`, text);
  made.dir = "auto";
  speakAs(made, text);
  return made;
}

export function speakAs(element, text) {
  element.lang = /[\u3400-\u9fff]/.test(text) ? "zh-CN" : "en";
}

let hides = 0;
export function notify(words, action = null, seconds = 6) {
  const place = find("notice");
  place.replaceChildren(make("span", "", both(words)), ...(action ? [action] : []));
  place.hidden = false;
  clearTimeout(hides);
  hides = setTimeout(() => { place.hidden = true; }, 1000 * seconds);
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = make("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
