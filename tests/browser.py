"""Headless Chromium, driven over a pipe by its DevTools protocol, without further packages."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 300
# Chromium reads commands from file descriptor 3 and writes to 4.
_START = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(r, 3), os.dup2(w, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """A tab that shows one page.

    Attributes:
      errors: Errors of the console and of scripts so far.
      requests: Addresses that the page asked for so far, those of data and of itself excepted.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers, self._rest, self._id = commands, answers, b"", 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        # A frame with another origin is a target of its own.
        options = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": True}
        self.call("Target.setAutoAttach", **options)

    @property
    def errors(self) -> list[str]:
        self.evaluate("0")  # Reads the events before it.
        return [
            json.dumps(event["params"])
            for event in self._events
            if event["method"] == "Runtime.exceptionThrown"
            or (
                event["method"] == "Runtime.consoleAPICalled"
                and event["params"]["type"] in ("error", "warning", "assert")
            )
            or (
                event["method"] == "Log.entryAdded"
                and event["params"]["entry"]["level"] in ("error", "warning")
            )
        ]

    @property
    def requests(self) -> list[str]:
        self.evaluate("0")
        urls = [
            event["params"]["request"]["url"]
            for event in self._events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:")) and url != self._url]

    def open(self, path: pathlib.Path, *, width: int = 1280, dark: bool = False) -> None:
        """Opens a file and waits until it is loaded."""
        self._url = path.resolve().as_uri()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self._events.clear()
        self.call("Page.navigate", url=self._url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())

    def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression of JavaScript, which may be a promise."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def evaluate_in_frame(self, expression: str) -> Any:
        """Returns the value of an expression in the sandboxed frame of the page."""
        (frame,) = (e for e in self._events if e["method"] == "Target.attachedToTarget")
        session, self._session = self._session, frame["params"]["sessionId"]
        try:
            return self.evaluate(expression)
        finally:
            self._session = session

    def press(self, key: str, code: int) -> None:
        """Presses a key, whose name and Windows code are those of DevTools."""
        for kind in ("rawKeyDown", "keyUp"):
            options = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    def names(self) -> list[tuple[str, str]]:
        """Returns the role and the accessible name of each element that can be focused."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if any(
                p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ())
            )
            and node["role"]["value"] != "RootWebArea"
        ]

    def downloads(self, directory: pathlib.Path) -> None:
        """Sets the directory of downloads."""
        session, self._session = self._session, None
        path = str(directory)
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=path)
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its answer."""
        self._id += 1
        command = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while "id" not in (message := self._read()):
            self._events.append(message)
        assert message["id"] == self._id and "error" not in message, message
        return message["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], end - time.monotonic())
            assert ready, f"Chromium has not answered within {TIMEOUT_S} s."
            self._rest += os.read(self._answers, 1 << 20)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """A tab of a new Chromium; skips the test if none is installed."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    commands, answers = os.pipe(), os.pipe()
    fds = commands[0], answers[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, fds), browser, *arguments],
            pass_fds=fds,
            stderr=subprocess.DEVNULL,
        )
        try:
            for fd in fds:
                os.close(fd)
            yield Tab(commands[1], answers[0])
        finally:
            process.terminate()
            process.wait()
            os.close(commands[1])
            os.close(answers[0])
