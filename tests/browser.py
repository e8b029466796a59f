"""A real browser without a window, told what to do over a pipe by the DevTools protocol: needs Chromium alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def found() -> str | None:
    """Return the browser that is installed, if any."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with a profile of its own in a directory that must not exist yet."""

    def __init__(self, program: str, profile: Path) -> None:
        import fcntl  # not on Windows

        (theirs, self._commands), (self._answers, theirs_too) = os.pipe(), os.pipe()
        inside = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs, theirs_too)]

        def connect() -> None:  # the protocol has the pipes at 3 and 4
            os.dup2(inside[0], 3)
            os.dup2(inside[1], 4)

        self._process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=connect,
        )
        for end in (theirs, theirs_too, *inside):
            os.close(end)
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(SECONDS)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def send(self, method: str, session: str | None = None, /, **params: Any) -> Any:
        """Carry out a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        raw = json.dumps(message).encode() + b"\0"
        while raw:
            raw = raw[os.write(self._commands, raw) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise OSError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def wait_for(self, event: str, since: int) -> None:
        """Wait until an event has happened, among those from place ``since`` on."""
        while not any(each["method"] == event for each in self.events[since:]):
            self._next()

    def open(self, path: Path, *, before: dict[str, dict[str, Any]] | None = None) -> Page:
        """Open a file in a new page, after commands that are to come first."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target, len(self.events))
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        for method, params in (before or {}).items():
            page.send(method, **params)
        since = len(self.events)
        page.send("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired", since)
        return page

    def _next(self) -> dict[str, Any]:
        ends = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0.0, ends - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            more = os.read(self._answers, 1 << 20)
            if not more:
                raise OSError("the browser has ended")
            self._rest += more
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, session: str, target: str, since: int) -> None:
        self._browser, self._session, self._target, self._since = browser, session, target, since

    def send(self, method: str, **params: Any) -> Any:
        return self._browser.send(method, self._session, **params)

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """Return what happened in this page."""
        return [
            event["params"]
            for event in self._browser.events[self._since :]
            if event.get("sessionId") == self._session and event["method"] in methods
        ]

    def value(self, expression: str) -> Any:
        """Return what an expression comes to in the page."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise ValueError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def click(self, element: str) -> None:
        """Click, as a hand would, on the middle of what an expression comes to."""
        x, y = self.value(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """Press a key, where the focus is."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def size(self, width: int, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, kind: str = "", **features: str) -> None:
        """Pretend to be on paper, or in the dark."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", media=kind, features=named)

    def screenshot(self, *, whole: bool = True) -> bytes:
        raw = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(raw["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)
