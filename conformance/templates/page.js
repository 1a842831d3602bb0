"use strict";

let data;
const cases = [...document.querySelectorAll(".case")];
const groups = [...document.querySelectorAll(".group")];
const subjects = [...document.querySelectorAll(".subject")];
const input = document.getElementById("filter");

function element(name, text, attributes = {}) {
  const made = Object.assign(document.createElement(name), attributes);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The quantities of thousands of cases would make a slow page: a case gets them when it is opened.
function fill(opened) {
  if (opened.filled) return;
  opened.filled = true;
  data ??= JSON.parse(document.getElementById("data").textContent);
  const quantities = data[opened.dataset.index];
  if (quantities.length) {
    const table = element("table");
    table.append(element("caption", "All quantities, the worst first", { className: "hidden" }));
    const head = table.createTHead().insertRow();
    for (const [name, kind] of [["quantity", ""], ["error", "number"], ["tolerance", "number"], ["ratio", "number"], ["largest deviation", ""]])
      head.append(element("th", name, { scope: "col", className: kind }));
    const body = table.createTBody();
    for (const [quantity, ...numbers] of quantities) {
      const message = numbers.pop();
      const row = body.insertRow();
      row.append(element("th", quantity, { scope: "row" }));
      for (const number of numbers) row.append(element("td", number, { className: "number" }));
      row.append(element("td", message, { className: "reason" }));
    }
    const box = element("div", undefined, { className: "scroll", tabIndex: 0 });
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "All quantities");
    box.append(table);
    opened.append(box);
  }
  if (!opened.querySelector(".command")) {
    const line = element("div", undefined, { className: "command" });
    line.append(element("code", opened.dataset.command), element("button", "Copy", { type: "button", className: "copy" }));
    opened.append(line);
  }
}

for (const opened of cases) {
  if (opened.open) fill(opened);
  opened.addEventListener("toggle", () => { if (opened.open) fill(opened); });
}

// What is asked for by a link is unfolded first.
function reveal() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target) return;
  if (target.closest("[hidden]")) show("");
  for (let part = target; part; part = part.parentElement) if (part.matches("details")) part.open = true;
  target.scrollIntoView();
}

addEventListener("hashchange", reveal);

document.addEventListener("click", (event) => {
  const row = event.target.closest("[data-filter]");
  if (row) show(row.dataset.filter);
  const link = event.target.closest("a[href^='#']");
  if (link && link.hash === location.hash) reveal();  // a second click changes no hash
  const button = event.target.closest(".copy");
  if (button) copy(button);
});

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } catch {
    getSelection().selectAllChildren(code);  // where pages may not write to the clipboard
  }
}

let texts;

function textOf(one) {
  const group = one.closest(".group").dataset.group;
  const subject = one.closest(".subject").dataset.subject;
  return `${subject} group:${group} ${one.querySelector("summary").textContent} `.toLowerCase();
}

function show(wanted) {
  input.value = wanted;
  filter();
}

const FEW = 40;  // so many groups unfold by themselves

function filter() {
  texts ??= cases.map(textOf);
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  // The group's name is whole, so that bn/train is not rbn/train.
  const whole = words.map((word) => (word.startsWith("group:") ? `${word} ` : word));
  let number = 0;
  cases.forEach((one, i) => {
    one.hidden = !whole.every((word) => texts[i].includes(word));
    number += !one.hidden;
  });
  const matching = groups.filter((group) => {
    group.hidden = !group.querySelector(".case:not([hidden])");
    group.wasOpen ??= group.open;
    return !group.hidden;
  });
  for (const group of matching) group.open = words.length ? matching.length <= FEW : group.wasOpen;
  for (const subject of subjects) subject.hidden = words.length > 0 && !subject.querySelector(".group:not([hidden])");
  document.querySelector(".filter output").textContent = words.length ? `${number} of ${cases.length} cases` : "";
}

input.addEventListener("input", filter);
document.querySelector(".filter").addEventListener("submit", (event) => event.preventDefault());
if (input.value) filter();  // a browser may keep it when the page is loaded again
reveal();
