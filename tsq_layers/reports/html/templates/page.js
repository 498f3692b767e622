"use strict";
(() => {
  const table = document.getElementById("layers");
  if (!table) return;
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  const names = titles.map((title) => title.textContent);
  const rows = [...body.rows]; // in model order, whatever the table shows
  const tails = rows.map((row) => row.querySelector(".name").childNodes[1].textContent.trim());
  const texts = rows.map((row) => [...row.querySelectorAll(".t")].map((cell) => cell.textContent).join(" ").toLowerCase());

  // Sorting: numbers from high to low first, texts from A; the third click is model order again.
  const key = (row, column, number) => {
    const cell = row.cells[column];
    if (!number) return cell.textContent === "–" ? null : cell.textContent;
    if (column === 0) return Number(cell.textContent);
    return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
  };
  const order = new Intl.Collator("en", { numeric: true });
  const sort = (column) => {
    const title = titles[column];
    const number = title.dataset.kind === "number";
    const cycle = number && column ? ["descending", "ascending"] : ["ascending", "descending"];
    const next = cycle[cycle.indexOf(title.getAttribute("aria-sort")) + 1]; // undefined after the last
    titles.forEach((other) => other.removeAttribute("aria-sort"));
    let sorted = rows;
    if (next) {
      title.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const keyed = rows.map((row) => [key(row, column, number), row]);
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last either way
        return sign * (number ? a - b : order.compare(a, b));
      });
      sorted = keyed.map(([, row]) => row);
    }
    body.append(...sorted);
  };
  titles.forEach((title, column) => {
    const button = document.createElement("span"); // a real button would keep browsers from repeating the titles on every printed page
    button.role = "button";
    button.tabIndex = 0;
    button.textContent = title.textContent;
    button.addEventListener("click", () => sort(column));
    button.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort(column);
    });
    title.replaceChildren(button);
  });

  // Filtering: every word must be in a row, a number as a whole one; pictures show the same layers.
  const form = document.getElementById("filter");
  const query = document.getElementById("query");
  const status = document.getElementById("status");
  const count = document.getElementById("count");
  const chips = [...form.querySelectorAll(".chip")];
  const charts = [...document.querySelectorAll(".chart svg")];
  const columns = document.querySelector("main").dataset.columns.split(" ").filter(Boolean).map(Number);
  const cells = [...document.querySelectorAll(".heat rect")];
  let shown = rows.map(() => true);
  let tail = ""; // of the chip that is pressed
  const contains = (word) => {
    const number = /^\d+$/.test(word) ? new RegExp(`(?<!\\d)${word}(?!\\d)`) : null;
    return (text) => (number ? number.test(text) : text.includes(word));
  };
  const columnOf = (svg, x) => Math.floor((x - svg.dataset.left) / svg.dataset.step);
  const marks = charts.map((svg) => [...svg.querySelectorAll(".marks path:not(.outline, .median)")].map((path) => ({
    path,
    parts: path.getAttribute("d").split(/(?=M)/).map((part) => [columns[columnOf(svg, parseFloat(part.slice(1)))], part]),
  })));
  const light = (svg, number, all) => { // the marks of layers that are shown, once more over all marks in pale
    svg.querySelector(".marks").classList.toggle("pale", !all);
    svg.querySelector(".lit").replaceChildren(...(all ? [] : marks[number].map(({ path, parts }) => {
      const copy = path.cloneNode();
      copy.setAttribute("d", parts.filter(([row]) => shown[row]).map(([, part]) => part).join(""));
      return copy;
    })));
  };
  const veil = (svg) => { // over the columns of the others, where marks are one outline
    if (!svg.querySelector(".outline")) return;
    const { left, step, top, bottom } = svg.dataset;
    const x = (column) => (Number(left) + column * step).toFixed(2);
    const hidden = columns.map((row, column) => [row, column]).filter(([row]) => !shown[row]);
    const path = hidden.map(([, column]) => `M${x(column)} ${top}H${x(column + 1)}V${bottom}H${x(column)}z`).join("");
    svg.querySelector(".veil").setAttribute("d", path);
  };
  const filter = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean).map(contains);
    const wanted = status ? status.value : "";
    shown = rows.map((row, i) => (!wanted || row.dataset.status === wanted) && (!tail || tails[i] === tail) && words.every((word) => word(texts[i])));
    rows.forEach((row, i) => { row.hidden = !shown[i]; });
    const all = shown.every(Boolean);
    charts.forEach((svg, number) => {
      light(svg, number, all);
      veil(svg);
    });
    cells.forEach((cell) => cell.classList.toggle("off", !shown[cell.dataset.layer]));
    chips.forEach((chip) => chip.setAttribute("aria-pressed", String(chip.dataset.tail === tail)));
    const found = shown.filter(Boolean).length;
    count.textContent = found === rows.length ? `${rows.length} layers` : `${found} of ${rows.length} layers`;
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", filter);
  if (status) status.addEventListener("change", filter);
  chips.forEach((chip) => chip.addEventListener("click", () => {
    tail = chip.dataset.tail === tail ? "" : chip.dataset.tail;
    filter();
  }));
  filter();

  // What is under the pointer, in every picture at once.
  const tip = document.getElementById("tip");
  const tell = (index, event, several) => {
    const head = document.createElement("b");
    const [prefix, last] = rows[index].querySelector(".name").childNodes;
    head.textContent = prefix.textContent + last.textContent.trim() + (several ? ` (worst of ${several})` : "");
    const facts = document.createElement("table");
    [...rows[index].cells].forEach((cell, i) => {
      if (i === 0 || cell.classList.contains("name") || !cell.textContent || cell.textContent === "–") return;
      const line = facts.insertRow();
      line.insertCell().textContent = names[i];
      line.insertCell().textContent = cell.textContent;
    });
    tip.replaceChildren(head, facts);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const x = event.clientX + 16 + width > innerWidth ? event.clientX - 16 - width : event.clientX + 16;
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - height - 4))}px`;
  };
  const hide = () => {
    tip.hidden = true;
    charts.forEach((svg) => svg.querySelector(".cursor").removeAttribute("d"));
  };
  const visit = (index) => {
    if (rows[index].hidden) {
      query.value = tail = "";
      if (status) status.value = "";
      filter();
    }
    rows.forEach((row) => row.classList.remove("found"));
    rows[index].classList.add("found");
    rows[index].scrollIntoView({ block: "center" });
  };
  charts.forEach((svg) => {
    let found = null; // column under the pointer, or the nearest one that the filter shows
    const nearest = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const start = columnOf(svg, point.x);
      if (start < 0 || start >= columns.length) return null;
      for (let away = 0; away < columns.length; away++) {
        for (const column of [start - away, start + away]) if (shown[columns[column]]) return column;
      }
      return null;
    };
    svg.addEventListener("pointermove", (event) => {
      found = nearest(event);
      if (found === null) return hide();
      charts.forEach((other) => {
        const { left, step, top, bottom } = other.dataset;
        other.querySelector(".cursor").setAttribute("d", `M${(Number(left) + (found + 0.5) * step).toFixed(2)} ${top}V${bottom}`);
      });
      tell(columns[found], event);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("click", () => {
      if (found !== null) visit(columns[found]);
    });
  });
  cells.forEach((cell) => {
    cell.addEventListener("pointermove", (event) => tell(Number(cell.dataset.layer), event, cell.dataset.layers));
    cell.addEventListener("pointerleave", hide);
    cell.addEventListener("click", () => visit(Number(cell.dataset.layer)));
  });
  document.querySelectorAll(".worst a").forEach((link) => link.addEventListener("click", (event) => {
    event.preventDefault();
    visit(Number(link.hash.slice("#layer-".length)));
  }));
})();
