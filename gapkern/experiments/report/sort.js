// Sorts by what a cell's data-sort says, numbers as numbers; a second click turns the order round.
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = row => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const x = Number(key(a) || NaN), y = Number(key(b) || NaN);  // what is empty stays below
      if (isNaN(x) && isNaN(y)) return order * key(a).localeCompare(key(b));
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : order * (x - y);
    };
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  }));
});
