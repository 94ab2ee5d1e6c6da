"use strict";
const root = document.documentElement;
const button = document.getElementById("theme");
const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const show = () => { button.setAttribute("aria-pressed", String(dark())); };
button.hidden = false;
button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
show();

function sort(table, column, ascending) {
  const key = (row) => row.cells[column].dataset.key;
  const rows = Array.from(table.tBodies[0].rows).sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return (ascending ? 1 : -1) * (Number(x) - Number(y) || 0);
  });
  table.tBodies[0].append(...rows);
  Array.from(table.tHead.rows[0].cells).forEach((cell, index) => {
    if (index === column) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
}
document.querySelectorAll("table.sortable").forEach((table) => {
  Array.from(table.tHead.rows[0].cells).forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () =>
      sort(table, column, cell.getAttribute("aria-sort") !== "ascending"));
  });
});

const opened = [];
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((each) => {
  each.open = true;
  opened.push(each);
}));
addEventListener("afterprint", () => { while (opened.length) opened.pop().open = false; });
