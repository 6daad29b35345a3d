"""A headless Chromium, driven over its debugging pipe: no package and no port is needed."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: A page that has not answered by then hangs.
TIMEOUT = 20.0
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb"),
)
_KEYS = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_KEYS |= {"ArrowDown": 40, "Tab": 9, "/": 191}

# Chromium knows the pipe by the numbers 3 and 4, which one of its ends may have already.
_LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str | None:
    """Returns the path of a Chromium: that of the variable CHROMIUM, or one on PATH; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """A tab: its errors and requests are listed while it is driven as a person would drive it."""

    def __init__(self, pipe: _Pipe, session: str) -> None:
        self._pipe, self._session = pipe, session
        #: Console errors, exceptions and refusals of the page's policy.
        self.errors: list[str] = []
        #: Addresses that the page has asked for, other than its file and data within it.
        self.requests: list[str] = []
        self.address = ""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol in this tab."""
        return self._pipe.call(method, parameters, self._session, self._event)

    def open(self, address: str) -> None:
        """Opens an address and waits until the page is ready."""
        self.address = address
        self.call("Page.navigate", url=address)
        self.wait("document.documentElement?.dataset.ready")

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression of JavaScript, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(f"Boolean({expression})"):
            assert self.errors == [], expression
            assert time.monotonic() < end, f"{expression} is not true after {TIMEOUT} s"
            time.sleep(0.01)

    def texts(self, selector: str) -> list[str]:
        """Returns the text of each element that a selector names."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def click(self, selector: str) -> None:
        """Clicks the middle of the first element that a selector names; what covers it would get the click."""
        x, y = self.evaluate(
            f"(() => {{ const chosen = document.querySelector({json.dumps(selector)});"
            " chosen.scrollIntoView({block: 'nearest'}); const box = chosen.getClientRects()[0];"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=_KEYS[key], **text)

    def write(self, text: str) -> None:
        """Enters text where the focus is."""
        self.call("Input.insertText", text=text)

    def _event(self, method: str, content: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(content["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.errors.append(str(content["args"]))
        elif method == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(content["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            address = content["request"]["url"]
            if address.partition("#")[0] != self.address.partition("#")[0] and not address.startswith("data:"):
                self.requests.append(address)


class _Pipe:
    """The two ends of the debugging pipe: messages are JSON that ends with a zero byte."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._calls = 0

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None, event: Any = None) -> Any:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        end = time.monotonic() + TIMEOUT
        while True:
            answer = self._next(end)
            if answer.get("id") == self._calls:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            if event and answer.get("sessionId") == session:
                event(answer["method"], answer["params"])

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._reading, 1 << 20) if ready else b""
            assert data, "the browser has ended" if ready else f"no answer within {TIMEOUT} s"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser_page(program: str, *flags: str, size: tuple[int, int] = (1280, 800)) -> Iterator[Page]:
    """Yields an empty tab of a new browser, and ends the browser.

    Args:
        program: path of a Chromium.
        flags: more of its options.
        size: of the window, in pixels.
    """
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium asks of that user
        options = [*_FLAGS, *root, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", *flags]
        command = [sys.executable, "-c", _LAUNCHER, str(to_browser), str(from_browser), program, *options]
        process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            pipe = _Pipe(reading, writing)
            target = pipe.call("Target.createTarget", {"url": "about:blank"})["targetId"]
            attached = pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})
            yield Page(pipe, attached["sessionId"])
        finally:
            os.close(writing)
            os.close(reading)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # Its helpers write into the profile until they notice.
            shutil.rmtree(Path(folder), ignore_errors=True)
