// The page's frame: which of its two views is shown, and in which language.
import { startChat } from "./chat.js";
import { find } from "./parts.js";
import { showRun, startRun } from "./run.js";
import { request, watchServer } from "./server.js";

const LANGUAGE = "glmtune.language";

function keepLanguage() {
  const kept = localStorage.getItem(LANGUAGE);
  if (kept === "zh" || kept === "en") speak(kept);
  find("language").addEventListener("click", () => {
    try {
      localStorage.setItem(LANGUAGE, document.documentElement.dataset.ui);
    } catch { /* it holds for this visit */ }
  });
}

async function start() {
  keepLanguage();
  watchServer();
  const about = await (await request("/page/about.json")).json();
  const views = ["chat", "run"].filter((view) => about[view]);
  const show = (wanted) => {
    const shown = views.includes(wanted) ? wanted : views[0];
    for (const view of views) {
      find(view).hidden = view !== shown;
      find(`to-${view}`).toggleAttribute("aria-current", view === shown);
    }
    find("menu").hidden = shown !== "chat";
    document.body.dataset.view = shown;
    showRun(shown === "run");
  };
  const fromPath = () => show(location.pathname === "/run" ? "run" : "chat");
  for (const view of views) {
    find(`to-${view}`).hidden = views.length < 2;
    find(`to-${view}`).addEventListener("click", (event) => {
      event.preventDefault();
      history.pushState(null, "", event.currentTarget.getAttribute("href"));
      show(view);
    });
  }
  addEventListener("popstate", fromPath);
  if (about.run) startRun();
  fromPath();
  if (about.chat) await startChat();
}

start();
