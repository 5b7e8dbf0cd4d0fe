// Server-sent events out of a stream of text. No DOM in here.

/** A function to feed with text as it comes: it gives the data of each event that has become complete. */
export function eventParser() {
  let rest = "";
  return (text) => {
    const events = (rest + text).split(/\r?\n\r?\n/);
    rest = events.pop();
    return events.map(dataOf).filter((data) => data !== "");
  };
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
