"""The page in a headless Chromium: through the application over the scripted engine, and through a real server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from slimoe.server.http.access import AccessRules
from tests.models.live_server import LiveOptions, LiveServer, live_server, serving, until
from tests.server.page.browser import Browser, browser, missing_programs
from tests.server.page.canned_server import Canned, canned_server

MISSING = missing_programs()
WHY = f"{' and '.join(MISSING)} is not installed (on Debian: apt-get install chromium chromium-driver)"
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.skipif(bool(MISSING), reason=WHY)]
ANSWERS = "[...document.querySelectorAll('.turn.assistant')]"
IS_WRITTEN = f"!document.querySelector('.writing') && {ANSWERS}.length"
KEY = "a-secret"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(downloads: Path) -> AsyncIterator[Browser]:
    async with browser(downloads) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def canned() -> AsyncIterator[Canned]:
    async with canned_server(Canned(deltas=[{"role": "assistant", "content": ""}, {"content": "Well."}])) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="module")
async def window(shared: Browser, canned: Canned) -> AsyncIterator[Browser]:
    """The browser; at the end nothing was complained of and nobody but one server was asked.

    It comes after the server, which would otherwise be gone before the page is.
    """
    await shared.size(1400, 900)
    await shared.media(prefers_color_scheme="light")
    await shared.complaints()
    shared.requests.clear()
    yield shared
    await shared.go("about:blank")
    assert await shared.complaints() == []
    origins = {"/".join(url.split("/")[:3]) for url in shared.requests if not url.startswith(("data:", "blob:"))}
    assert len(origins) == 1
    assert origins.pop().startswith("http://127.0.0.1:")


async def opened(window: Browser, url: str) -> None:
    """The page without anything that was kept, once the server has told of its models."""
    await window.cdp("Storage.clearDataForOrigin", origin=url, storageTypes="all")
    await window.go(url)
    await window.until("document.querySelector('#empty-model').innerText")


async def say(window: Browser, text: str) -> str:
    """Sends a message; returns the whole answer."""
    await window.type("#prompt", text)
    await window.keys("Enter")
    await window.until(IS_WRITTEN)
    return await last_answer(window)


async def last_answer(window: Browser) -> str:
    return str(await window.run(f"return {ANSWERS}.at(-1).querySelector(':scope > .prose').innerText"))


async def messages(window: Browser) -> list[str]:
    script = "return [...document.querySelectorAll('.turn > .prose')].map((one) => one.innerText)"
    return list(await window.run(script))


async def downloaded(downloads: Path, name: str) -> str:
    await until(lambda: (downloads / name).is_file())
    text = (downloads / name).read_text(encoding="utf-8")
    (downloads / name).unlink()
    return text


async def test_an_answer_is_streamed_and_is_there_after_a_reload(window: Browser, server: LiveServer) -> None:
    await opened(window, server.url)
    answer = await say(window, "The river of the valley is long. So it is.")
    assert "The river of the valley is long." in answer
    assert "tokens/s" in await window.text(".turn.assistant .figures")
    assert await window.text("#title") == "The river of the valley is long. So it is."
    spoken = await window.run("return [...document.querySelectorAll('#spoken p')].map((one) => one.innerText)")
    assert 1 <= len(spoken) <= 3
    assert "The river of the valley is long." in " ".join(spoken)
    before = await messages(window)
    await window.type("#prompt", "unsent")
    await window.go(await window.run("return location.href"))
    await window.until(IS_WRITTEN)
    assert await messages(window) == before
    assert await window.run("return document.querySelector('#prompt').value") == "unsent"
    assert await window.text("#conversations") == "The river of the valley is long. So it is."


async def test_an_answer_that_goes_on_for_ever_is_stopped_by_escape(window: Browser, server: LiveServer) -> None:
    await opened(window, server.url)
    await window.click("#show-settings")
    await window.type("#settings [name=max_tokens]", "1000000")
    await window.press("#settings", "Save")
    await window.type("#prompt", "forever")
    await window.keys("Enter")
    await window.until(f"{ANSWERS}.at(-1).innerText.length > 300")
    assert await window.run("return document.querySelector('#send').hidden")
    await window.type("#prompt", "meanwhile")
    await window.keys("Enter")
    await window.keys("Escape")
    await window.until(IS_WRITTEN)
    assert "You stopped it." in await window.text(".turn.assistant .figures")
    await until(lambda: server.supervisor.n_busy == 0)
    assert await window.run("return document.querySelector('#prompt').value") == "meanwhile"
    assert len(await messages(window)) == 2


async def test_editing_replaces_what_follows_and_can_be_undone(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    for text in ("one", "two"):
        await say(window, text)
    await window.press(".turn.user", "Edit")
    await window.run("document.querySelector('textarea.edit').value = ''")
    await window.type("textarea.edit", "three")
    await window.press(".editing", "Send again")
    await window.until(f"document.querySelectorAll('.turn').length === 4 && {IS_WRITTEN}")
    assert await messages(window) == ["one", "Well.", "three", "Well."]
    assert [one["content"] for one in canned.asked[-1]["messages"]] == ["one", "Well.", "three"]
    await window.press("#toast", "Undo")
    await window.until("document.querySelectorAll('.turn > .prose')[2]?.innerText === 'two'")

    canned.deltas = [{"content": "Better."}]
    await window.press(".turn.assistant", "Again")
    await window.until(f"{ANSWERS}.at(-1).innerText.includes('Better.') && {IS_WRITTEN}")
    assert await messages(window) == ["one", "Well.", "two", "Better."]
    assert [one["content"] for one in canned.asked[-1]["messages"]] == ["one", "Well.", "two"]


async def test_an_answer_that_broke_off_goes_on_where_it_ended(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    canned.deltas, canned.finish = [{"content": "The river"}], None
    await say(window, "Tell me.")
    assert "broke off" in await window.text(".turn.assistant .problem-box")
    canned.deltas, canned.finish = [{"content": " is long."}], "stop"
    await window.press(".turn.assistant", "Continue")
    await window.until(f"{ANSWERS}.at(-1).innerText.includes('long') && {IS_WRITTEN}")
    assert await messages(window) == ["Tell me.", "The river is long."]
    assert canned.asked[-1]["messages"][-1] == {"role": "assistant", "content": "The river"}
    assert await window.run("return document.querySelector('.turn.assistant .problem-box').hidden")


async def test_an_error_says_what_to_do_and_loses_nothing(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    canned.error = (
        400,
        {"message": "It is too long.", "type": "x", "param": "messages", "code": "context_length_exceeded"},
    )
    await say(window, "A long text")
    box = await window.text(".turn.assistant .problem-box")
    assert "It is too long." in box
    assert "--ctx" in box
    assert all("status of 400" in one for one in await window.complaints())
    canned.error = None
    await window.press(".problem-box", "Try again")
    await window.until(f"{ANSWERS}.at(-1).innerText.includes('Well.') && {IS_WRITTEN}")
    assert await messages(window) == ["A long text", "Well."]


async def test_conversations_are_found_renamed_deleted_and_had_back(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    await say(window, "Of rivers")
    await window.keys("Alt", "n")
    await say(window, "Of towns")
    titles = "[...document.querySelectorAll('.row-title')].map((one) => one.innerText).join()"
    assert await window.run(f"return {titles}") == "Of towns,Of rivers"
    await window.type("#search", "riv well")
    await window.until(f"{titles} === 'Of rivers'")
    await window.click("#conversations .row")
    await window.until("document.querySelector('#title').innerText === 'Of rivers'")
    await window.click("#rename")
    await window.run("document.querySelector('#ask-name input').value = ''")
    await window.type("#ask-name input", "Of the Rhine")
    await window.keys("Enter")
    await window.until("document.querySelector('#title').innerText === 'Of the Rhine'")
    await window.click("#delete")
    await window.until("document.querySelector('#title').innerText === 'New conversation'")
    assert "None of 1 conversation" in await window.text("#no-conversations")
    await window.press("#toast", "Undo")
    await window.until("document.querySelector('#title').innerText === 'Of the Rhine'")
    await window.go(await window.run("return location.href"))
    await window.until("document.querySelector('#title').innerText === 'Of the Rhine'")
    assert await messages(window) == ["Of rivers", "Well."]


async def test_what_is_exported_can_be_imported(window: Browser, canned: Canned, downloads: Path) -> None:
    await opened(window, canned.url)
    canned.deltas = [{"reasoning_content": "Hm."}, {"content": "Well, *well*."}]
    await say(window, "Of rivers")
    await window.click("#export-markdown")
    markdown = await downloaded(downloads, "of-rivers.md")
    assert markdown == "# Of rivers\n\n**You**\n\nOf rivers\n\n**canned**\n\n> Hm.\n\nWell, *well*.\n"
    await window.click("#export-json")
    text = await downloaded(downloads, "of-rivers.json")
    kept = json.loads(text)["conversations"]
    assert [one["role"] for one in kept[0]["messages"]] == ["user", "assistant"]

    await window.cdp("Storage.clearDataForOrigin", origin=canned.url, storageTypes="all")
    await opened(window, canned.url)
    path = downloads / "again.json"
    path.write_text(text, encoding="utf-8")
    await window.run("document.querySelector('#import-file').hidden = false")
    await window.type("#import-file", str(path))
    await window.until("document.querySelector('#title').innerText === 'Of rivers'")
    assert await messages(window) == ["Of rivers", "Well, well."]
    path.write_text('{"conversations": [{"messages": [{"role": "wizard"}]}]}', encoding="utf-8")
    await window.type("#import-file", str(path))
    await window.until("document.querySelector('#toast').innerText.includes('wizard')")


async def test_settings_go_with_every_question(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    await window.click("#show-settings")
    given = {"system": "Be brief.", "temperature": "0.2", "top_p": "0.5", "top_k": "7", "min_p": "0", "max_tokens": "9"}
    given |= {"seed": "3", "repeat_penalty": "1.1", "presence_penalty": "-1", "frequency_penalty": "1"}
    given |= {"schema": '{"type": "object"}'}
    for name, value in given.items():
        await window.type(f"#settings [name={name}]", value)
    await window.press("#settings", "Save")
    summary = "document.querySelector('#settings-summary').innerText"
    await window.until(f"{summary} === ': system prompt, json schema, 9 more'")
    await say(window, "one")
    asked = canned.asked[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = {name: json.loads(value) for name, value in given.items() if name not in ("system", "schema")}
    assert {name: asked[name] for name in numbers} == numbers
    assert asked["response_format"]["json_schema"]["schema"] == {"type": "object"}
    await window.keys("Alt", "n")
    await window.click("#show-settings")
    await window.press("#settings", "Defaults")
    await window.press("#settings", "Save")
    await say(window, "two")
    assert canned.asked[-1].keys().isdisjoint({*numbers, "response_format"})


async def test_reasoning_is_folded_and_calls_of_tools_get_results(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}}
    rest = {"index": 0, "function": {"arguments": ' "Rome"}'}}
    canned.deltas = [{"reasoning_content": "I should look. "}, {"tool_calls": [call]}, {"tool_calls": [rest]}]
    canned.finish = "tool_calls"
    await say(window, "What is the weather?")
    assert await window.text(".turn.assistant .reasoning summary") == "Reasoning, 3 words"
    assert not await window.run("return document.querySelector('.turn.assistant .reasoning').open")
    assert '"city": "Rome"' in await window.text(".call pre")
    canned.deltas, canned.finish = [{"content": "It rains."}], "stop"
    await window.type(".calls textarea", "rain")
    await window.press(".calls", "Send results")
    await window.until(f"{ANSWERS}.at(-1).innerText.includes('It rains.') && {IS_WRITTEN}")
    _, called, result = canned.asked[-1]["messages"]
    assert called["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    ]
    assert result == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


MARKDOWN = """# Title

Some **bold**, *em*, `a < b`, ~~gone~~ and [a link](https://example.org/a_(b)). Not_an_em_here 2*3*4.

1. one
2. two
   - inner

| a | b |
|---|--:|
| 1 | 2 |

> quoted

```python
x = "<b>"
```
"""
HOSTILE = """<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>

[a](javascript:document.title='owned') ![b](http://127.0.0.1:1/x.png) [c](data:text/html,x) <http://a"onclick=b>

| <i>x</i> | y |
|--|--|
| [d](vbscript:x) | `<style>` |
"""


async def test_markdown_becomes_elements(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    canned.deltas = [{"content": MARKDOWN[at : at + 3]} for at in range(0, len(MARKDOWN), 3)]
    await say(window, "one")
    found: dict[str, Any] = await window.run(
        "const node = document.querySelector('.turn.assistant > .prose'); const text = (name) =>"
        " [...node.querySelectorAll(name)].map((one) => one.textContent); return Object.fromEntries("
        "arguments[0].map((n) => [n, text(n)]))",
        ["h3", "strong", "em", "p code", "del", "ol > li", "ol li li", "td", "blockquote", "pre"],
    )
    assert found == {
        "h3": ["Title"],
        "strong": ["bold"],
        "em": ["em", "3"],
        "p code": ["a < b"],
        "del": ["gone"],
        "ol > li": ["one", "twoinner"],
        "ol li li": ["inner"],
        "td": ["1", "2"],
        "blockquote": ["quoted"],
        "pre": ['x = "<b>"'],
    }
    spoken = await window.text("#spoken")
    assert "Some bold, em, a < b, gone and a link." in " ".join(spoken.split())
    assert not set("#`~[") & set(spoken)
    link = await window.run("const a = document.querySelector('.prose a'); return [a.href, a.rel, a.target]")
    assert link == ["https://example.org/a_(b)", "noopener noreferrer", "_blank"]


async def test_what_a_model_writes_is_never_html(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    canned.deltas = [{"content": HOSTILE}, {"reasoning_content": HOSTILE}]
    canned.deltas.append({"tool_calls": [{"index": 0, "function": {"name": HOSTILE, "arguments": HOSTILE}}]})
    await say(window, HOSTILE)
    names = "img, script, style, i, iframe, object, svg, [onerror], [onclick]"
    made = await window.run("return document.querySelectorAll(`.turn :is(${arguments[0]})`).length", names)
    assert made == 0
    schemes = await window.run("return [...document.querySelectorAll('.turn a')].map((one) => one.protocol)")
    assert set(schemes) <= {"http:", "https:"}
    assert "owned" not in await window.run("return document.title.replace(/<.*/, '')")


async def test_the_policy_holds_in_the_browser(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    script = (
        "const one = document.createElement('script'); one.textContent = 'window.owned = 1'; document.body.append(one)"
    )
    for forbidden in (script, "document.body.innerHTML = '<b>x</b>'", "setTimeout('window.owned = 1')"):
        await window.run(f"try {{ {forbidden} }} catch (error) {{ return error.name; }}")
    assert await window.run("return [window.owned === undefined, document.querySelector('b')]") == [True, None]
    reach = "return fetch('http://127.0.0.1:1/').then(() => 'reached', (error) => error.name)"
    assert await window.run(reach) == "TypeError"
    told = await window.complaints()
    assert told
    assert all("Content Security Policy" in one or "Trusted" in one for one in told), told


async def test_another_tab_sees_what_is_written(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    first = await window.do("GET", "window")
    second = (await window.do("POST", "window/new", {"type": "tab"}))["handle"]
    await window.do("POST", "window", {"handle": second})
    await window.go(canned.url)
    await window.do("POST", "window", {"handle": first})
    await say(window, "Of rivers")
    await window.do("POST", "window", {"handle": second})
    await window.until("document.querySelector('#conversations').innerText === 'Of rivers'")
    await window.click("#conversations .row")
    assert await messages(window) == ["Of rivers", "Well."]
    await window.click("#delete")
    await window.until("document.querySelector('#toast').innerText.includes('is deleted')")
    await window.do("DELETE", "window")
    await window.do("POST", "window", {"handle": first})
    await window.until("!document.querySelector('#conversations').innerText")


async def test_one_of_several_models_is_chosen(window: Browser, canned: Canned) -> None:
    canned.models = ("small", "large", "huge", "torn")
    canned.cards["huge"] = {"fits": False, "required_bytes": 1, "problem": "Too big.", "meta": {"size": 3 << 30}}
    canned.cards["torn"] = {"fits": False, "problem": "torn.gguf is cut short."}
    canned.events += [("state", {"model": "small", "state": "ready"}), ("state", {"model": "large", "state": "asleep"})]
    canned.events += [(name, data | {"model": "small"}) for name, data in map_events(1)]
    await opened(window, canned.url)
    options = "[...document.querySelector('#model').options].map((one) => one.innerText + one.disabled).join()"
    shown = "small · loadedfalse,large · not loadedfalse,huge · 3.0 GiB · does not fittrue"
    await window.until(f"{options} === '{shown},torn · torn.gguf is cut short.true'")
    await window.until("document.querySelector('#machine .big')")
    await say(window, "one")
    assert canned.asked[-1]["model"] == "small"
    await window.type("#model", "large")
    assert "your next message loads it" in await window.text("#connection")
    assert "as long as the model is loaded" in await window.text("#machine")
    canned.events += [("state", {"model": "large", "state": "loading", "done_bytes": 1, "total_bytes": 4})]
    await window.until("document.querySelector('#connection').innerText === 'Loading the model, 25 %'")
    canned.events += [("state", {"model": "large", "state": "ready"})]
    canned.events += [(name, data | {"model": "large"}) for name, data in map_events(1)]
    await window.until("!document.querySelector('#connection').innerText && document.querySelector('#machine .big')")
    await say(window, "two")
    assert canned.asked[-1]["model"] == "large"
    await window.go(canned.url)
    await window.until("document.querySelector('#model').value === 'large'")


async def test_a_key_is_asked_for_and_sent_in_a_header_alone(window: Browser, model: Path) -> None:
    async with live_server(model, LiveOptions(rules=AccessRules(key=KEY))) as server:
        await window.go(server.url)
        for key, title in (("wrong", "This server asks for a key"), (KEY, "The key is wrong")):
            await window.until(
                "document.querySelector('#ask-key').open && document.querySelector('#key-title').innerText"
            )
            assert await window.text("#key-title") == title
            await window.type("#ask-key input", key)
            await window.keys("Enter")
            await window.until("!document.querySelector('#ask-key').open || arguments[0]", key == "wrong")
            await asyncio.sleep(0.1)
        await window.until("document.querySelector('#empty-model').innerText")
        assert await window.run("return document.activeElement.id") == "prompt"
        assert "river" in await say(window, "river")
        await window.go(server.url)
        await window.until("document.querySelector('#empty-model').innerText")
        assert all("status of 401" in one for one in await window.complaints())
        assert not [url for url in window.requests if KEY in url]
        assert KEY not in str(await window.run("return JSON.stringify(localStorage)"))
        await window.run("sessionStorage.clear()")
        await window.go("about:blank")


async def test_the_page_says_that_text_stays_here_only_where_it_does(shared: Browser, canned: Canned) -> None:
    port = canned.url.rpartition(":")[2]
    here = "What you write stays on this machine."
    there = "What you write goes to elsewhere.example, where the model runs, and nowhere else."
    for host, told in (("127.0.0.1", here), ("localhost", here), ("elsewhere.example", there)):
        await shared.go(f"http://{host}:{port}")
        await shared.until("document.querySelector('#empty-model').innerText")
        assert await shared.text("#empty-title") == told
    await shared.go("about:blank")


async def test_a_page_from_elsewhere_gets_nothing(shared: Browser, server: LiveServer) -> None:
    """Neither a page without an origin, nor one whose name was made to point here."""
    await shared.go("data:text/html,<title>elsewhere</title>")
    ask = "return fetch(arguments[0], arguments[1]).then((one) => one.status, (error) => error.name)"
    for path, options in (
        ("/v1/models", {}),
        ("/v1/chat/completions", {"method": "POST", "body": "{}"}),
        ("/v1/events", {}),
    ):
        assert await shared.run(ask, server.url + path, options) == "TypeError"
    await shared.go(server.url.replace("127.0.0.1", "elsewhere.example"))
    assert "does not go by the name" in await shared.text("body")
    await shared.complaints()


async def test_dark_and_light_follow_the_system_or_the_switch(window: Browser, canned: Canned) -> None:
    colour = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    await opened(window, canned.url)
    assert await window.run(f"return {colour}") > 600
    await window.media(prefers_color_scheme="dark")
    await window.until(f"{colour} < 150")
    await window.click("#theme")
    await window.until(f"{colour} > 600")
    await window.go(canned.url)
    assert await window.run(f"return {colour}") > 600
    await window.media(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    canned.deltas, canned.finish = [{"content": "x"}], None
    await window.until("matchMedia('(prefers-reduced-motion: reduce)').matches")


async def test_everything_is_reached_by_keyboard_and_has_a_name(window: Browser, canned: Canned) -> None:
    await opened(window, canned.url)
    canned.events += map_events(1)
    await window.until("document.activeElement.id === 'prompt'")
    await window.keys("a")
    await window.keys("Shift", "Enter")
    await window.keys("b")
    await window.keys("Enter")
    await window.until(IS_WRITTEN)
    assert canned.asked[-1]["messages"][-1]["content"] == "a\nb"
    seen = set()
    for _ in range(60):
        await window.keys("Tab")
        seen.add(await window.run("const one = document.activeElement; return one.id || one.innerText"))
    wanted = {
        "show-list",
        "theme",
        "show-shortcuts",
        "show-machine",
        "new-conversation",
        "search",
        "prompt",
        "send",
        "map",
    }
    wanted |= {"show-settings", "rename", "delete", "export-json", "export-markdown", "Copy", "Edit", "Again", "larger"}
    assert wanted <= seen
    nameless = await window.run(
        "return [...document.querySelectorAll('button, input, textarea, select, [tabindex=\"0\"]')]"
        ".filter((one) => !one.closest('[hidden]') && !(one.innerText || one.ariaLabel || one.labels?.length))"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    landmarks = "['header', 'nav[aria-label]', 'main', 'aside[aria-label]', 'h1']"
    assert await window.run(f"return {landmarks}.every((one) => document.querySelector(one))")
    await window.run("document.activeElement.blur()")
    await window.keys("?")
    await window.until("document.querySelector('#shortcuts').open")
    await window.keys("Escape")
    await window.until("!document.querySelector('#shortcuts').open")
    await window.keys("/")
    await window.until("document.activeElement.id === 'prompt'")
    await window.keys("Up")
    await window.until("document.activeElement.matches('textarea.edit')")
    await window.keys("Escape")
    await window.keys("Alt", "m")
    await window.keys("Right")
    await window.until("document.querySelector('#map-readout').innerText.startsWith('Layer 3, expert 1: on disk only')")


async def test_it_fits_a_narrow_screen(window: Browser, canned: Canned) -> None:
    await window.size(390, 844)
    await opened(window, canned.url)
    canned.events += map_events(1)
    canned.deltas = [{"content": MARKDOWN + "\n\n" + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```"}]
    await say(window, "z" * 200)
    wide = "document.scrollingElement.scrollWidth"
    assert await window.run(f"return {wide}") <= 390
    for name in ("list", "machine"):
        assert await window.run("return document.getElementById(arguments[0]).hidden", name)
        await window.click(f"#show-{name}")
        assert await window.run("return document.getElementById(arguments[0]).offsetWidth", name) == 390
        assert await window.run(f"return {wide}") <= 390
        await window.keys("Escape")
        assert await window.run("return document.getElementById(arguments[0]).hidden", name)


def map_events(uses: int) -> list[tuple[str, dict[str, Any]]]:
    """What a server tells of two layers of four experts, the first of which was used so often."""
    layer = {"layer": 3, "tiers": "h.dx", "formats": [0, 0, 1, -1], "reading": [1], "uses": [uses, 0, 0, 0]}
    layers = [
        layer | {"total_uses": [uses, 5, 0, 0]},
        layer | {"layer": 4, "reading": [], "uses": None, "total_uses": None},
    ]
    formats = [{"types": "Q4_K Q4_K Q6_K", "bytes": 69632}, {"types": "Q2_K Q2_K Q2_K", "bytes": 30000}]
    spent = {"seconds": 2.0, "compute_seconds": 1.5, "disk_seconds": 0.5, "device_seconds": 0, "other_seconds": 0}
    spent |= {"n_prompt": 20, "n_predicted": 41, "hit_share": 0.71}
    speed = {"predicted": 27.5, "most": 33.4, "bound": "disk", "measured": 25.1}
    by_use = {"weights": 10 << 20, "experts": 30 << 20, "kv": 10 << 20}
    place = {"name": "host", "setting": "100MiB", "budget": 100 << 20, "reserve": 20 << 20, "by_use": by_use}
    return [
        ("experts", {"model": "canned", "formats": formats, "layers": layers}),
        ("places", {"model": "canned", "resident": 50 << 20, "peak": 60 << 20, "places": [place]}),
        ("work", {"model": "canned", "n_running": 1, "answer": spent, "total": spent, "speed": speed}),
    ]


async def test_the_map_shows_tiers_types_and_uses_and_says_them_in_words(window: Browser, canned: Canned) -> None:
    canned.events += map_events(2)
    await opened(window, canned.url)
    await window.until("document.querySelector('#machine .big')")
    text = await window.text("#machine")
    for told in (
        "2 layers down, 4 experts across",
        "25.1 tokens/s",
        "27.5 predicted, at most 33.4: the disk sets the limit",
    ):
        assert told in text
    for told in ("1.5 s · 75 %", "500 ms · 25 %", "71 % of the experts", "70.0 MiB of 100 MiB"):
        assert told in text
    await window.keys("Alt", "m")
    readout = "document.querySelector('#map-readout').innerText"
    await window.until(
        f"{readout}.startsWith('Layer 3, expert 0: in memory, Q4_K and Q6_K, 68.0 KiB. Used by 2 tokens')"
    )
    for key, words in (("Right", "on disk only, being read"), ("Right", "on a device, Q2_K"), ("Right", "left out")):
        await window.keys(key)
        assert words in await window.run(f"return {readout}")
    await window.keys("Down")
    assert "Layer 4, expert 3" in await window.run(f"return {readout}")
    assert "Its uses are not known." in await window.run(f"return {readout}")
    pictures = set()
    for view in ("place", "type", "use", "all"):
        await window.run("document.querySelector(`.views input[value=${arguments[0]}]`).click()", view)
        await asyncio.sleep(0.1)
        pictures.add(await window.run("return document.querySelector('.map canvas').toDataURL()"))
    assert len(pictures) == 4
    await window.click("#larger")
    assert (
        await window.run(
            "return document.querySelector('#chat').inert && document.querySelector('#machine').offsetWidth"
        )
        > 1300
    )
    await window.keys("Escape")
    assert not await window.run("return document.querySelector('#chat').inert")
    canned.events += map_events(9)
    await window.until("document.querySelector('#machine .legend').innerText.includes('up to 9')")
    await window.click(".as-table summary")
    await window.until(
        "document.querySelector('.as-table tbody tr')?.innerText.split('\\t').join() === '3,1,1,1,1,1,9'"
    )


async def test_a_real_server_with_tiers_moves_the_map(window: Browser) -> None:
    with serving("--ram", "352MiB") as (_, url):
        await opened(window, url)
        await window.until("/8 layers down, 8 experts across/.test(document.querySelector('#machine').innerText)")
        before = await window.run("return document.querySelector('.map canvas').toDataURL()")
        assert await say(window, 'Define the noun "river".')
        await window.until("document.querySelector('.map canvas').toDataURL() !== arguments[0]", before)
        await window.run("document.querySelector('.views input[value=all]').click()")
        await window.until("/up to [1-9]/.test(document.querySelector('#machine .legend').innerText)")
        for told in ("of 352 MiB", "tokens/s", "waiting for the disk"):
            await window.until("document.querySelector('#machine').innerText.includes(arguments[0])", told)
        assert "of experts at hand" in await window.text(".turn.assistant .figures")
        for limit, told in (("1MiB", "at least"), ("358MiB", "The limit is 358MiB")):
            if not await window.run("return document.querySelector('#ask-name').open"):
                await window.run("document.querySelector('[aria-label=\"Change the limit of Main memory\"]').click()")
            await window.run("document.querySelector('#ask-name input').value = ''")
            await window.type("#ask-name input", limit)
            await window.keys("Enter")
            await window.until("document.body.innerText.includes(arguments[0])", told)
        await window.until("document.querySelector('#machine').innerText.includes('of 358 MiB')")
        assert all("status of" in one for one in await window.complaints())
        await window.go("about:blank")
