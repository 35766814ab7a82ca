"""Headless Chromium through the few W3C WebDriver commands that a page test needs."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Browser:
    """One browser window with a profile of its own, in `folder`."""

    def __init__(self, folder: Path):
        port = free_port()
        self.driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.root = f"http://127.0.0.1:{port}"
        self.until(self._driver_answers, "the driver to start")
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={folder / 'profile'}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self.root += f"/session/{session['sessionId']}"

    def close(self) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait()

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def script(self, code: str, *arguments: Any) -> Any:
        """Run the body of a JavaScript function."""
        return self._call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def cdp(self, command: str, **params: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the page and the colour scheme that the system prefers."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page, however long, once all is loaded and nothing moves; PNG or WebP, as `path` ends."""
        self.script("document.activeElement.blur(); for (const image of document.images) image.loading = 'eager'")
        self.until("[...document.images].every(image => image.complete)", "the pictures")
        self.until("document.getAnimations().every(one => one.playState != 'running')", "the page to rest")
        kind = {".png": {"format": "png"}, ".webp": {"format": "webp", "quality": 88}}[path.suffix]
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, **kind)
        path.write_bytes(base64.b64decode(shot["data"]))

    def keys(self, selector: str, text: str) -> None:
        """Type into an element, key by key; \\ue007 is Enter."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._call("POST", f"/element/{element}/value", {"text": text})

    def click(self, selector: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._call("POST", f"/element/{element}/click", {})

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """An event at a place of the window: "mouseMoved", "mousePressed", "mouseReleased" or "mouseWheel"."""
        self.cdp("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, **more)

    def log(self, kind: str) -> list[dict]:
        """Entries since the last call: "browser" (console) or "performance" (network)."""
        return self._call("POST", "/se/log", {"type": kind})

    def requests(self) -> set[str]:
        """Addresses that the pages asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return {params["request"]["url"] for params in sent}

    def until(self, condition, what: str, seconds: float = 60) -> Any:
        """Wait until `condition()` is true (or a script's value is) and return it."""
        end = time.monotonic() + seconds
        while not (value := self.script(f"return {condition}") if isinstance(condition, str) else condition()):
            if time.monotonic() > end:
                toasts = self.script("return [...document.querySelectorAll('.toast-body')].map(one => one.innerText)")
                raise AssertionError(f"waited {seconds} s in vain for {what}; notices on the page: {toasts}")
            time.sleep(0.1)
        return value

    def _driver_answers(self) -> bool:
        try:
            return self._call("GET", "/status", None)["ready"]
        except URLError:
            return False

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error
