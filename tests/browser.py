"""Headless Chromium for tests, spoken to in its DevTools protocol through a pair of pipes: no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a headless browser. A context manager."""

    def __init__(self, program=PROGRAM):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to_write = os.pipe()
        self.from_read, from_write = os.pipe()

        def place_pipes():
            os.dup2(to_read, 3 + 100)
            os.dup2(from_write, 4 + 100)
            os.dup2(103, 3)
            os.dup2(104, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [f"--user-data-dir={self.profile.name}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            [program, *options],
            preexec_fn=place_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self.messages = open(self.from_read, "rb")  # noqa: SIM115 # closed with the browser
        self.number, self.session = 0, None
        self.problems = []  # what the page's console says
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.messages.close()
        os.close(self.to_write)
        self.profile.cleanup()

    def message(self):
        """The next message of the browser. Errors: EOFError where it has ended."""
        found = bytearray()
        while (byte := self.messages.read(1)) != b"\0":
            if not byte:
                raise EOFError("the browser ended")
            found += byte
        return json.loads(found)

    def call(self, method, **parameters):
        """The result of a command."""
        self.number += 1
        request = dict(id=self.number, method=method, params=parameters)
        if self.session:
            request["sessionId"] = self.session
        os.write(self.to_write, json.dumps(request).encode() + b"\0")
        while True:
            said = self.message()
            if said.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.problems.append(said["params"])
            if said.get("id") == self.number:
                if "error" in said:
                    raise RuntimeError(said["error"])
                return said["result"]

    def run(self, script):
        """The value of a JavaScript expression; a promise is waited for."""
        said = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"])
        return said["result"].get("value")

    def wait(self, script, seconds=120):
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                raise TimeoutError(script)
            time.sleep(0.05)

    def open(self, address, width=1200, height=900, dark=False):
        """Shows a page at a width, in light or dark colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(address)})")

    def picture(self):
        """A PNG of what is shown."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])
