// The page: loads the study, keeps the panels, and turns keys and buttons into runs and links.

import { get, useKey } from "./api.js";
import { frontChart } from "./chart.js";
import { byId, numberIn } from "./dom.js";
import { decoded, encoded, MOST_PANELS } from "./link.js";
import { Panel } from "./panel.js";
import { leaning, rounded } from "./simplex.js";

const FIRST_PROMPT = "How was your day?";
const LETTERS = "ABCD";

let study;
let model;
let drawFront;
let panels = [];
let runs = 0;

const names = () => study.objectives.map((objective) => objective.name);
const say = (text) => (byId("status").textContent = text);

async function load() {
  byId("door").hidden = true;
  say("Loading …");
  try {
    const [objectives, front, models] = await Promise.all(["v1/objectives", "v1/front", "v1/models"].map(get));
    [study, model] = [objectives, models.data[0].id];
    drawFront = frontChart(byId("front"), front);
  } catch (error) {
    say("");
    return openDoor(error);
  }
  document.title = `${study.study} · playground`;
  byId("study").textContent = `${study.study}: ${names().join(", ")}`;
  byId("temperature").placeholder = study.defaults.temperature;
  byId("tokens").placeholder = study.defaults.max_tokens;
  byId("tokens").max = study.limits.max_tokens;
  byId("main").hidden = false;
  say("");
  restore();
}

/** Say what is wrong at the top, and ask for a key where that is what's missing. */
function openDoor(error) {
  byId("trouble").textContent = error.message;
  byId("door").hidden = false;
  byId("key-field").hidden = error.status !== 401;
  if (error.status === 401) byId("key").focus();
}

/** What the link in the address bar says, else a first state: panels that lean towards different objectives. */
function restore() {
  stop();
  const fragment = location.hash.slice(1);
  const state = fragment === "" ? null : decoded(fragment);
  if (fragment !== "" && state === null) say("This link can't be read.");
  byId("prompt").value = state?.prompt ?? FIRST_PROMPT;
  byId("system").value = state?.system ?? "";
  byId("more").open = byId("system").value !== "";
  for (const id of ["temperature", "tokens", "seed"]) byId(id).value = state?.[id] ?? "";
  const method = study.defaults.method;
  const lean = (_, i) => ({ preference: leaning(names().length, i), method, strength: null, candidates: null });
  const first = names().slice(0, 2).map(lean);
  panels = (state?.panels.map((panel) => fitted(panel, state.objectives)) ?? first).map(made);
  byId("panels").replaceChildren(...panels.map((panel) => panel.element));
  arrange();
}

/** A link's panel for this study: weights by name, and a method that it has. */
function fitted(panel, objectives) {
  const preference = rounded(names().map((name) => panel.preference[objectives.indexOf(name)] ?? 0));
  const known = study.methods.some(({ name }) => name === panel.method);
  return { ...panel, preference, method: known ? panel.method : study.defaults.method };
}

function made(settings) {
  const failed = (error) => error.status === 401 && openDoor(error);
  return new Panel(study, settings, { changed: draw, removed: remove, failed });
}

/** One more panel, as the last one is, with equal weights. */
function add() {
  if (panels.length === MOST_PANELS) return;
  panels.push(made({ ...panels.at(-1).settings(), preference: names().map(() => 1) }));
  byId("panels").append(panels.at(-1).element);
  arrange();
}

function remove(panel) {
  panel.stop();
  panel.element.remove();
  panels = panels.filter((other) => other !== panel);
  arrange();
  byId("add").focus();
}

function arrange() {
  panels.forEach((panel, index) => panel.place(LETTERS[index], index, panels.length > 1));
  byId("add").setAttribute("aria-disabled", panels.length === MOST_PANELS);
  draw();
}

function draw() {
  drawFront(panels.map((panel, index) => ({ ...panel.settings(), letter: LETTERS[index], index })));
}

/** What all panels share. */
function shared() {
  const [temperature, tokens, seed] = ["temperature", "tokens", "seed"].map((id) => numberIn(byId(id)));
  return { prompt: byId("prompt").value, system: byId("system").value.trim(), temperature, tokens, seed };
}

async function generate() {
  const { prompt, system, temperature, tokens: max_tokens, seed } = shared();
  const messages = [{ role: "user", content: prompt }];
  if (system !== "") messages.unshift({ role: "system", content: system });
  const fields = Object.entries({ model, messages, temperature, max_tokens, seed });
  const request = Object.fromEntries(fields.filter(([, value]) => value !== null));
  const run = (runs += 1);
  byId("stop").setAttribute("aria-disabled", "false");
  say(panels.length > 1 ? `Writing in ${panels.length} panels …` : "Writing …");
  await Promise.all(panels.map((panel) => panel.generate(request)));
  if (run === runs) rest("Done.");
}

function stop() {
  if (byId("stop").getAttribute("aria-disabled") === "true") return;
  runs += 1;
  for (const panel of panels) panel.stop();
  rest("Stopped.");
}

function rest(text) {
  byId("stop").setAttribute("aria-disabled", "true");
  say(text);
}

async function copyLink() {
  const state = { ...shared(), objectives: names(), panels: panels.map((panel) => panel.settings()) };
  history.replaceState(null, "", `#${encoded(state)}`);
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  say(copied ? "Link copied." : "The link is in the address bar.");
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  if (study) byId("door").hidden = true;
  else load();
});
for (const [id, action] of Object.entries({ stop, add, copy: copyLink })) byId(id).addEventListener("click", action);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && study) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
addEventListener("hashchange", () => study && restore());
load();
