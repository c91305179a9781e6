find("ids").onchange = (event) => root.classList.toggle("ids", event.target.checked);
let here = null;
const tell = (event) => {
  const token = event.target.closest(".tokens i");
  if (!token) return;
  here?.classList.remove("here");
  here = token;
  here.classList.add("here");
  find("place").textContent = token.dataset.t;
  find("number").textContent = token.dataset.n;
  find("position").textContent = token.dataset.p;
  find("touch").hidden = true;
  find("about").hidden = false;
};
const main = document.querySelector("main");
main.addEventListener("pointerover", tell);
main.addEventListener("click", tell);
