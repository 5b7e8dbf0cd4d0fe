// Changes that come faster than they can be sent. No DOM in here.

/** A function that calls the async `work` now, or once more after the call under way: never two at a time. */
export function oneAtATime(work) {
  let busy = false;
  let again = false;
  return async () => {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        await work();
      }
    } finally {
      busy = false;
    }
  };
}
