// A panel: one preference and method, and the text that is written under them.

import { ApiError, patch, streamed } from "./api.js";
import { html, numberIn } from "./dom.js";
import { oneAtATime } from "./latest.js";
import { preferencePicker } from "./picker.js";
import { Run } from "./run.js";
import { named, spelt } from "./simplex.js";

const SHORT = 16; // characters; the label of a change that wrote less than that gives way to the next one's
const FIGURES = { rate: "tokens/s", wait: "first token", guided: "guided", tokens: "tokens", state: "state" };

export class Panel {
  #abort = null;
  #run = null;
  #sent = "";
  #frame = null;
  #following = true;
  #top = 0;
  #change = oneAtATime(() => this.#patch());

  /** `settings`: as `settings` gives them. `hooks`: `changed()`, `removed(panel)` and `failed(error)`. */
  constructor(study, settings, hooks) {
    this.study = study;
    this.names = study.objectives.map((objective) => objective.name);
    this.hooks = hooks;
    this.#build(settings);
    this.#offer();
  }

  settings() {
    const [strength, candidates] = [this.strength, this.candidates].map(numberIn);
    return { preference: this.picker.weights(), method: this.method.value, strength, candidates };
  }

  /** The panel's letter, which of the colours is its own, and whether it may be removed. */
  place(letter, colour, removable) {
    this.element.className = `panel p${colour}`;
    this.letter.textContent = letter;
    this.remove.hidden = !removable;
    this.element.setAttribute("aria-label", `Panel ${letter}`);
    this.remove.setAttribute("aria-label", `Remove panel ${letter}`);
    this.text.setAttribute("aria-label", `Text of panel ${letter}`);
  }

  /** Write anew; settles when that has ended in whatever way. `shared`: the request without what is the panel's own. */
  async generate(shared) {
    this.stop();
    const abort = new AbortController();
    const run = new Run(performance.now());
    const own = this.#own();
    [this.#abort, this.#run, this.#sent] = [abort, run, JSON.stringify(own)];
    [this.#following, this.#top] = [true, 0];
    this.text.replaceChildren(html("span", null, ""));
    this.text.classList.add("writing");
    this.error.textContent = this.under.textContent = this.element.dataset.generation = "";
    this.#tell(run, "writing");
    try {
      for await (const chunk of streamed({ ...shared, ...own }, abort.signal)) this.#take(run, chunk);
      this.#close(run, run.reason ?? "finished");
    } catch (error) {
      if (abort.signal.aborted) return;
      this.#fail(error);
      this.#close(run, "failed");
    }
  }

  /** End what is being written. */
  stop() {
    if (this.#run === null) return;
    this.#abort.abort();
    this.#close(this.#run, "stopped");
  }

  #build({ preference, method, strength, candidates }) {
    const change = () => this.#moved();
    const number = (value, rest) => html("input", { type: "number", form: "ask", value, change, ...rest });
    const options = this.study.methods.map(({ name }) => html("option", { selected: name === method }, name));
    this.picker = preferencePicker(this.names, preference, change);
    this.method = html("select", { change }, ...options);
    this.strength = number(strength, { min: 0, max: 100, step: "any", placeholder: "default" });
    this.candidates = number(candidates, { min: 1, placeholder: this.study.defaults.candidates });
    this.letter = html("h2");
    this.remove = html("button", { type: "button", click: () => this.hooks.removed(this) }, "×");
    this.text = html("div", { class: "text", role: "region", tabindex: 0, scroll: () => this.#scrolled() });
    this.error = html("p", { class: "error", role: "alert" });
    this.under = html("p", { class: "under soft" });
    const figure = (name) => [name, html("dd", { "data-figure": name }, "–")];
    this.figures = Object.fromEntries(Object.keys(FIGURES).map(figure));
    const labels = { Method: this.method, Strength: this.strength, Candidates: this.candidates };
    const fields = Object.entries(labels).map(([label, field]) => html("label", null, label, field));
    const entry = ([name, label]) => html("div", null, html("dt", null, label), this.figures[name]);
    const head = html("div", { class: "head" }, this.letter, ...fields, this.remove);
    const figures = html("dl", null, ...Object.entries(FIGURES).map(entry));
    this.element = html("section", null, head, this.picker.element, this.text, this.error, this.under, figures);
  }

  #guided(method) {
    return this.study.methods.find(({ name }) => name === method)?.guided;
  }

  /** Strength and candidates are a guide's: without one there is nothing to set. */
  #offer() {
    this.strength.disabled = this.candidates.disabled = !this.#guided(this.method.value);
  }

  #moved() {
    this.#offer();
    this.hooks.changed();
    this.#change();
  }

  /** The panel's own part of a request. */
  #own() {
    const { preference, method, strength, candidates } = this.settings();
    const guide = Object.entries(this.#guided(method) ? { strength, candidates } : {});
    const set = Object.fromEntries(guide.filter(([, value]) => value !== null));
    return { preference: named(this.names, preference), method, ...set };
  }

  /** Have what is being written go on under the panel's settings, where they are no longer those that it has. */
  async #patch() {
    const run = this.#run;
    const own = this.#own();
    if (!run?.id || this.#sent === JSON.stringify(own)) return;
    this.#sent = JSON.stringify(own);
    try {
      await patch(`v1/generations/${encodeURIComponent(run.id)}`, own);
      this.error.textContent = "";
    } catch (error) {
      if (error.status !== 404) this.#fail(error); // 404: it has just ended
    }
  }

  #take(run, chunk) {
    const known = run.id !== null;
    const { text, changed } = run.take(chunk, performance.now());
    if (changed) this.#mark(run.mage.preference);
    this.text.lastChild.firstChild.appendData(text);
    this.#frame ??= requestAnimationFrame(() => this.#refresh());
    if (known) return;
    this.element.dataset.generation = run.id;
    this.#change(); // to what was set before it could be told
  }

  /** From here on the text is another plan's: a new part of it, labelled with the weights. */
  #mark(preference) {
    const last = this.text.lastChild;
    if (last.textContent.length < SHORT) delete last.dataset.label;
    const label = this.names.map((name) => (preference[name] ?? 0).toFixed(2)).join("/");
    this.text.append(html("span", { class: "changed", "data-label": label }, ""));
  }

  /** What costs a layout, once a frame however fast the tokens come. */
  #refresh() {
    this.#frame = null;
    if (this.#run !== null) this.#tell(this.#run, "writing");
    if (this.#following) this.text.scrollTop = this.text.scrollHeight;
  }

  /** Scroll along with the text unless somebody reads further up. */
  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.text;
    this.#following = scrollHeight - scrollTop - clientHeight < 24 || (this.#following && scrollTop >= this.#top);
    this.#top = scrollTop;
  }

  #tell(run, state) {
    const { rate, wait, tokens, reason, mage } = run;
    const guided = reason === null ? "–" : `${Math.round(100 * mage.guided_share)} %`;
    const seconds = wait === null ? "–" : `${(wait / 1000).toFixed(2)} s`;
    const figures = { rate: rate === null ? "–" : rate.toFixed(1), wait: seconds, guided, tokens, state };
    for (const [name, text] of Object.entries(figures)) this.figures[name].textContent = text;
    if (mage === null) return;
    const strength = Number(mage.strength.toPrecision(6)); // a mean by the weights may be 1.9000000000000001
    const guide = this.#guided(mage.method) ? `, strength ${strength}, ${mage.candidates} candidates` : "";
    this.under.textContent = `Written under ${spelt(this.names, mage.preference)}, ${mage.method}${guide}`;
  }

  #close(run, state) {
    if (this.#run !== run) return;
    this.#run = null;
    this.text.classList.remove("writing");
    this.#tell(run, state);
  }

  #fail(error) {
    this.error.textContent = error instanceof ApiError ? error.message : `the page failed: ${error.message}`;
    this.hooks.failed(error);
  }
}
