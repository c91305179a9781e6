// The answers: searched, filtered, sorted, and drawn only where they can be seen. A record's text
// reaches the page as text nodes alone, so that no markup in it acts.
const { words, rows } = JSON.parse(find("data").textContent);
const list = find("rows");

// --- which rows, and in what order ---

const plain = (text) => text.normalize("NFKC").toLowerCase();
const texts = rows.map((row) =>
  plain([row.question, row.input, row.expected, row.base.join(""), row.tuned.join("")].join("\n")));
let wanted = []; // the words that a row must have
let shown = []; // numbers of the rows that match, in their order

function choose() {
  wanted = plain(find("search").value).split(/\s+/).filter(Boolean);
  const kind = document.querySelector("[name=kind]:checked").value;
  shown = [...rows.keys()].filter((i) =>
    (!kind || rows[i].is.includes(kind)) && wanted.every((word) => texts[i].includes(word)));
  const [score, way] = find("sort").value.split(" ");
  if (way) {
    const sign = way === "up" ? 1 : -1;
    const known = shown.filter((i) => rows[i][score]);
    const change = (i) => sign * (rows[i][score][1] - rows[i][score][0]);
    known.sort((a, b) => change(a) - change(b));
    shown = [...known, ...shown.filter((i) => !rows[i][score])];
  }
  find("shown").textContent = `${shown.length.toLocaleString("en")} / ${rows.length.toLocaleString("en")}`;
  find("nothing").hidden = shown.length > 0;
  current = -1;
  erase();
  draw();
}

// --- one row ---

function make(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children.filter((child) => child !== null));
  return made;
}

function both(key) { // a label in both languages, of which CSS shows one
  const made = document.createDocumentFragment();
  ["zh", "en"].forEach((language, i) => {
    const word = make("span", language, words[key][i]);
    word.lang = language === "zh" ? "zh-CN" : "en";
    made.append(word);
  });
  return made;
}

// Pieces by turns in both answers and in this one alone, which `tag` marks.
function textOf(tag, name, pieces, marked) {
  const text = pieces.join("");
  if (!text.trim()) return make("p", "none", both("empty"));
  const made = make(tag, `text ${name}`);
  made.dir = "auto";
  made.lang = /[\u3400-\u9fff]/.test(text) ? "zh-CN" : "en";
  pieces.forEach((piece, i) => piece && made.append(i % 2 ? make(marked, "", piece) : piece));
  return made;
}

function fixed(number, digits) { // with a minus sign, but not before a zero
  return number.toFixed(digits).replace(/^-(?=[0.]+$)/, "").replace("-", "\u2212");
}

function signed(change, digits) {
  return (change < 0 ? "" : "+") + fixed(change, digits);
}

function answerOf(row, side) {
  const name = ["base", "tuned"][side];
  const heading = make("h4", "", make("span", "", both(name)),
    make("small", "", `${row.tokens[side]} `, both("tokens")),
    row.chrf ? make("small", "", `chrF ${row.chrf[side].toFixed(1)}`) : null,
    row.stopped[side] ? null : make("small", "cut", both("cut")),
    row.right[side] ? make("small", "right", "✓ ", both("right")) : null);
  return make("div", `of-${name}`, heading, textOf("p", "", row[name], side ? "ins" : "del"));
}

function expectedOf(row) {
  const heading = make("h4", "", make("span", "", both("expected")),
    row.log_prob ? make("small", "", both("log_prob"),
      ` ${fixed(row.log_prob[0], 2)} → ${fixed(row.log_prob[1], 2)}`) : null);
  return make("div", "expected", heading, textOf("p", "", [row.expected]));
}

const opened = new Set(); // rows whose whole text is shown

function rowOf(place) {
  const i = shown[place];
  const row = rows[i];
  const change = row.chrf ? row.chrf[1] - row.chrf[0] : 0;
  const badges = make("span", "badges",
    ...["collapsed", "not_stopped"].filter((kind) => row.is.includes(kind))
      .map((kind) => make("span", `badge ${kind}`, both(kind))),
    ...["better", "worse"].filter((kind) => row.is.includes(kind))
      .map((kind) => make("span", `badge ${kind}`, `chrF ${signed(change, 1)}`)),
    row.is.includes("differs") ? null : make("span", "badge", both("same")));
  const more = make("button", "more");
  more.type = "button";
  more.hidden = true;
  more.addEventListener("click", () => toggle(place));
  const made = make("li", "",
    make("article", "pair",
      make("div", "question",
        make("header", "", make("span", "number", String(row.number)),
          textOf("h3", "", [row.question]), badges),
        row.input ? textOf("p", "input", [row.input]) : null),
      make("div", "answers", answerOf(row, 0), answerOf(row, 1), expectedOf(row)),
      more));
  made.id = `row-${row.number}`;
  made.tabIndex = -1;
  made.setAttribute("aria-posinset", place + 1);
  made.setAttribute("aria-setsize", shown.length);
  return made;
}

// Long texts are cut to some lines, with a button that shows them whole.
function clip(made, i) {
  const isOpen = opened.has(i);
  const more = made.querySelector(".more");
  made.classList.toggle("open", isOpen);
  more.hidden = !isOpen && ![...made.querySelectorAll(".text")]
    .some((text) => text.scrollHeight > text.clientHeight + 2);
  more.setAttribute("aria-expanded", isOpen);
  more.replaceChildren(both(isOpen ? "less" : "more"));
}

function toggle(place) {
  const i = shown[place];
  if (!opened.delete(i)) opened.add(i);
  clip(drawn.get(place), i);
  draw();
}

// --- the rows that can be seen ---

const MARGIN = 700; // pixels above and below the window that are drawn as well
let guess = 230; // the height of a row that was not drawn yet: as those that were drawn first
const heights = new Map(); // number of a row -> its height
const drawn = new Map(); // place among the shown -> its element
let offsets = new Float64Array(1); // where each place begins, and where the last one ends
let isPrinting = false;
let unfolded = []; // what is shown in full for the printer alone

function erase() {
  list.replaceChildren();
  drawn.clear();
  layOut();
}

function layOut() {
  offsets = new Float64Array(shown.length + 1);
  shown.forEach((i, place) => { offsets[place + 1] = offsets[place] + (heights.get(i) ?? guess); });
}

function placeAt(y) { // the place whose row covers y; the nearest one above or below all rows
  let low = 0;
  let high = shown.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (offsets[middle] <= y) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Draws what is missing and removes what is out of sight. Heights become known by drawing, which
// may move what follows, so it repeats until nothing moves; what the reader looks at stays put.
function draw() {
  for (let round = 0; round < 6; round++) {
    const top = -list.getBoundingClientRect().top;
    const first = isPrinting ? 0 : placeAt(top - MARGIN);
    const end = isPrinting || !shown.length ? shown.length : placeAt(top + innerHeight + MARGIN) + 1;
    const isAtEnd = scrollY > 0 && scrollY + innerHeight >= root.scrollHeight - 2;
    const seen = [...drawn].filter(([place]) => place >= first && place < end)
      .map(([, made]) => [made, made.getBoundingClientRect()])
      .filter(([, box]) => box.bottom > 0 && box.top < innerHeight)
      .sort((a, b) => a[1].top - b[1].top)[0];
    for (const [place, made] of drawn) {
      if (place >= first && place < end) continue;
      made.remove();
      drawn.delete(place);
    }
    let next = null;
    const added = [];
    for (let place = end - 1; place >= first; place--) {
      let made = drawn.get(place);
      if (!made) {
        made = rowOf(place);
        drawn.set(place, made);
        list.insertBefore(made, next);
        added.push(place);
      }
      next = made;
    }
    if (isPrinting) { // paper has its own heights, and measuring thousands takes long
      list.style.padding = "0";
      return;
    }
    for (const place of added) clip(drawn.get(place), shown[place]);
    let isMoved = false;
    const isFirst = !heights.size;
    for (const [place, made] of drawn) {
      const height = made.getBoundingClientRect().height;
      isMoved ||= Math.abs(height - (offsets[place + 1] - offsets[place])) > 0.5;
      heights.set(shown[place], height);
    }
    if (isFirst && drawn.size) guess = [...heights.values()].reduce((a, b) => a + b) / drawn.size;
    if (isMoved) layOut();
    list.style.paddingTop = `${offsets[first] ?? 0}px`;
    list.style.paddingBottom = `${offsets[shown.length] - offsets[end]}px`;
    if (isAtEnd && isMoved) scrollTo(0, root.scrollHeight);
    else if (seen && isMoved) scrollBy(0, seen[0].getBoundingClientRect().top - seen[1].top);
    if (!isMoved) break;
  }
  highlight();
}

// Marks the words of the search in what is drawn, where the browser can (CSS Custom Highlights).
function highlight() {
  if (!CSS.highlights) return;
  const ranges = [];
  const nodes = document.createTreeWalker(list, NodeFilter.SHOW_TEXT);
  while (wanted.length && nodes.nextNode()) {
    const node = nodes.currentNode;
    const text = plain(node.data);
    // Where letters were joined or split, their places are not those of the page.
    if (text.length !== node.length || !node.parentElement.closest(".text")) continue;
    for (const word of wanted) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + word.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

let isDue = false;
function drawSoon() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => { isDue = false; draw(); });
}

function measureAgain() { // another width or language: no height holds any more
  heights.clear();
  for (const [place, made] of drawn) clip(made, shown[place]);
  layOut();
  drawSoon();
}

function drawForPrint(starts) {
  if (isPrinting === starts) return;
  isPrinting = starts;
  if (starts) unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const details of unfolded) details.open = starts;
  if (!starts) erase();
  draw();
}

// --- the keyboard ---

let current = -1; // the place that j and k start from

function go(place) {
  if (place < 0 || place >= shown.length) return;
  current = place;
  const above = document.querySelector(".tools").getBoundingClientRect().height + 8;
  for (let round = 0; round < 2; round++) { // again, as heights above became known
    scrollTo(0, scrollY + list.getBoundingClientRect().top + offsets[place] - above);
    draw();
  }
  drawn.get(place)?.focus({ preventScroll: true });
}

function move(step) {
  if (current < 0) {
    const top = -list.getBoundingClientRect().top;
    go(top < 0 ? 0 : placeAt(top + 1) + (step > 0 ? 0 : -1));
  } else go(current + step);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { target, key } = event;
  const search = find("search");
  if (target === search) {
    if (key === "Enter") go(0);
    else if (key === "Escape" && search.value) { search.value = ""; choose(); }
    else if (key === "Escape") search.blur();
    else return;
  } else if (target.closest("input, select, textarea")) return;
  else {
    const isInRow = target.matches("#rows > li");
    if (key === "/") { search.focus(); search.select(); }
    else if (key === "j" || (isInRow && key === "ArrowDown")) move(1);
    else if (key === "k" || (isInRow && key === "ArrowUp")) move(-1);
    else if (isInRow && key === "Enter") toggle(current);
    else if (isInRow && key === "Escape") { target.blur(); current = -1; }
    else return;
  }
  event.preventDefault();
});
list.addEventListener("focusin", (event) => {
  const made = event.target.closest("li");
  for (const [place, one] of drawn) if (one === made) current = place;
});

find("search").addEventListener("input", choose);
find("sort").addEventListener("change", choose);
document.querySelector(".chips").addEventListener("change", choose);
find("language").addEventListener("click", measureAgain);
addEventListener("scroll", drawSoon, { passive: true });
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) measureAgain();
  width = innerWidth;
  drawSoon();
});
addEventListener("beforeprint", () => drawForPrint(true));
addEventListener("afterprint", () => drawForPrint(false));
choose();
