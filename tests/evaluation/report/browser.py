"""A page in headless Chromium: what a script found in it, and every complaint on its console."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH to look at the page with")

# A page that changed while a script clicked through it: errors are collected, results are written where --dump-dom sees them.
_PROBE = """
<script>
window.found = {errors: []};
window.addEventListener("error", (event) => found.errors.push(event.message));
</script>
"""
_SCRIPT = """
<script>
try { (() => { %s })(); } catch (error) { found.errors.push(String(error)); }
found.width = innerWidth;
parent.postMessage(JSON.stringify(found), "*");
</script>
</body>
"""
# Chromium's own window is never narrower than 500 pixels; a frame is as narrow as a phone.
_FRAME = """<!doctype html><body><pre id="found"></pre>
<script>addEventListener("message", (event) => { document.getElementById("found").textContent = event.data; });</script>
<iframe src="page.html" style="width: %dpx; height: %dpx; border: 0"></iframe></body>
"""


def browse(page: Path, script: str, width: int = 1200, height: int = 1600, dark: bool = False) -> dict:
    """Opens a page, runs a script in it that fills `found`, and returns `found` with `errors` and `console`."""
    text = page.read_text(encoding="utf-8").replace("<main>", _PROBE + "<main>", 1)
    head, _, _ = text.rpartition("</body>")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "page.html"
        copy.write_text(head + _SCRIPT % script + "</html>", encoding="utf-8")
        frame = Path(scratch) / "frame.html"
        frame.write_text(_FRAME % (width, height), encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += [
            f"--user-data-dir={scratch}/profile",
            f"--window-size={width + 50},{height}",
            "--enable-logging=stderr",
        ]
        command += ["--virtual-time-budget=3000", "--dump-dom", frame.as_uri()]
        if dark:
            command.insert(1, "--blink-settings=preferredColorScheme=0")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the page did not come to its end: {done.stderr[-2000:]}"
    found = json.loads(html.unescape(match.group(1)))
    found["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found
