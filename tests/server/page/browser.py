"""A headless Chromium that tests drive through chromedriver, which speaks HTTP and JSON."""

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

DRIVER = "chromedriver"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
    "--host-resolver-rules=MAP&elsewhere.example&127.0.0.1"
)
DEADLINE = 15.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "Tab": "\ue004", "Alt": "\ue00a", "Up": "\ue013"}
KEYS |= {"Left": "\ue012", "Right": "\ue014", "Down": "\ue015", "Home": "\ue011", "End": "\ue010", "Control": "\ue009"}


def missing_programs() -> list[str]:
    """What a browser test needs and this machine does not have."""
    found = any(map(shutil.which, CHROMIUM))
    return [] if found and shutil.which(DRIVER) else ["chromium"] if not found else [DRIVER]


@dataclass(slots=True)
class Browser:
    """One window. Its log is read once: what was told is forgotten."""

    http: aiohttp.ClientSession
    session: str
    requests: list[str] = field(default_factory=list)

    async def do(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A command of WebDriver; raises AssertionError for one that fails."""
        data = None if method == "GET" else body or {}
        async with self.http.request(method, f"{self.session}/{path}", json=data) as response:
            value = (await response.json())["value"]
            assert response.status == 200, f"{path} {body}: {value['message'].splitlines()[0]}"
            return value

    async def go(self, url: str) -> None:
        """Opens an address and waits until it is loaded."""
        await self.do("POST", "url", {"url": url})

    async def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns, or what its promise comes to."""
        return await self.do("POST", "execute/sync", {"script": script, "args": arguments})

    async def until(self, expression: str, *arguments: Any) -> Any:
        """The first value of an expression that holds; raises AssertionError when none comes.

        What is asked of something that is not there yet does not hold.
        """
        script = f"try {{ return {expression}; }} catch (error) {{ return null; }}"
        found = None
        try:
            async with asyncio.timeout(DEADLINE):
                while not (found := await self.run(script, *arguments)):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            shown = await self.run("return document.body.innerText")
            raise AssertionError(f"{expression} never held. The page shows: {shown[:2000]}") from None
        return found

    async def element(self, selector: str) -> str:
        """The path of an element's commands."""
        found = await self.do("POST", "element", {"using": "css selector", "value": selector})
        return f"element/{found[_ELEMENT]}"

    async def click(self, selector: str) -> None:
        """Clicks on the first element that a selector finds."""
        await self.do("POST", f"{await self.element(selector)}/click")

    async def press(self, selector: str, label: str) -> None:
        """Clicks on the last button within `selector` that has this text."""
        script = (
            "const found = [...document.querySelectorAll(arguments[0])].filter(one => one.innerText === arguments[1])"
        )
        await self.run(f"{script}; found.at(-1).click()", f"{selector} button", label)

    async def type(self, selector: str, text: str) -> None:
        """Types into an element."""
        await self.do("POST", f"{await self.element(selector)}/value", {"text": text})

    async def keys(self, *names: str) -> None:
        """Presses keys together wherever the focus is, and lets them go."""
        keys = [KEYS.get(name, name) for name in names]
        steps = [{"type": "keyDown", "value": key} for key in keys]
        steps += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        await self.do("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    async def text(self, selector: str) -> str:
        """The text that an element shows."""
        return str(await self.run("return document.querySelector(arguments[0]).innerText", selector))

    async def cdp(self, command: str, **values: Any) -> Any:
        """A command of Chromium's own protocol."""
        return await self.do("POST", "goog/cdp/execute", {"cmd": command, "params": values})

    async def size(self, width: int, height: int, scale: float = 1) -> None:
        """Sets the size of the page in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        await self.cdp("Emulation.setDeviceMetricsOverride", **metrics)

    async def media(self, **features: str) -> None:
        """Sets what the page is told of the person's wishes, such as `prefers_color_scheme`."""
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.cdp("Emulation.setEmulatedMedia", features=values)

    async def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(await self.do("GET", "screenshot"))

    async def complaints(self) -> list[str]:
        """Errors and warnings of the page since the last time; `requests` gets the addresses that it asked for."""
        for entry in await self.do("POST", "se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
        told = await self.do("POST", "se/log", {"type": "browser"})
        return [entry["message"] for entry in told if entry["level"] in ("SEVERE", "WARNING")]


@asynccontextmanager
async def browser(downloads: Path) -> AsyncIterator[Browser]:
    """A browser that keeps what it is given to save in `downloads`, and forgets all else."""
    chromium = next(path for path in map(shutil.which, CHROMIUM) if path)
    driver = await asyncio.create_subprocess_exec(
        DRIVER, "--port=0", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert driver.stdout is not None
    try:
        port = 0
        while not port:
            line = (await asyncio.wait_for(driver.stdout.readline(), DEADLINE)).decode()
            assert line, "chromedriver ended"
            port = int(line.rsplit(" ", 1)[1].rstrip(".\n")) if "successfully" in line else 0
        with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
            options = {
                "binary": chromium,
                "args": [*(flag.replace("&", " ") for flag in FLAGS.split()), f"--user-data-dir={profile}"],
                "prefs": {"download.default_directory": str(downloads)},
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            async with aiohttp.ClientSession() as http:
                base = f"http://127.0.0.1:{port}/session"
                async with http.post(base, json={"capabilities": {"alwaysMatch": wanted}}) as response:
                    value = (await response.json())["value"]
                    assert response.status == 200, value["message"]
                one = Browser(http, f"{base}/{value['sessionId']}")
                try:
                    # Away from the page that a new window shows, which asks for many things.
                    await one.go("about:blank")
                    yield one
                finally:
                    async with http.delete(one.session):
                        pass
    finally:
        driver.kill()
        await driver.wait()
