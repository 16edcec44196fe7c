// Changes a tree of elements into another one as little as can be. panel.js follows in the same module (live.py).

const VALUED = "input, select, textarea";

// Make the children of `old` those of `fresh` and change as little as can be: an element that stays keeps its focus, its
// scrolled place, a drag on it, and what was typed into it.
function morph(old, fresh) {
  const wanted = [...fresh.childNodes];
  const coming = new Set(wanted.map(keyOf));
  const known = new Map([...old.childNodes].map((child) => [keyOf(child), child]));
  let here = old.firstChild;
  for (const child of wanted) {
    while (here && keyOf(here) !== null && !coming.has(keyOf(here))) here = drop(here);
    const key = keyOf(child);
    const same = key === null ? (here && keyOf(here) === null ? here : null) : known.get(key);
    known.delete(key);
    if (!same || same.nodeName !== child.nodeName) {
      old.insertBefore(child, here);
      continue;
    }
    if (same === here) here = here.nextSibling;
    else old.insertBefore(same, here);
    update(same, child);
  }
  while (here) here = drop(here);
}

function drop(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

function keyOf(node) {
  if (node.nodeType !== Node.ELEMENT_NODE) return null;
  const { draft, scroll, keep, region, act, key } = node.dataset;
  const own = node.id || draft || scroll || keep || region;
  if (own) return own;
  return act === undefined ? null : `${act} ${key ?? ""}`;
}

function update(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.isEqualNode(fresh)) return;
  const keeps = (name) => ["tabindex", "data-waiting", "data-latency", "data-slow"].includes(name) || (name === "open" && "keep" in old.dataset);
  const value = old.getAttribute("value");
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !keeps(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value && !keeps(name)) old.setAttribute(name, value);
  const text = old.defaultValue;
  morph(old, fresh);
  if (!old.matches(VALUED) || "draft" in old.dataset || old === document.activeElement) return;
  if (old.type === "checkbox") old.checked = old.defaultChecked;
  else if (old.matches("textarea") ? text !== old.defaultValue : value !== old.getAttribute("value")) old.value = old.defaultValue;
}
