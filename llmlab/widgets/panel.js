// Shows a panel that Python drew, and sends back what is done to its controls. There is no logic of any panel here.
//
// Every element with data-act sends {act, key, value}: buttons and rows on a click, what has a value when that changes,
// forms when they are submitted. Python answers with the HTML of the regions that changed, then with {done: number}.
// Attributes of the root tell tests what is going on: data-waiting (actions without an answer), data-latency (ms, last).

const VALUED = "input, select, textarea";

function render({ model, el }) {
  const cleanup = new AbortController();
  const waiting = new Map();
  const moving = new Map(); // sliders and search fields: the newest value, sent when the last one is answered
  let number = 0;
  let root;

  function show(html) {
    const kept = remember();
    el.innerHTML = html;
    root = el.firstElementChild;
    root.classList.add("live");
    restore(kept);
    tell();
  }

  function patch(regions) {
    const kept = remember();
    for (const [name, html] of Object.entries(regions)) {
      const region = root.querySelector(`:scope > [data-region="${CSS.escape(name)}"]`);
      if (region) region.innerHTML = html;
    }
    restore(kept);
  }

  // What a redraw must not take away: the focus, text being typed, scrolled places, unfolded details.
  function remember() {
    if (!root) return null;
    const active = root.contains(document.activeElement) ? document.activeElement : null;
    const kept = { scrolled: [], open: [], typed: [] };
    if (active) {
      kept.focus = find(active);
      kept.selection = "selectionStart" in active ? [active.selectionStart, active.selectionEnd] : null;
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
    for (const [name, text] of kept.typed) each(`[data-draft="${CSS.escape(name)}"]`, (field) => (field.value = text));
    for (const [name, open] of kept.open) each(`details[data-keep="${CSS.escape(name)}"]`, (fold) => (fold.open = open));
    for (const [name, top, left, end] of kept.scrolled) {
      each(`[data-scroll="${CSS.escape(name)}"]`, (place) => place.scrollTo(left, end ? place.scrollHeight : top));
    }
    if (kept.focus && !root.contains(document.activeElement)) {
      const again = root.querySelector(kept.focus);
      if (!again) return;
      again.focus({ preventScroll: true });
      // A number or range field has no selection, and says so with an exception.
      if (kept.selection && kept.selection[0] !== null) again.setSelectionRange(...kept.selection);
    }
  }

  function each(selector, what) {
    for (const found of root.querySelectorAll(selector)) what(found);
  }

  function find(element) {
    const { act, key, draft } = element.dataset;
    if (draft !== undefined) return `[data-draft="${CSS.escape(draft)}"]`;
    if (act === undefined) return null;
    return `[data-act="${CSS.escape(act)}"]` + (key === undefined ? ":not([data-key])" : `[data-key="${CSS.escape(key)}"]`);
  }

  function send(act, key, value) {
    waiting.set(++number, performance.now());
    model.send({ act, key: key ?? "", value, number });
    tell();
  }

  function sendNewest(control, value) {
    const name = find(control);
    const known = moving.get(name);
    if (known && waiting.has(known.number)) {
      moving.set(name, { ...known, act: control.dataset.act, key: control.dataset.key, value, again: true });
    } else {
      send(control.dataset.act, control.dataset.key, value);
      moving.set(name, { number });
    }
  }

  function answered(done) {
    const since = waiting.get(done);
    if (since === undefined) return;
    waiting.delete(done);
    root.dataset.latency = (performance.now() - since).toFixed(1);
    for (const [name, last] of moving) {
      if (last.number !== done) continue;
      moving.delete(name);
      if (last.again) {
        send(last.act, last.key, last.value);
        moving.set(name, { number });
      }
    }
    tell();
  }

  function tell() {
    if (root) root.dataset.waiting = waiting.size;
  }

  function valueOf(control) {
    if (control.type === "checkbox") return control.checked;
    if (control.type === "range" || control.type === "number") return Number(control.value);
    return control.value;
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

  // Arrow keys walk over the controls of a [data-walk] element, Home and End go to its ends; → and ← unfold and fold.
  function walk(event) {
    const place = event.target.closest("[data-walk]");
    if (!place || event.target.matches(VALUED)) return;
    const stops = [...place.querySelectorAll("[data-act]:not(:disabled), summary")].filter((e) => e.offsetParent || e.ownerSVGElement);
    const here = stops.indexOf(event.target);
    const flat = place.dataset.walk === "row";
    const ahead = flat ? "ArrowRight" : "ArrowDown";
    const back = flat ? "ArrowLeft" : "ArrowUp";
    const goal = { [ahead]: here + 1, [back]: here - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (here >= 0 && goal !== undefined) {
      event.preventDefault();
      stops[Math.max(0, Math.min(goal, stops.length - 1))].focus();
    } else if (!flat && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
      const open = event.target.getAttribute("aria-expanded");
      if (open === (event.key === "ArrowRight" ? "false" : "true")) {
        event.preventDefault();
        event.target.click();
      }
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
    for (const field of form.querySelectorAll("[data-draft]")) if ("clears" in field.dataset) field.value = "";
    send(form.dataset.act, form.dataset.key, fields);
  });
  on("keydown", (event) => {
    // Keys that a panel handles are not JupyterLab's shortcuts.
    event.stopPropagation();
    if (event.target.matches("textarea[data-enter]") && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      event.target.form.requestSubmit();
    } else if (event.target.matches("[data-act]:not(button, input, select, textarea, a)") && (event.key === "Enter" || event.key === " ")) {
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
  model.send({ open: true });
  return () => {
    cleanup.abort();
    model.off("msg:custom", receive);
  };
}

export default { render };
