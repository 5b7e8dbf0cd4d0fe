// The evaluated points of a study's methods. No DOM in here.

/** The point `{preference, rewards}` whose preference is nearest to the weights, or null of none. */
export function nearest(points, names, weights) {
  const far = (point) => names.reduce((s, name, i) => s + ((point.preference[name] ?? 0) - weights[i]) ** 2, 0);
  return points.reduce((best, point) => (best === null || far(point) < far(best) ? point : best), null);
}

/** The numbers' `{low, high}` with some room around them, and the round numbers between, about five. */
export function scale(numbers) {
  const [least, most] = [Math.min(...numbers), Math.max(...numbers)];
  const room = (most - least || Math.abs(most) || 1) * 0.06;
  const [low, high] = [least - room, most + room];
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= (high - low) / 5);
  const first = Math.ceil(low / step);
  const ticks = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  return { low, high, ticks: ticks.map((x) => Number(x.toPrecision(12))) };
}
