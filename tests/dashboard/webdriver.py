"""A headless Chromium over the WebDriver protocol: the few commands these tests need, on the standard library."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {
    "down": "\ue015",
    "up": "\ue013",
    "left": "\ue012",
    "right": "\ue014",
    "enter": "\ue007",
    "home": "\ue011",
    "end": "\ue010",
}


def available() -> bool:
    """Whether this machine has the browser and its driver."""
    return shutil.which("chromedriver") is not None and browser_path() is not None


def browser_path() -> str | None:
    """Where the browser is."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Browser:
    """A browser with one window."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 800), dark: bool = False) -> None:
        self._log = (profile.parent / f"{profile.name}-driver.log").open("w+")
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._base = f"http://127.0.0.1:{self._port()}"
            flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
            if dark:
                flags.append("--blink-settings=preferredColorScheme=0")
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": {"binary": browser_path(), "args": flags},
                "goog:loggingPrefs": {"browser": "ALL"},
            }
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._base += f"/session/{session['sessionId']}"
            self._resize(size)
        except BaseException:
            self._stop()
            raise

    def _resize(self, size: tuple[int, int]) -> None:
        """Gives the page this size: the window's own also counts its frame."""
        inner = self.run("return [innerWidth, innerHeight]")
        outer = {"width": 2 * size[0] - inner[0], "height": 2 * size[1] - inner[1]}
        self._call("POST", "/window/rect", outer)

    def _port(self) -> int:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            self._log.seek(0)
            for line in self._log.read().splitlines():
                if "started successfully on port" in line:
                    return int(line.rstrip(".").rsplit(" ", 1)[1])
            time.sleep(0.05)
        raise TimeoutError("chromedriver did not start within 30 s")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, address: str) -> None:
        """Goes to an address."""
        self._call("POST", "/url", {"url": address})

    def address(self) -> str:
        """Where the window is."""
        return self._call("GET", "/url")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body in JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 30, what: str = "") -> Any:
        """What the script returns once that is true; fails after a bounded time."""
        deadline = time.monotonic() + seconds
        while True:
            if value := self.run(script, *arguments):
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s: {what or script}")
            time.sleep(0.1)

    def click(self, selector: str) -> None:
        """Clicks as a user does: the element must be visible and not covered."""
        element = self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._call("POST", f"/element/{element}/click")

    def hover(self, selector: str) -> None:
        """Moves the pointer over the middle of an element."""
        element = self._call("POST", "/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "origin": element, "x": 0, "y": 0}
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def type(self, keys: str) -> None:
        """Types into what has the focus; names in `KEYS` are keys."""
        actions = [
            {"type": kind, "value": key}
            for key in ([KEYS[keys]] if keys in KEYS else keys)
            for kind in ("keyDown", "keyUp")
        ]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def console(self) -> list[dict[str, Any]]:
        """What the console said since the last call."""
        return self._call("POST", "/se/log", {"type": "browser"})

    def screenshot(self, path: Path) -> None:
        """Keeps a picture of the window."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        try:
            self._driver.wait(10)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait(10)
        self._log.close()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__: list[str] = ["Browser", "available"]
