// One generation as its chunks tell it. No DOM in here.

export class Run {
  id = null;
  mage = null;
  reason = null;
  tokens = 0;
  first = null;
  last = null;

  /** `now`: when the request left, in milliseconds of any clock; `take` reads the same one. */
  constructor(now) {
    this.start = now;
  }

  /** Count a chunk; gives its text, and whether that was written under another preference or method than before. */
  take(chunk, now) {
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    const mage = chunk.mage ?? null;
    const changed = Boolean(mage && this.mage && steering(mage) !== steering(this.mage));
    this.mage = mage ?? this.mage;
    this.id ??= mage?.generations?.[0] ?? null;
    this.reason = choice?.finish_reason ?? this.reason;
    const text = choice?.delta?.content ?? "";
    if (text !== "") {
      this.tokens += 1; // until the usage at the end says it exactly
      this.first ??= now;
      this.last = now;
    }
    return { text, changed };
  }

  /** Milliseconds to the first text; null before it. */
  get wait() {
    return this.first === null ? null : this.first - this.start;
  }

  /** Tokens per second since the request left, the wait included: chunks may come in bursts. Null before the first. */
  get rate() {
    return this.last === null ? null : (1000 * this.tokens) / (this.last - this.start);
  }
}

const steering = ({ preference, method, strength, candidates }) =>
  JSON.stringify([Object.entries(preference).sort(), method, strength, candidates]);
