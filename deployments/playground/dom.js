// Elements made by hand. Strings only ever become text nodes: what a model writes is never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element; an attribute that is a function listens to the event of its name, null and false are left out. */
export const html = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** The same for SVG. */
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

/** What a number field says, or null where it is empty. */
export const numberIn = (input) => (Number.isFinite(input.valueAsNumber) ? input.valueAsNumber : null);

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
