"""A page in headless Chromium, driven over its debugging pipe: what tests of web pages need and nothing else.

Needs the program alone, no package: messages of the DevTools protocol, JSON with a zero byte after each, go through
two pipes, the descriptors 3 and 4 of the browser.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WHY_NOT = "needs Chromium" if PROGRAM is None else ""
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--remote-debugging-pipe", "about:blank"),
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowLeft": (37, ""), "ArrowUp": (38, "")}
KEYS |= {"ArrowRight": (39, ""), "ArrowDown": (40, ""), "Home": (36, ""), "End": (35, "")}


class RefusedError(AssertionError):
    """The browser answered a message with an error."""


class Browser:
    """The process; `page` opens a tab in it."""

    def __init__(self, profile: str):
        assert PROGRAM is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # The shell gives the pipes the numbers that the browser expects.
        plumbed = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", plumbed, "bash", PROGRAM, f"--user-data-dir={profile}", *FLAGS],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._buffer, self._sent = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        with contextlib.suppress(OSError, TimeoutError, AssertionError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a message; events that come before it are kept in `events`."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        message |= {} if session is None else {"sessionId": session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._next(60)
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RefusedError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def listen(self, seconds: float) -> None:
        """Gather the events of so long."""
        end = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while (left := end - time.monotonic()) > 0:
                self.events.append(self._next(left))

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, *_ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            more = os.read(self._in, 1 << 20)
            if not more:
                raise OSError("the browser ended")
            self._buffer += more
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)

    def page(self, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **metrics)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression, as JSON has it. Raises AssertionError for what it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """The value of an expression once it is true. A page that is left meanwhile is asked again."""
        end = time.monotonic() + seconds
        while not (value := self._run_or_none(script)):
            assert time.monotonic() < end, f"not so after {seconds} s: {script}"
            time.sleep(0.02)
        return value

    def _run_or_none(self, script: str) -> Any:
        try:
            return self.run(script)
        except RefusedError as error:
            if "navigated or closed" not in str(error) and "context was destroyed" not in str(error):
                raise
            return None

    def press(self, *keys: str) -> None:
        for key in keys:
            code, text = KEYS.get(key, (ord(key.upper()[0]), key))
            name = key if key in KEYS else {"/": "Slash"}.get(key, f"Key{key.upper()}")
            whole = {"key": key, "code": name, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type="keyDown", **whole, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **whole)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # so that what happened before has arrived
        mine = (event for event in self.browser.events if event.get("sessionId") == self.session)
        return [event["params"] for event in mine if event.get("method") == method]

    def problems(self) -> list[Any]:
        """What was thrown and not caught, and what the console was told of as an error or a warning."""
        logged = [event["entry"] for event in self._events("Log.entryAdded")]
        told = self._events("Runtime.consoleAPICalled")
        return [
            *self._events("Runtime.exceptionThrown"),
            *(entry for entry in logged if entry["level"] in ("error", "warning")),
            *(event for event in told if event["type"] in ("error", "warning", "assert")),
        ]

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as profile:
        running = Browser(profile)
        try:
            yield running
        finally:
            running.close()
