// Shared by all pages: which of the two languages is shown.
const root = document.documentElement;
const find = (id) => document.getElementById(id);
const speak = (language) => {
  root.dataset.ui = language;
  root.lang = language === "zh" ? "zh-CN" : "en";
  // What CSS cannot switch: names that are read out, and the words of form controls.
  for (const named of document.querySelectorAll("[data-zh]")) {
    const word = named.dataset[language];
    if (named.tagName === "OPTION") named.textContent = word;
    else named.setAttribute("aria-label", word);
    if (named.placeholder) named.placeholder = word;
  }
};
speak(navigator.language.startsWith("zh") ? "zh" : "en");
find("language").addEventListener("click", () => speak(root.dataset.ui === "zh" ? "en" : "zh"));
