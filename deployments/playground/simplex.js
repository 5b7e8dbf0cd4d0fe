// Preferences: points of the simplex, as arrays of weights in the order of the study's objectives. No DOM in here.

const HEIGHT = Math.sqrt(3) / 2;

/** Where the corners of three objectives lie: a triangle of side 1, y upwards. */
export const CORNERS = [[0, 0], [1, 0], [0.5, HEIGHT]];

/** Any numbers as weights in hundredths that sum to exactly 1; negative ones count as 0, all 0 as equal weights. */
export function rounded(numbers) {
  const clean = numbers.map((x) => (Number.isFinite(x) && x > 0 ? x : 0));
  const sum = clean.reduce((a, b) => a + b, 0);
  const shares = clean.map((x) => (sum > 0 ? (100 * x) / sum : 100 / clean.length));
  const parts = shares.map((x) => Math.floor(x + 1e-9));
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - parts[b] - (shares[a] - parts[a]) || a - b);
  const missing = 100 - parts.reduce((a, b) => a + b, 0);
  for (const i of order.slice(0, missing)) parts[i] += 1;
  return parts.map((x) => x / 100);
}

/** The nearest point of the simplex to numbers that sum to 1 but may be negative. */
export function projected(numbers) {
  const sorted = [...numbers].sort((a, b) => b - a);
  let sum = 0;
  let shift = 0;
  sorted.forEach((x, i) => {
    sum += x;
    if (x - (sum - 1) / (i + 1) > 0) shift = (sum - 1) / (i + 1);
  });
  return numbers.map((x) => Math.max(0, x - shift));
}

/** Three weights as a point [x, y] of the triangle. */
export const toPoint = (weights) => [0, 1].map((axis) => weights.reduce((s, w, i) => s + w * CORNERS[i][axis], 0));

/** A point of the plane as three weights: those of the triangle's point that is nearest. */
export function toWeights([x, y]) {
  const top = y / HEIGHT;
  const right = x - top / 2;
  return rounded(projected([1 - right - top, right, top]));
}

/** Weights with the i-th at a value, the others sharing the rest as they did; equally where they had nothing. */
export function withWeight(weights, i, value) {
  const rest = weights.reduce((s, w, k) => (k === i ? s : s + w), 0);
  const share = (w) => (rest > 0 ? (w / rest) * (1 - value) : (1 - value) / (weights.length - 1));
  return rounded(weights.map((w, k) => (k === i ? value : share(w))));
}

/** Weights that lean towards the i-th objective. */
export const leaning = (count, i) => withWeight(Array(count).fill(1 / count), i, count > 1 ? 0.8 : 1);

export const named = (names, weights) => Object.fromEntries(names.map((name, i) => [name, weights[i]]));

/** `{short: 0.3, …}` as text in the order of the names: what is left out weighs 0. */
export const spelt = (names, numbers) => names.map((name) => `${name} ${(numbers[name] ?? 0).toFixed(2)}`).join(" · ");
