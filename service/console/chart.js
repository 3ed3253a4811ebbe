// A small chart of lines over time: the drawing, the values as text, and a table of them.

import { set, write } from "./admin.js";
import { h, svg } from "./dom.js";
import { roundAbove } from "./format.js";

const WIDTH = 300;
const HEIGHT = 100;
const TABLE_ROWS = 12;

/**
 * A chart. `draw` shows points; each has a time `at` in ms and a value, or null, for each series.
 *
 * @param {object} options
 * @param {string} options.title
 * @param {string} options.about what the figures say, in one sentence
 * @param {{name: string, label: string, tone: string}[]} options.series
 * @param {(value: number) => string} options.format
 * @param {(value: number) => string} options.scaleFormat of the chart's top, which is a round number
 * @param {number} options.top the least value that the chart's top may have, so that noise does not look like a load
 */
export function chart({ title, about, series, format, scaleFormat = format, top }) {
  const now = new Map(series.map(({ name }) => [name, h("dd", { text: "–" })]));
  const legend = h("dl", { class: "chart-legend" });
  for (const { name, label, tone } of series)
    legend.append(h("div", { data: { tone } }, h("dt", { text: label }), now.get(name)));
  const lines = new Map(series.map(({ name, tone }) => [name, svg("path", { class: "line", "data-tone": tone })]));
  const area = svg("path", { class: "area", "data-tone": series[0].tone });
  const cross = svg("line", { class: "cross", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const grid = [0, 0.5, 1].map((at) => svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: at * HEIGHT, y2: at * HEIGHT }));
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
    ...grid,
    ...(series.length === 1 ? [area] : []),
    ...lines.values(),
    cross,
  );
  const highest = h("span", { class: "chart-highest", "aria-hidden": "true" });
  const span = h("span", {});
  const body = h("tbody");
  const head = h("tr", {}, h("th", { scope: "col" }, "ago"));
  for (const { label } of series) head.append(h("th", { scope: "col" }, label));
  const table = h("table", {}, h("caption", { class: "visually-hidden" }, title), h("thead", {}, head), body);
  const values = h("details", { class: "chart-values" }, h("summary", {}, "Values"), table);
  const figure = h(
    "figure",
    { class: "chart" },
    h("figcaption", {}, h("h2", {}, title), h("p", {}, about)),
    legend,
    h("div", { class: "chart-picture" }, highest, picture),
    h("div", { class: "chart-axis", "aria-hidden": "true" }, span, h("span", {}, "now")),
    values,
  );

  let drawnPoints = [];
  let from = 0;
  let until = 1;

  function place(at) {
    return ((at - from) / (until - from)) * WIDTH;
  }

  function draw(points, since, to) {
    [drawnPoints, from, until] = [points, since, to];
    const found = points.flatMap((point) => series.map(({ name }) => point[name] ?? 0));
    const scale = roundAbove(Math.max(top, ...found) * 0.999);
    for (const { name } of series) lines.get(name).setAttribute("d", path(points, name, scale, place));
    if (series.length === 1) area.setAttribute("d", filled(points, series[0].name, scale, place));
    write(highest, scaleFormat(scale));
    write(span, `${Math.round((to - since) / 60_000)} min ago`);
    const last = points.at(-1);
    show(last);
    const said = series.map(({ name, label }) => `${label} ${text(last?.[name])}`).join(", ");
    set(picture, "aria-label", `${title}, now: ${said}`);
    if (values.open) fillTable();
  }

  const text = (value) => (value === null || value === undefined ? "–" : format(value));

  function show(point) {
    for (const { name } of series) write(now.get(name), text(point?.[name]));
  }

  function fillTable() {
    const rows = drawnPoints.slice(-TABLE_ROWS).reverse();
    body.replaceChildren(
      ...rows.map((point) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, `${Math.round((until - point.at) / 1000)} s`),
          ...series.map(({ name }) => h("td", {}, text(point[name]))),
        ),
      ),
    );
  }

  values.ontoggle = fillTable;
  picture.onpointermove = ({ clientX }) => {
    const box = picture.getBoundingClientRect();
    const at = from + ((clientX - box.left) / box.width) * (until - from);
    const nearest = drawnPoints.reduce(
      (best, point) => (best === null || Math.abs(point.at - at) < Math.abs(best.at - at) ? point : best),
      null,
    );
    if (nearest === null) return;
    const x = place(nearest.at);
    set(cross, "x1", x);
    set(cross, "x2", x);
    set(cross, "visibility", "visible");
    show(nearest);
  };
  picture.onpointerleave = () => {
    set(cross, "visibility", "hidden");
    show(drawnPoints.at(-1));
  };
  return { element: figure, draw };
}

/** A line through the points; it breaks where there is no value, and where the page did not look. */
function path(points, name, scale, place) {
  let drawing = "";
  let isDown = false;
  for (const point of points) {
    const value = point[name];
    if (value === null || value === undefined) {
      isDown = false;
      continue;
    }
    const y = HEIGHT - (Math.min(value, scale) / scale) * HEIGHT;
    drawing += `${isDown && !point.afterGap ? "L" : "M"}${place(point.at).toFixed(2)} ${y.toFixed(2)}`;
    isDown = true;
  }
  return drawing;
}

/** The area below each unbroken piece of a line. */
function filled(points, name, scale, place) {
  const pieces = [];
  for (const point of points) {
    const value = point[name];
    if (value === null || value === undefined) pieces.push([]);
    else if (pieces.length === 0 || point.afterGap) pieces.push([point]);
    else pieces.at(-1).push(point);
  }
  return pieces
    .filter((piece) => piece.length > 1)
    .map((piece) => {
      const line = path(piece.map((point) => ({ ...point, afterGap: false })), name, scale, place);
      return `${line}L${place(piece.at(-1).at).toFixed(2)} ${HEIGHT}L${place(piece[0].at).toFixed(2)} ${HEIGHT}Z`;
    })
    .join("");
}
