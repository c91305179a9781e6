const pairs = [...document.querySelectorAll(".pair")];
const texts = pairs.map((pair) =>
  [...pair.querySelectorAll("[dir=auto]")].map((e) => e.textContent).join("\n").toLowerCase());
const show = () => {
  const words = find("filter").value.toLowerCase().split(/\s+/);
  let shown = 0;
  pairs.forEach((pair, i) => {
    const wanted = pair.classList.contains("differs") || !find("differences").checked;
    pair.hidden = !(wanted && words.every((word) => texts[i].includes(word)));
    shown += !pair.hidden;
  });
  find("shown").textContent = `${shown} / ${pairs.length}`;
  find("nothing").hidden = shown > 0;
};
find("filter").oninput = find("differences").onchange = show;
show();
