// Shows a panel that Python drew, and sends back what is done to its controls. There is no logic of any panel here.
//
// Every element with data-act sends {act, key, value}: buttons and rows on a click, what has a value when that changes,
// forms when they are submitted. Python answers with the HTML of the regions that changed, then with {done: number}.
// Attributes that panels use: data-draft (typed text stays), data-clears, data-enter, data-scroll (the place stays; with
// data-follow its end), data-reveal (scrolled to once), details[data-keep], data-walk (arrow keys: column, row, or grid for a table), data-copy.
// Attributes of the root tell tests what is going on: data-waiting (actions without an answer), data-latency (ms, last).

const TYPED = "textarea, input:not([type=range], [type=checkbox], [type=radio])";
const SLOW = 600; // ms without an answer until the panel says that it waits

function render({ model, el }) {
  const cleanup = new AbortController();
  const view = Math.random().toString(36).slice(2); // several views share a model, and hear each other's answers
  const waiting = new Map();
  const moving = new Map(); // sliders and search fields: the newest value, sent when the last one is answered
  const walked = new WeakMap(); // where the keyboard was in each data-walk
  let number = 0;
  let root;
  let revealed; // the newest [data-reveal], which is scrolled to once

  function show(html) {
    const fresh = parse(html).firstElementChild;
    fresh.classList.add("live");
    fresh.dataset.lmSuppressShortcuts = "true"; // keys that a panel handles are not JupyterLab's shortcuts
    redraw(() => {
      if (root) update(root, fresh);
      else el.replaceChildren((root = fresh));
      tell();
      return [root];
    });
  }

  function patch(regions) {
    redraw(() => {
      const changed = [];
      for (const [name, html] of Object.entries(regions)) {
        const region = root.querySelector(`:scope > [data-region="${CSS.escape(name)}"]`);
        if (!region) continue;
        morph(region, parse(html));
        changed.push(region);
      }
      return changed;
    });
  }

  function redraw(change) {
    const kept = remember();
    for (const place of change()) settle(place);
    restore(kept);
    reveal();
  }

  // What a redraw must not take away where an element gave way to another: focus, typed text, scrolled places.
  function remember() {
    if (!root) return null;
    const active = root.contains(document.activeElement) ? document.activeElement : null;
    const kept = { active, scrolled: [], open: [], typed: [] };
    if (active) {
      kept.region = active.closest("[data-region]");
      kept.focus = find(active);
      kept.selection = active.matches(TYPED) ? [active.selectionStart, active.selectionEnd] : null;
    }
    for (const field of root.querySelectorAll("[data-draft]")) kept.typed.push([field.dataset.draft, field.value]);
    for (const place of root.querySelectorAll("[data-scroll]")) {
      const end = place.scrollHeight - place.scrollTop - place.clientHeight < 24;
      kept.scrolled.push([place.dataset.scroll, place.scrollTop, place.scrollLeft, end && "follow" in place.dataset]);
    }
    for (const fold of root.querySelectorAll("details[data-keep]")) kept.open.push([fold.dataset.keep, fold.open]);
    return kept;
  }

  function restore(kept) {
    if (!kept) return;
    const each = (name, value, what) => root.querySelectorAll(`[${name}="${CSS.escape(value)}"]`).forEach(what);
    for (const [name, text] of kept.typed) each("data-draft", name, (field) => field.value !== text && (field.value = text));
    for (const [name, open] of kept.open) each("data-keep", name, (fold) => (fold.open = open));
    for (const [name, top, left, end] of kept.scrolled) {
      each("data-scroll", name, (place) => place.scrollTo(left, end ? place.scrollHeight : top));
    }
    const { active, region } = kept;
    if (!active || (root.contains(active) && document.activeElement === active && !active.matches(":disabled"))) return;
    const again = kept.focus && (root.contains(region) ? region : root).querySelector(kept.focus);
    if (again && !again.matches(":disabled")) {
      again.focus({ preventScroll: true });
      // A number field has no selection, and says so with an exception.
      if (kept.selection && kept.selection[0] !== null) again.setSelectionRange(...kept.selection);
    } else {
      const place = root.contains(region) ? region : root;
      place.tabIndex = -1; // so that Tab goes on from here
      place.focus({ preventScroll: true });
    }
  }

  function reveal() {
    for (const goal of root.querySelectorAll("[data-scroll] [data-reveal]")) {
      if (goal.dataset.reveal === revealed) continue;
      revealed = goal.dataset.reveal;
      const place = goal.closest("[data-scroll]");
      const [here, room] = [goal.getBoundingClientRect(), place.getBoundingClientRect()];
      if (here.top < room.top || here.bottom > room.bottom) place.scrollTop += here.top - room.top - room.height / 3;
    }
  }

  // Controls in a place that was drawn again show what Python says, but not while someone types or drags.
  function settle(place) {
    for (const control of place.querySelectorAll("[data-act]")) {
      const busy = control === document.activeElement && control.matches(TYPED);
      if (control.type === "checkbox") control.checked = control.defaultChecked;
      else if (control.type === "range" && moving.has(find(control))) moving.get(find(control)).drawn = control;
      else if (control.type === "range") control.value = control.defaultValue;
      else if (control.matches("input[type=number]") && !busy) control.value = control.defaultValue;
      else if (control.matches("select")) for (const option of control.options) if (option.defaultSelected) option.selected = true;
    }
    // A tree or a row of buttons is one stop of the Tab key; arrow keys walk in it.
    for (const walkable of place.querySelectorAll("[data-walk]")) {
      const all = stops(walkable);
      const here = all.find((stop) => stop === walked.get(walkable)) ?? all.find((stop) => stop.matches("[aria-selected=true], [aria-current]")) ?? all[0];
      for (const stop of all) stop.tabIndex = stop === here ? 0 : -1;
    }
  }

  function find(element) {
    const { act, key, draft } = element.dataset;
    if (draft !== undefined) return `[data-draft="${CSS.escape(draft)}"]`;
    if (act === undefined) return null;
    return `[data-act="${CSS.escape(act)}"]` + (key === undefined ? ":not([data-key])" : `[data-key="${CSS.escape(key)}"]`);
  }

  function send(act, key, value) {
    const name = `${view}.${++number}`;
    waiting.set(name, performance.now());
    setTimeout(tell, SLOW);
    model.send({ act, key: key ?? "", value, number: name });
    tell();
    return name;
  }

  function sendNewest(control, value) {
    const { act, key } = control.dataset;
    const name = find(control);
    const known = moving.get(name);
    if (known) Object.assign(known, { act, key, value, again: true });
    else moving.set(name, { number: send(act, key, value) });
  }

  function answered(done) {
    const since = waiting.get(done);
    if (since === undefined) return;
    waiting.delete(done);
    root.dataset.latency = (performance.now() - since).toFixed(1);
    for (const [name, last] of moving) {
      if (last.number !== done) continue;
      moving.delete(name);
      if (last.again) moving.set(name, { number: send(last.act, last.key, last.value) });
      else if (last.drawn) last.drawn.value = last.drawn.defaultValue;
    }
    tell();
  }

  function tell() {
    if (!root) return;
    root.dataset.waiting = waiting.size;
    const [oldest] = waiting.values();
    root.toggleAttribute("data-slow", oldest !== undefined && performance.now() - oldest >= SLOW - 20);
  }

  function copy(text, button) {
    const label = button.textContent;
    const said = (what) => {
      button.textContent = what;
      setTimeout(() => (button.textContent = label), 1200);
    };
    const byHand = () => {
      const field = document.createElement("textarea");
      field.value = text;
      button.after(field);
      field.select();
      const done = document.execCommand("copy");
      field.remove();
      button.focus();
      said(done ? "copied" : "can't copy here");
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => said("copied"), byHand);
    else byHand();
  }

  // Arrow keys walk over the controls of a [data-walk] element, Home and End go to its ends; → and ← unfold and fold, or
  // go to the first child and to the parent.
  function walk(event) {
    const place = event.target.closest("[data-walk]");
    if (!place || event.target.matches(VALUED)) return;
    const all = stops(place);
    const here = all.indexOf(event.target);
    if (here < 0) return;
    const flat = place.dataset.walk !== "column";
    const level = (stop) => Number(stop?.getAttribute("aria-level") ?? NaN);
    const open = event.target.getAttribute("aria-expanded");
    let goal = { [flat ? "ArrowRight" : "ArrowDown"]: here + 1, [flat ? "ArrowLeft" : "ArrowUp"]: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (place.dataset.walk === "grid" && ["ArrowDown", "ArrowUp"].includes(event.key)) goal = all.indexOf(beside(event.target, event.key === "ArrowDown" ? "nextElementSibling" : "previousElementSibling"));
    if (!flat && event.key === "ArrowRight" && open === "true" && level(all[here + 1]) > level(all[here])) goal = here + 1;
    if (!flat && event.key === "ArrowLeft" && open !== "true") goal = all.findLastIndex((stop, n) => n < here && level(stop) < level(all[here]));
    if (goal !== undefined) {
      event.preventDefault();
      all[Math.max(0, Math.min(goal === -1 && event.key === "ArrowLeft" && !flat ? here : goal, all.length - 1))].focus();
    } else if (!flat && open === { ArrowRight: "false", ArrowLeft: "true" }[event.key]) {
      event.preventDefault();
      event.target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    }
  }

  const listening = { signal: cleanup.signal };
  const on = (type, what) => el.addEventListener(type, what, listening);
  on("click", (event) => {
    const copied = event.target.closest("[data-copy]");
    if (copied) return copy(copied.dataset.copy, copied);
    const control = event.target.closest("[data-act]");
    if (control && !control.matches(`${VALUED}, form, :disabled`)) send(control.dataset.act, control.dataset.key, null);
  });
  on("input", (event) => {
    if (event.target.matches("[data-act][type=range], [data-act][type=search]")) sendNewest(event.target, valueOf(event.target));
  });
  on("change", (event) => {
    const control = event.target;
    if (control.matches("[data-act]") && !control.matches("[type=range], [type=search]")) send(control.dataset.act, control.dataset.key, valueOf(control));
  });
  on("submit", (event) => {
    event.preventDefault();
    const form = event.target.closest("form[data-act]");
    if (!form) return;
    const fields = Object.fromEntries([...form.elements].filter((e) => e.name).map((e) => [e.name, valueOf(e)]));
    for (const field of form.querySelectorAll("[data-clears]")) field.value = "";
    send(form.dataset.act, form.dataset.key, fields);
  });
  on("focusin", (event) => {
    const place = event.target.closest("[data-walk]");
    if (!place) return;
    walked.set(place, event.target);
    for (const stop of stops(place)) stop.tabIndex = stop === event.target ? 0 : -1;
  });
  on("keydown", (event) => {
    event.stopPropagation();
    if (event.target.matches("textarea[data-enter]") && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      event.target.form.requestSubmit();
    } else if (event.target.matches("[data-act]:not(button, input, select, textarea, a, summary)") && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      event.target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    } else walk(event);
  });

  const receive = (message) => {
    if (message.whole !== undefined) show(message.whole);
    if (message.regions !== undefined && root) patch(message.regions);
    if (message.done !== undefined && root) answered(message.done);
  };
  model.on("msg:custom", receive);
  show(model.get("html"));
  model.send({ open: view });
  return () => {
    cleanup.abort();
    model.off("msg:custom", receive);
    model.send({ closed: view });
  };
}

function stops(place) {
  return [...place.querySelectorAll("[data-act]:not(:disabled), summary")].filter((e) => !e.matches(VALUED) && (e.ownerSVGElement || e.checkVisibility()));
}

// The control below or above in a table's column, or the cell itself where there is none.
function beside(cell, sibling) {
  for (let row = cell.parentElement[sibling]; row; row = row[sibling]) {
    const there = row.cells[cell.cellIndex];
    if (there?.matches("[data-act]")) return there;
  }
  return cell;
}

function valueOf(control) {
  if (control.type === "checkbox") return control.checked;
  if (control.type === "range" || control.type === "number") return Number(control.value);
  return control.value;
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return template.content;
}

export default { render };
