// Elements without a framework. Text always goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element: `h("a", { href: "#" }, "text", child)`; an attribute `onclick` is a listener. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets the text only if it differs, so that a live page does not disturb selections and screen readers. */
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** JSON from a route; the error is the server's sentence. */
export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams(
    Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null),
  );
  const answer = await fetch(`${path}?${query}`, { signal, headers: { Accept: "application/json" } });
  if (answer.ok) return answer.json();
  const body = await answer.text();
  let reason = body.trim();
  try {
    reason = JSON.parse(body).error;
  } catch {
    // Plain text is a sentence already.
  }
  throw new Error(reason || `the agent answered ${answer.status}`);
}

/** Runs `work` at most once per `wait` milliseconds, and once more if it was asked for meanwhile; `.now()` at once. */
export function throttle(wait, work) {
  let timer = null;
  let again = false;
  const fire = async () => {
    again = false;
    try {
      await work();
    } finally {
      timer = setTimeout(() => {
        timer = null;
        if (again) request();
      }, wait);
    }
  };
  const request = () => {
    if (timer !== null) {
      again = true;
      return;
    }
    timer = 0;
    fire();
  };
  request.now = work;
  return request;
}
