// The server's HTTP API. Paths are relative to the page, so that it may be served under any prefix.

import { eventParser } from "./events.js";

let key = "";

/** The API key of all calls from now on; it is kept nowhere else. */
export function useKey(value) {
  key = value;
}

/** What went wrong, in one line; status 0: there was no answer at all. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const get = async (path) => (await call("GET", path)).json();

export const patch = async (path, body) => (await call("PATCH", path, body)).json();

/** The chunks of a chat completion as they come. Raises ApiError; the signal's reason when that aborts. */
export async function* streamed(request, signal) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await call("POST", "v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parse = eventParser();
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    signal.throwIfAborted();
    if (done) throw new ApiError("the stream broke off before its end", 0);
    for (const data of parse(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 0);
      yield chunk;
      signal.throwIfAborted();
    }
  }
}

async function call(method, path, body, signal) {
  const headers = key === "" ? {} : { authorization: `Bearer ${key}` };
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal }).catch(() => {
    signal?.throwIfAborted();
    throw new ApiError("the server can't be reached", 0);
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const retry = response.headers.get("retry-after");
  const when = retry === null ? "" : `; try again ${/^\d+$/.test(retry) ? `in ${retry} s` : `after ${retry}`}`;
  throw new ApiError(`${answer?.error?.message ?? `HTTP status ${response.status}`}${when}`, response.status);
}
