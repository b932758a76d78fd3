"""Headless Chromium over its debugging pipe: no driver, no packages, no open port.

Chromium reads commands from file descriptor 3 and writes replies and events to 4, each a JSON text ended by a NUL.
Every wait has a deadline.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Failure(AssertionError):
    """What the page did not do in time."""


class Chromium:
    """One browser with one tab. Use it as a context manager."""

    def __init__(self, width=1100, height=800):
        binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if binary is None:
            raise SystemExit("no Chromium found; install it (Debian: apt-get install chromium) or name it in CHROMIUM")
        self.profile = tempfile.TemporaryDirectory(prefix="page-test-", ignore_cleanup_errors=True)
        from_us, self.commands = os.pipe()
        self.replies, to_us = os.pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--no-default-browser-check",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
            f"--window-size={width},{height}", f"--user-data-dir={self.profile.name}", "about:blank",
        ]
        script = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        self.process = subprocess.Popen(
            ["sh", "-c", script, "sh", binary, *flags],
            pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.buffer = b""
        self.number = 0
        self.console = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tab(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close", deadline=5)
        except (Failure, OSError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.profile.cleanup()

    def call(self, method, session=None, deadline=30, **params):
        """Sends a command and returns its result."""
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + deadline
        while True:
            reply = self._receive(end, method)
            if reply.get("id") == number:
                if "error" in reply:
                    raise Failure(f"{method}: {reply['error']['message']}")
                return reply["result"]
            self._event(reply)

    def tab(self, method, **params):
        """Sends a command to the tab."""
        return self.call(method, session=self.session, **params)

    def _receive(self, end, what):
        while b"\0" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.replies], [], [], left)[0]:
                raise Failure(f"Chromium gave no answer to {what} in time")
            piece = os.read(self.replies, 1 << 16)
            if not piece:
                raise Failure(f"Chromium ended (exit status {self.process.poll()}) before {what}")
            self.buffer += piece
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def _event(self, event):
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description") or details["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.console.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url):
        """Goes to a page and waits until it has loaded."""
        self.tab("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'", "the page to load")

    def js(self, expression):
        """The value of an expression in the page."""
        result = self.tab("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise Failure(f"{expression}: {result['exceptionDetails'].get('exception', {}).get('description')}")
        return result["result"].get("value")

    def until(self, condition, what, deadline=60):
        """Waits for a condition in the page, looking again at each frame; returns its value."""
        value = self.tab(
            "Runtime.evaluate", returnByValue=True, awaitPromise=True,
            expression="""new Promise((done) => { const end = performance.now() + %d; (function look() {
                let value; try { value = (%s); } catch (error) { value = null; }
                if (value || performance.now() > end) done(typeof value === 'object' ? !!value : value); else setTimeout(look, 10); })(); })"""
            % (deadline * 1000, condition),
            deadline=deadline + 15,
        )["result"].get("value")
        if not value:
            raise Failure(f"waited {deadline} s for {what}")
        return value

    def type(self, text):
        """Types into whatever has the focus."""
        self.tab("Input.insertText", text=text)

    def key(self, name, code=0, text=None, modifiers=0):
        """Presses and releases a key."""
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.tab("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **({"text": text} if text else {}))
        self.tab("Input.dispatchKeyEvent", type="keyUp", **common)

    def enter(self, modifiers=0):
        self.key("Enter", 13, "\r", modifiers)

    def escape(self):
        self.key("Escape", 27)

    def tabulator(self, modifiers=0):
        self.key("Tab", 9, modifiers=modifiers)

    def click(self, selector):
        """Clicks the middle of an element."""
        box = self.js(
            "(() => { const r = document.querySelector(%s).getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
            % json.dumps(selector))
        for kind in ("mousePressed", "mouseReleased"):
            self.tab("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def scheme(self, name):
        """`light` or `dark`."""
        self.tab("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def size(self, width, height, mobile=False, scale=1):
        self.tab("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile)

    def picture(self, path):
        """Writes what the tab shows as a PNG."""
        data = self.tab("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
