const root = document.documentElement;
const find = (id) => document.getElementById(id);
const speak = (language) => {
  root.dataset.ui = language;
  root.lang = language === "zh" ? "zh-CN" : "en";
};
speak(navigator.language.startsWith("zh") ? "zh" : "en");
find("language").onclick = () => speak(root.dataset.ui === "zh" ? "en" : "zh");
