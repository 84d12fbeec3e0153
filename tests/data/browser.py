"""A headless Chromium that tests drive as a person would, through the DevTools protocol on two pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-pipe",
]  # fmt: skip


def find_chromium() -> str | None:
    """The browser's program, or None where there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One tab. `complaints` collects what the page logs and throws."""

    def __init__(self, program: str, profile: Path) -> None:
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()
        for pipe in (there_in, there_out):
            os.set_inheritable(pipe, True)
        # The browser reads commands from 3 and writes answers to 4.
        move = f'exec 8<&{there_in} 9>&{there_out}; exec 3<&8 4>&9; exec "$@" 8<&- 9>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", move, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(there_in, there_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(there_in)
        os.close(there_out)
        self._in, self._out = os.fdopen(here_in, "rb"), os.fdopen(here_out, "wb")
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        page = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()  # the browser ends with its pipe
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._in.close()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; what else the browser says on the way is noted."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._in.fileno(), 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        one, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(one)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(event["params"]))

    def open(self, address: str) -> None:
        """Load a page and wait until its scripts have run; the same page with another fragment loads anew."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=address)
        while self.run("document.readyState + location.protocol") != "completefile:":
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether the person likes it dark."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def click(self, selector: str) -> None:
        """A press of the left mouse button in the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drag(self, selector: str, to: float) -> None:
        """Pull the thumb of a slider to a part (0 to 1) of its width."""
        box = self._box(selector)
        y = box["y"] + box["height"] / 2
        start = box["x"] + box["width"] / 2
        for kind, x in (
            ("mousePressed", start),
            ("mouseMoved", (start + box["x"] + to * box["width"]) / 2),
            ("mouseMoved", box["x"] + to * box["width"]),
            ("mouseReleased", box["x"] + to * box["width"]),
        ):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace what stands in a field, key by key."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        for letter in text:
            self.send("Input.dispatchKeyEvent", type="keyDown", text=letter)
            self.send("Input.dispatchKeyEvent", type="keyUp")

    def middle(self, selector: str) -> tuple[float, float]:
        box = self._box(selector)
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def _box(self, selector: str) -> dict[str, float]:
        found = f"document.querySelector({json.dumps(selector)})"
        return self.run(
            f"{found}.scrollIntoView({{block: 'center'}}), {found}.getBoundingClientRect().toJSON()"
        )

    def screenshot(self, file: Path) -> Path:
        """The whole page, also below the window, as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
        return file
