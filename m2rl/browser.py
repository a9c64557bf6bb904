"""A headless Chromium at the end of a pipe: pages as pictures, and what a page logged, fetched and measured.

    with Browser() as browser:
        page = browser.open("report.html", width=390, dark=True)
        page.png("phone.png");  page.messages;  page.requests;  page.evaluate("document.title")

Chromium speaks its DevTools protocol over file descriptors 3 and 4 (--remote-debugging-pipe): one JSON object per
message, a zero byte after each. No driver, no port, no package.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2rl.types import InputError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds for one answer


def find() -> str | None:
    """The first Chromium on PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One Chromium process with a profile of its own, removed afterwards."""

    def __init__(self) -> None:
        path = find()
        if path is None:
            raise InputError(f"pictures need Chromium on PATH (one of {', '.join(NAMES)}), and none is there")
        self.profile = tempfile.mkdtemp(prefix="m2rl-chromium-")
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        # The child's ends become 3 and 4 whatever numbers they have here.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += [
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", command, path, *flags, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.count, self.rest, self.pages = 0, b"", dict[str, "Page"]()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        os.close(self.to)
        os.close(self.back)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, params: Mapping[str, Any] | None = None, session: str = "") -> dict[str, Any]:
        """One command and its result; events that arrive meanwhile go to their page."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": dict(params or {})}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            found = self.receive()
            if found.get("id") == message["id"]:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']['message']}")
                return found["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], PATIENCE)[0]:
                raise OSError(f"Chromium said nothing for {PATIENCE:g} s")
            part = os.read(self.back, 1 << 20)
            if not part:
                raise OSError(f"Chromium ended with status {self.process.poll()}")
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(line)
        page = self.pages.get(found.get("sessionId", ""))
        if page is not None and "method" in found:
            page.event(found["method"], found["params"])
        return found

    def open(self, path: str | Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Load a file at a width in CSS pixels and wait until it has loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        page.call("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", {"features": [scheme]})
        page.call("Page.navigate", {"url": Path(path).resolve().as_uri()})
        ends = time.monotonic() + PATIENCE
        while not page.loaded and time.monotonic() < ends:
            self.receive()
        return page


class Page:
    """One open page."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session, self.loaded = browser, session, False
        self.messages: list[str] = []  # console output, exceptions, the browser's complaints
        self.requests: list[str] = []  # addresses asked for, the page's own file included

    def call(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self.browser.call(method, params, self.session)

    def event(self, method: str, params: Mapping[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", expression))
        return found["result"].get("value")

    def png(self, path: str | Path, *, of: str = "", scale: float = 1) -> Path:
        """The whole page as a picture, or one element of it (`of`: a CSS selector)."""
        if of:
            box = self.evaluate(
                f"(r => [r.x, r.y, r.width, r.height])(document.querySelector({of!r}).getBoundingClientRect())"
            )
        else:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            box = [0, 0, size["width"], size["height"]]
        clip = {**dict(zip(("x", "y", "width", "height"), box)), "scale": scale}
        shot = self.call("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path = Path(path)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def close(self) -> None:
        self.call("Page.close")
        del self.browser.pages[self.session]
