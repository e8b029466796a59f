"use strict";
// Sorts and filters the table of tensors. Without it, all is there but for that, and rows beyond the first few thousand.
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const { rest, orders, said } = JSON.parse(document.getElementById("data").textContent);
  const most = Number(table.dataset.most);
  const rows = [...body.rows];
  const names = rows.map((row) => row.cells[0].textContent).concat(rest[0]);
  const searched = names.map((name) => name.toLowerCase());
  const there = rows.length;
  let order = names.map((_, place) => place);
  let words = [];

  const rowAt = (place) => {
    if (!rows[place]) {
      const row = document.createElement("tr");
      heads.forEach((head, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        cell.className = head.className;
        cell.textContent = rest[column][place - there];
        row.append(cell);
      });
      rows[place] = row;
    }
    return rows[place];
  };

  const show = () => {
    const found = words.length ? order.filter((place) => words.every((word) => searched[place].includes(word))) : order;
    body.replaceChildren(...found.slice(0, most).map(rowAt));
    const count = (number) => number.toLocaleString("en");
    const filtered = words.length ? ` match, of ${count(names.length)} rows` : " rows";
    document.getElementById("shown").textContent =
      found.length > most
        ? `The first ${count(most)} of ${count(found.length)}${filtered}.`
        : `${count(found.length)}${filtered}.`;
  };

  // The largest numbers first, names from A; the other way round when asked again. What says nothing comes last.
  const sort = (column) => {
    const head = heads[column];
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction);
    const saying = orders[column].slice(0, said[column]);
    if (direction === "descending") saying.reverse();
    order = saying.concat(orders[column].slice(said[column]));
    show();
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(column));
    head.append(button);
  });
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  });
  document.getElementById("controls").hidden = false;
})();
