// Controls to choose a preference: a line for two objectives, a triangle for three, one slider each for more.

import { html, svg } from "./dom.js";
import { CORNERS, named, rounded, spelt, toPoint, toWeights, withWeight } from "./simplex.js";

/** A control `{element, weights()}` over names, from weights on; `changed` is called after every move of a person. */
export function preferencePicker(names, weights, changed) {
  let now = rounded(weights);
  const current = () => now;
  const move = (next) => {
    if (String(next) === String(now)) return;
    now = next;
    control.show();
    changed();
  };
  const control = names.length === 3 ? triangle(names, current, move) : sliders(names, current, move);
  control.show();
  return { element: control.element, weights: current };
}

/** One slider for each objective; for two a single one, from all of the first to all of the second. */
function sliders(names, weights, move) {
  const line = names.length === 2;
  const numbers = names.map(() => html("b"));
  const ends = names.map((name, i) => html("span", null, `${name} `, numbers[i]));
  const inputs = (line ? [1] : [...names.keys()]).map((i) =>
    html("input", {
      type: "range", min: 0, max: 100, disabled: names.length === 1,
      "aria-label": line ? `Preference from ${names[0]} to ${names[1]}` : `Weight of ${names[i]}`,
      input: (event) => move(withWeight(weights(), i, event.target.valueAsNumber / 100)),
    }),
  );
  const show = () => {
    numbers.forEach((number, i) => (number.textContent = weights()[i].toFixed(2)));
    inputs.forEach((input, k) => {
      input.value = Math.round(100 * weights()[line ? 1 : k]);
      input.setAttribute("aria-valuetext", spelt(names, named(names, weights())));
    });
  };
  const parts = line ? [...ends, ...inputs] : ends.flatMap((end, i) => [end, inputs[i]]);
  return { element: html("div", { class: line ? "line" : "sliders" }, ...parts), show };
}

const STEP = 0.02; // of an arrow key, as a share of the triangle's side; five times that with Shift
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
const [SIDE, LEFT, FLOOR] = [170, 85, 172]; // of the triangle in its view box

const place = ([x, y]) => [LEFT + SIDE * x, FLOOR - SIDE * y];

function triangle(names, weights, move) {
  const numbers = names.map(() => svg("tspan"));
  const labels = CORNERS.map(place).map(([x, y], i) =>
    svg("text", { x, y: y + (i === 2 ? -8 : 18), "text-anchor": "middle" }, `${names[i]} `, numbers[i]),
  );
  const handle = svg("circle", {
    class: "handle", r: 8, tabindex: 0, role: "slider", "aria-roledescription": "point in a triangle",
    "aria-label": `Preference among ${names.join(", ")}; arrow keys move it`, "aria-valuemin": 0, "aria-valuemax": 100,
    keydown: (event) => {
      if (!ARROWS[event.key]) return;
      event.preventDefault();
      const steps = ARROWS[event.key].map((x) => x * STEP * (event.shiftKey ? 5 : 1));
      move(toWeights(toPoint(weights()).map((x, axis) => x + steps[axis])));
    },
  });
  const follow = (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    move(toWeights([(x - LEFT) / SIDE, (FLOOR - y) / SIDE]));
  };
  const grasp = (event) => {
    event.preventDefault();
    picture.setPointerCapture(event.pointerId);
    handle.focus({ preventScroll: true });
    follow(event);
  };
  const pointermove = (event) => picture.hasPointerCapture(event.pointerId) && follow(event);
  const picture = svg("svg", { class: "triangle", viewBox: "0 0 340 196", pointerdown: grasp, pointermove });
  const halves = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]].map(toPoint);
  const areas = [CORNERS, halves].map((points) => svg("polygon", { points: points.map(place).join(" ") }));
  picture.append(...areas, ...labels, handle);
  const show = () => {
    const [x, y] = place(toPoint(weights()));
    handle.setAttribute("transform", `translate(${x} ${y})`);
    handle.setAttribute("aria-valuenow", Math.round(100 * weights()[0]));
    handle.setAttribute("aria-valuetext", spelt(names, named(names, weights())));
    numbers.forEach((number, i) => (number.textContent = weights()[i].toFixed(2)));
  };
  return { element: picture, show };
}
