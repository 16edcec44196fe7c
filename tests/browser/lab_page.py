"""What tests do in a page: open a notebook, run it, find a panel in it, use it, take its picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from browser.lab_server import LOCAL, LabServer

SECOND = 1000

_RUN = """async () => {
  const notebook = jupyterapp.shell.currentWidget;
  await notebook.sessionContext.ready;
  // What is asked for before the kernel's socket is up is dropped without a word.
  await notebook.sessionContext.session.kernel.info;
  await jupyterapp.commands.execute("notebook:run-all-cells");
  return [...notebook.content.model.cells].filter((cell) => cell.type === "code").flatMap((cell) =>
    cell.toJSON().outputs.filter((output) => output.output_type === "error").map((output) => `${output.ename}: ${output.evalue}`));
}"""

_PYTHON = """async (code) => {
  const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const future = kernel.requestExecute({ code });
  let said = "";
  future.onIOPub = ({ header, content }) => {
    if (header.msg_type === "stream") said += content.text;
    if (header.msg_type === "error") said += `${content.ename}: ${content.evalue}`;
  };
  await future.done;
  return said;
}"""


class LabPage:
    """A browser's page with a notebook in JupyterLab. It collects what must not happen: see `complaints`."""

    def __init__(self, page: Page, server: LabServer, pictures: Path) -> None:
        self.page, self.server, self.pictures = page, server, pictures
        self.errors: list[str] = []
        self.outside: set[str] = set()
        self.expected: list[str] = []
        """Patterns of browser errors that a test brings about on purpose."""
        ours = (server.url, f"ws://{LOCAL}:{server.port}", "data:", "blob:", "file:", "about:")
        page.on("request", lambda r: None if r.url.startswith(ours) else self.outside.add(r.url))
        page.on("console", lambda m: self.errors.append(m.text[:500]) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)[:500]))

    def open(self, name: str) -> None:
        """Open the notebook `name`, with the kernel that it has or a new one."""
        self.page.goto(
            f"{self.server.url}/lab/tree/{name}?token={self.server.token}&reset", wait_until="domcontentloaded"
        )
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90 * SECOND)

    def start_all(self) -> None:
        """Run all cells and don't wait for them."""
        self.page.evaluate(f"() => {{ window.running = ({_RUN})(); }}")

    def finish(self) -> None:
        """Wait until the cells that `start_all` started are done; a cell's error is an AssertionError."""
        errors = self.page.evaluate("() => window.running")
        assert not errors, errors

    def run_all(self) -> None:
        self.start_all()
        self.finish()

    def add_cell(self, code: str) -> None:
        """Run `code` in a new cell at the notebook's end, and don't wait for it."""
        self.page.evaluate(
            """async (source) => {
              const notebook = jupyterapp.shell.currentWidget.content;
              notebook.model.sharedModel.addCell({ cell_type: "code", source });
              notebook.activeCellIndex = notebook.widgets.length - 1;
              await jupyterapp.commands.execute("notebook:run-cell");
            }""",
            code,
        )

    def python(self, code: str) -> str:
        """What `code` prints in the notebook's kernel, run beside its cells."""
        return self.page.evaluate(_PYTHON, code)

    def panel(self, name: str, place: int = 0) -> PanelView:
        """The panel `name` (the first of several) once it is live."""
        root = self.page.locator(f"section.llmlab.{name}.live").nth(place)
        root.wait_for(timeout=30 * SECOND)
        return PanelView(self, root)

    def theme(self, name: str) -> None:
        """light or dark."""
        full = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}[name]
        self.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', { theme })", full)
        self.page.wait_for_selector(f"body[data-jp-theme-light='{str(name == 'light').lower()}']", state="attached")

    def width(self, pixels: int) -> None:
        """Make the window so wide that the notebook's outputs have about `pixels`."""
        self.page.set_viewport_size({"width": pixels + 200, "height": 1400})
        self.page.evaluate("() => { if (!jupyterapp.shell.leftCollapsed) jupyterapp.shell.collapseLeft(); }")

    def complaints(self) -> list[str]:
        """Errors of the browser and requests to outside hosts since the last call."""
        unexpected = [e for e in self.errors if not any(re.search(pattern, e) for pattern in self.expected)]
        found = [f"browser: {e}" for e in unexpected] + [f"asked outside: {url}" for url in sorted(self.outside)]
        self.errors.clear()
        self.outside.clear()
        self.expected.clear()
        return found


class PanelView:
    """One panel in the page."""

    def __init__(self, page: LabPage, root: Locator) -> None:
        self.lab, self.root = page, root

    def __getattr__(self, name: str) -> Any:
        """Playwright's ways to find something inside: get_by_role, locator, …"""
        return getattr(self.root, name)

    def settled(self, seconds: float = 20) -> PanelView:
        """Wait until Python has answered every action."""
        expect(self.root).to_have_attribute("data-waiting", "0", timeout=seconds * SECOND)
        return self

    def press(self, name: str | re.Pattern[str], role: str = "button", *, exact: bool = False) -> PanelView:
        """Click the control with this accessible name, and wait for the answer."""
        self.root.get_by_role(role, name=name, exact=exact).first.click()  # type: ignore[arg-type]
        return self.settled()

    @property
    def latency(self) -> float:
        """Milliseconds that the last answer took."""
        return float(self.root.get_attribute("data-latency") or "nan")

    def picture(self, name: str) -> Path:
        """Save what the panel looks like."""
        path = self.lab.pictures / f"{name}.png"
        window = self.lab.page.viewport_size
        assert window is not None
        needed = int(self.root.evaluate("(e) => e.offsetHeight")) + 200  # with the notebook's bars
        self.lab.page.set_viewport_size({"width": window["width"], "height": max(1400, needed)})
        self.root.scroll_into_view_if_needed()
        self.root.screenshot(path=path)
        return path

    def pictures(self, name: str) -> None:
        """Save what the panel looks like wide and narrow, light and dark; and it is as wide as its place, not wider."""
        for theme in ("dark", "light"):
            self.lab.theme(theme)
            for width in (600, 1200):
                self.lab.width(width)
                self.lab.page.wait_for_timeout(150)
                self.picture(f"{name}-{theme}-{width}")
                wider = self.root.evaluate("(e) => e.scrollWidth - e.clientWidth")
                assert wider <= 1, f"{name} is {wider} px wider than its place of {width} px"

    def nameless(self) -> list[str]:
        """Controls that a screen reader couldn't name."""
        return self.root.evaluate(_NAMELESS)


# An accessible name in the forms that panels use (the browser's own computation is behind a debugging protocol).
_NAMELESS = """(root) => {
  const controls = "button, input, select, textarea, summary, [data-act], [tabindex], [role=treeitem], [role=img], svg:not([aria-hidden])";
  const text = (e) => (e?.textContent ?? "").trim();
  const named = (e) => e.getAttribute("aria-label")?.trim() || e.getAttribute("title")?.trim()
    || (e.getAttribute("aria-labelledby") ?? "").split(" ").some((id) => id && text(document.getElementById(id)))
    || (e.labels && [...e.labels].some(text)) || (!e.matches("input, select, textarea, svg, [role=img]") && text(e))
    || (e.matches("svg, [role=img]") && text(e.querySelector("title")));
  return [...root.querySelectorAll(controls)]
    .filter((e) => !e.matches("form, [data-region]") && !e.closest("[aria-hidden=true]") && e.checkVisibility() && !named(e))
    .map((e) => e.outerHTML.slice(0, 160));
}"""
