"use strict";

// The table: a click on a heading sorts, a word or a button filters.
const table = document.querySelector("table.models");
if (table) {
  const body = table.tBodies[0];
  const valueOf = (row, column) => row.cells[column].dataset.value ?? "";
  table.querySelectorAll("th").forEach((head, column) => {
    const sort = () => {
      const isUp = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      const isText = head.classList.contains("text");
      [...body.rows]
        .sort((a, b) => {
          const [x, y] = [valueOf(a, column), valueOf(b, column)];
          if (x === "" || y === "") return (x === "") - (y === "");  // what is missing stays last
          const order = isText ? x.localeCompare(y, "en", { numeric: true }) : x - y;
          return isUp ? order : -order;
        })
        .forEach((row) => body.append(row));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });

  const words = document.querySelector(".tools input");
  const buttons = [...document.querySelectorAll(".tools button")];
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const kinds = { size: [], is: [] };
    buttons.filter((button) => button.ariaPressed === "true")
      .forEach((button) => kinds[button.dataset.kind].push(button.dataset.value));
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      const isOfSize = !kinds.size.length || kinds.size.includes(row.dataset.size);
      const isOfKind = kinds.is.every((kind) => row.dataset.is.split(" ").includes(kind));
      row.hidden = !(wanted.every((word) => text.includes(word)) && isOfSize && isOfKind);
    }
  };
  words.addEventListener("input", filter);
  buttons.forEach((button) => button.addEventListener("click", () => {
    button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
    filter();
  }));
}

// The pictures: plotly lies compressed in this page; until it is unpacked, and on paper, still
// pictures stand in their places.
const places = [...document.querySelectorAll(".plot")];

function colored(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--grid"), linecolor: color("--line") };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), size: 12, family: "system-ui, sans-serif" },
    xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--dim"), activecolor: color("--ink") },
    hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), align: "left",
                  font: { color: color("--ink"), size: 12 } },
  };
}

function draw(place) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  place.classList.add("drawn");
  Plotly.react(place.querySelector(".live"), figure.data, colored(figure.layout), {
    responsive: true, displaylogo: false, showTips: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  });
}

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

if (places.length && "DecompressionStream" in window) {
  unpack("plotly").then(() => {
    if (!window.Plotly) return;
    const drawAll = () => places.forEach(draw);
    drawAll();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  });
}
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.printed").forEach((each) => { each.open = true; });
});
