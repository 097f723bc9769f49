
// Sorts a table by the column whose heading is pressed; cells without a value stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const value = (row) => row.cells[column].dataset.value;
      const missing = (row) => (value(row) === undefined || value(row) === "" ? 1 : 0);
      const rows = [...body.rows].sort((a, b) =>
        missing(a) - missing(b) || (missing(a) ? 0 : sign * (value(a) - value(b))));
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
