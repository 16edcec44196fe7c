"""One JupyterLab of its own: no configuration of this machine, no stranger's extension, no outside host."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat

LOCAL = "127.0.0.1"


class LabServer:
    """JupyterLab over an empty folder, on a free port. folder: its notebooks; url: where it is; token: its password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "notebooks"
        self.folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind((LOCAL, 0))
            self.port = free.getsockname()[1]
        self.token, self.url = secrets.token_hex(8), f"http://{LOCAL}:{self.port}"
        own = {
            name: str(folder / name.lower())
            for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        }
        jupyter = [sys.executable, "-m", "jupyter"]
        env = os.environ | own | {"OMP_NUM_THREADS": "1"}
        # Lab reads this at its start, as `jupyter labextension disable` would write it: no news from outside.
        config = folder / "jupyter_config_dir" / "labconfig"
        config.mkdir(parents=True)
        (config / "page_config.json").write_text(
            '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}'
        )
        options = [
            "--no-browser",
            "--allow-root",
            f"--ServerApp.ip={LOCAL}",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.folder}",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        ]
        self.log = folder / "jupyter.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*jupyter, "lab", *options], env=env, stdout=log, stderr=log)

    def wait(self, seconds: float = 90) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=1)
                return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-2000:]}")

    def write(self, name: str, *cells: str) -> str:
        """A notebook of code cells; its name, to be opened."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / name)
        return name

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
