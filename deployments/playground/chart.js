// The evaluated front: a line of points for each method, and which of them the panels' preferences choose.

import { html, svg } from "./dom.js";
import { nearest, scale } from "./fronts.js";
import { spelt } from "./simplex.js";

const [WIDTH, LEFT, RIGHT, TOP, BOTTOM] = [360, 42, 350, 8, 252]; // of the view box, whose height is BOTTOM + 44
const CIRCLE = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z";
const SHAPES = [CIRCLE, "M-4-4h8v8h-8z", "M0-5 5 4h-10z", "M0-5 5 0 0 5-5 0z", "M0 5 5-4h-10z"];

/**
 * Draws into `place`; gives a function that draws anew with panels `{letter, index, preference, method}`.
 * `front`: as /v1/front gives it; a panel's preference has its weights in the order of the front's objectives.
 */
export function frontChart(place, front) {
  const names = front.objectives;
  const methods = Object.keys(front.methods).filter((method) => front.methods[method].length > 0);
  const note = html("p", { class: "soft" }, front.note);
  place.replaceChildren(html("h2", null, "Evaluated front"), note);
  if (methods.length === 0 || names.length < 2) return () => {};

  let panels = [];
  const axes = [0, 1].map((axis) => {
    const options = names.map((name, i) => html("option", { selected: i === axis }, name));
    return html("select", { change: () => draw() }, ...options);
  });
  const picture = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${BOTTOM + 44}`, role: "img" });
  const [legend, chosen] = ["methods", "chosen"].map((name) => html("ul", { class: name }));
  const choice = ["Across ", "Up "].map((word, axis) => html("label", null, word, axes[axis]));
  note.before(...(names.length > 2 ? [html("div", { class: "row" }, ...choice)] : []), picture, legend, chosen);

  const shape = (method) => SHAPES[methods.indexOf(method) % SHAPES.length];
  const style = (method) => {
    const used = panels.some((panel) => panel.method === method);
    return `method${used ? " used" : ""}${methods.indexOf(method) < SHAPES.length ? "" : " hollow"}`;
  };

  function line(method, at, across) {
    const weight = (point) => point.preference[across] ?? 0;
    const points = [...front.methods[method]].sort((a, b) => weight(a) - weight(b));
    const marks = points.map((point) => {
      const title = `${method} at ${spelt(names, point.preference)}: ${spelt(names, point.rewards)}`;
      return svg("path", { d: shape(method), transform: `translate(${at(point)})` }, svg("title", null, title));
    });
    const joined = names.length === 2 ? svg("polyline", { points: points.map(at).join(" ") }) : null;
    return svg("g", { class: style(method) }, joined, ...marks);
  }

  function draw() {
    const [across, up] = axes.map((select) => select.value);
    const all = methods.flatMap((method) => front.methods[method]);
    const [x, y] = [across, up].map((name) => scale(all.map(({ rewards }) => rewards[name])));
    const at = ({ rewards }) => [placed(rewards[across], x, LEFT, RIGHT), placed(rewards[up], y, BOTTOM, TOP)];
    const order = [...methods].sort((a, b) => style(a).includes("used") - style(b).includes("used"));
    const chosenBy = ({ method, preference }) => nearest(front.methods[method] ?? [], names, preference);
    const choices = panels.map((panel) => ({ ...panel, point: chosenBy(panel) }));
    picture.setAttribute("aria-label", `Mean rewards, ${up} over ${across}, a line for each method`);
    const lines = order.map((method) => line(method, at, across));
    picture.replaceChildren(...grid(x, y, across, up), ...lines, ...badges(choices, at));
    legend.replaceChildren(
      ...methods.map((method) => {
        const mark = svg("svg", { viewBox: "-6 -6 12 12", "aria-hidden": true }, svg("path", { d: shape(method) }));
        return html("li", { class: style(method) }, mark, method);
      }),
    );
    chosen.replaceChildren(
      ...choices.map(({ letter, index, method, point }) => {
        const where = point && `evaluated at ${spelt(names, point.preference)}: reward ${spelt(names, point.rewards)}`;
        const text = html("span", null, `${method}, ${where ?? "not evaluated"}`);
        return html("li", { class: `p${index}` }, html("b", null, letter), text);
      }),
    );
  }

  return (now) => {
    panels = now;
    draw();
  };
}

const placed = (value, { low, high }, start, end) => start + ((value - low) / (high - low)) * (end - start);

function grid(x, y, across, up) {
  const label = (attributes, text) => svg("text", { "text-anchor": "middle", ...attributes }, text);
  const columns = x.ticks.map((value) => [value, placed(value, x, LEFT, RIGHT)]);
  const rows = y.ticks.map((value) => [value, placed(value, y, BOTTOM, TOP)]);
  const middle = (TOP + BOTTOM) / 2;
  return [
    svg("path", { class: "grid", d: columns.map(([, at]) => `M${at} ${TOP}V${BOTTOM}`).join("") }),
    svg("path", { class: "grid", d: rows.map(([, at]) => `M${LEFT} ${at}H${RIGHT}`).join("") }),
    ...columns.map(([value, at]) => label({ x: at, y: BOTTOM + 16 }, value)),
    ...rows.map(([value, at]) => label({ x: LEFT - 6, y: at + 4, "text-anchor": "end" }, value)),
    label({ class: "axis", x: (LEFT + RIGHT) / 2, y: BOTTOM + 37 }, `${across}, mean reward →`),
    label({ class: "axis", x: 10, y: middle, transform: `rotate(-90 10 ${middle})` }, `${up}, mean reward →`),
  ];
}

/** The panels' letters at their points; those at one point side by side. */
function badges(choices, at) {
  const there = choices.filter(({ point }) => point !== null);
  return there.map(({ letter, index, point }) => {
    const same = there.filter((other) => other.point === point);
    const shift = (same.findIndex((other) => other.letter === letter) - (same.length - 1) / 2) * 19;
    const [x, y] = at(point);
    const text = svg("text", { y: 4, "text-anchor": "middle" }, letter);
    const attributes = { class: `badge p${index}`, transform: `translate(${x + shift} ${y})` };
    return svg("g", attributes, svg("circle", { r: 9 }), text);
  });
}
