// The page's state as a link's fragment: an array of JSON in URL-safe base64. No DOM in here.

export const MOST_PANELS = 4;
const VERSION = 1;

/**
 * `{prompt, system, temperature, tokens, seed, objectives, panels}` as text; a panel is
 * `{preference, method, strength, candidates}` with its weights in the order of the objectives.
 */
export function encoded({ prompt, system, temperature, tokens, seed, objectives, panels }) {
  const lists = panels.map((panel) => [panel.preference, panel.method, panel.strength, panel.candidates]);
  const list = [VERSION, prompt, system, temperature, tokens, seed, objectives, lists];
  const bytes = new TextEncoder().encode(JSON.stringify(list));
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The state that `encoded` wrote, or null: anybody may have written a link. */
export function decoded(text) {
  try {
    const binary = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (char) => char.charCodeAt(0));
    const list = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
    const [version, prompt, system, temperature, tokens, seed, objectives, lists] = list;
    const panels = lists.map(([preference, method, strength, candidates]) => {
      return { preference, method, strength, candidates };
    });
    const weights = panels.flatMap(({ preference }) => preference);
    const sound =
      version === VERSION && Array.isArray(objectives) && panels.length >= 1 && panels.length <= MOST_PANELS &&
      panels.every(({ preference }) => preference.length === objectives.length) && weights.every(Number.isFinite) &&
      [prompt, system, ...objectives, ...panels.map(({ method }) => method)].every((x) => typeof x === "string") &&
      [temperature, tokens, seed, ...panels.flatMap((x) => [x.strength, x.candidates])].every(numberOrNull);
    return sound ? { prompt, system, temperature, tokens, seed, objectives, panels } : null;
  } catch {
    return null;
  }
}

const numberOrNull = (x) => x === null || Number.isFinite(x);
