"""The page in a real browser, against the real endpoint."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from altiplano import spec
from altiplano.serve import messages as m
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile, Scope
from altiplano.serve.page import POLICY

from .conftest import PATIENCE_S, Server, settings

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install the package chromium, or set CHROMIUM to its path"
)
NOTE = "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?"
# A machine that is busy with other tests answers late, but it answers.
expect.set_options(timeout=60_000)
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=QUIET, chromium_sandbox=os.geteuid() != 0, timeout=PATIENCE_S * 1000
        )
        yield started
        started.close()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser's console had to complain about."""
    return []


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(reduced_motion="reduce")
    made.set_default_timeout(60_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext, server: Server, complaints: list[str]) -> Page:
    opened = context.new_page()
    opened.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(server.url)
    expect(opened.locator(".model").first).to_have_value("champion")
    return opened


def answer_of(server: Server, model: str, **more: Any) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": NOTE}], "temperature": 0, "max_tokens": 40} | more
    text: str = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
    return text


def test_files_come_with_a_strict_policy(server: Server) -> None:
    index = httpx.get(server.url, timeout=60)
    names = ["page/" + name for name in re.findall(r'(?:href|src)="page/([^"]+)"', index.text)]
    assert {"page/main.js", "page/page.css", "page/icon.svg"} == set(names)
    for name in ["", *names]:
        response = httpx.get(f"{server.url}/{name}", timeout=60)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(f"{server.url}/{name}", headers={"if-none-match": response.headers["etag"]}, timeout=60)
        assert again.status_code == 304 and not again.content
    assert "unsafe" not in POLICY
    for wrong in ("nothing.js", "../page.py", "..%2fpage.py", ""):
        assert httpx.get(f"{server.url}/page/{wrong}", timeout=60).status_code == 404
    # Nothing comes from anywhere else.
    assert not re.search(r"https?://", index.text)


@needs_browser
def test_two_models_answer_side_by_side(page: Page, server: Server, complaints: list[str]) -> None:
    page.locator(".model").nth(1).select_option("cria")
    page.locator("summary").click()
    page.locator("#max-tokens").fill("40")
    page.locator("#prompt").fill(NOTE)
    page.locator("#send").click()
    expect(page.locator("#announce")).to_have_text("A answered, B answered")
    for index, model in enumerate(("champion", "cria")):
        expect(page.locator(".talk").nth(index).locator(".assistant")).to_have_text(answer_of(server, model))
        expect(page.locator(".numbers").nth(index)).to_have_text(re.compile(r"first token \d+ ms · [\d.]+ tokens/s · \d+ tokens"))
    assert complaints == []


@needs_browser
def test_a_conversation_goes_on_with_the_keyboard_alone(page: Page, server: Server) -> None:
    page.locator(".model").first.select_option("cria")
    expect(page.locator("#prompt")).to_be_focused()
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    for number, text in enumerate((NOTE, "Again?"), start=1):
        page.keyboard.type(text)
        page.keyboard.press("Control+Enter")
        expect(page.locator(".assistant")).to_have_count(2 * number)
        expect(page.locator("#send")).to_be_enabled()
    conversation = next(body["messages"] for body in sent[2:] if body["model"] == "cria")
    assert [turn["role"] for turn in conversation] == ["user", "assistant", "user"]
    assert conversation[1]["content"] == answer_of(server, "cria")
    # Tab reaches everything that can be used, and the focus can be seen.
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
        assert page.evaluate(
            "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
        ) in (
            True,
            "solid",
            "auto",
        )
    assert {"send", "fresh", "SUMMARY", "key", "model", "talk"} <= reached


@needs_browser
def test_escape_stops_both_and_the_engine_hears_it(page: Page, server: Server) -> None:
    client = server.generator.client

    async def first_words() -> None:
        said = [m.Token(name, server.generator.tokenizer.token_to_id("M")) for name in client._streams]
        await client._take(m.Step(said))

    page.locator("#prompt").fill("Talk.")
    # The engine stands still, and its first words are said for it: no answer can end before Escape comes.
    with server.stopped():
        page.keyboard.press("Control+Enter")
        server.until(lambda: len(client._streams) == 2)  # neither waits for the other
        server.run(first_words())
        expect(page.locator(".assistant")).to_have_text(["M", "M"])
        page.keyboard.press("Escape")
        expect(page.locator("#announce")).to_have_text("A stopped, B stopped")
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator(".assistant")).to_have_text(["M", "M"])  # what was said stays
        server.until(lambda: not client._streams)
    # The engine answers in order: it has read both requests, and that nobody waits for them.
    stats = server.run(client.stats())
    assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
    expect(page.locator('[data-value="running"]')).to_have_text("0")


@needs_browser
def test_what_the_endpoint_refuses_is_shown_in_its_words(page: Page) -> None:
    page.locator("summary").click()
    page.locator("#max-tokens").fill("9999")
    page.locator("#prompt").fill("hi")
    page.locator("#send").click()
    expect(page.locator(".talk").first.locator(".bad")).to_contain_text("context")
    expect(page.locator("#announce")).to_contain_text("B failed")


@needs_browser
def test_text_stays_text_and_no_script_but_ours_runs(page: Page, complaints: list[str]) -> None:
    evil = '<img src=x onerror="window.owned = 1"><script>window.owned = 1</script>'
    page.locator("#prompt").fill(evil)
    page.locator("#send").click()
    expect(page.locator(".user").first).to_have_text(evil)
    expect(page.locator("#send")).to_be_enabled()
    assert page.locator(".talk img").count() == 0
    page.evaluate("""() => {
      const script = document.createElement("script");
      try { script.textContent = "window.owned = 1"; document.head.append(script); } catch {}
    }""")
    assert page.evaluate("window.owned") is None
    assert any("Content Security Policy" in text or "TrustedScript" in text for text in complaints)


@needs_browser
def test_the_service_card_lives(page: Page, server: Server) -> None:
    expect(page.locator("#state")).to_have_text("healthy")
    expect(page.locator('[data-value="running"]')).to_have_text(re.compile(r"^\d+$"))
    # The rate is of the last two seconds: who looks late finds zero again.
    page.evaluate("""() => {
      const rate = document.querySelector('[data-value="rate"]');
      const note = () => { if (/^[1-9]\\d*$/.test(rate.textContent)) document.body.dataset.rate = rate.textContent; };
      new MutationObserver(note).observe(rate, { childList: true, characterData: true, subtree: true });
    }""")
    page.locator("#prompt").fill(NOTE)
    page.locator("#send").click()
    expect(page.locator("body")).to_have_attribute("data-rate", re.compile(r"^[1-9]\d*$"))
    expect(page.locator('[data-value="ttft"]')).to_have_text(re.compile(r"^\d+ ms$"))
    expect(page.locator('[data-value="kv"]')).to_have_text(re.compile(r"^[\d.]+ %$"))
    assert len(page.locator("#history polyline").get_attribute("points") or "") > 0
    version = httpx.get(f"{server.url}/version", timeout=60).json()["version"]
    expect(page.locator('[data-value="version"]')).to_have_text(version)


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.match(/\\d+/g).map(Number).map(channel); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(", 0)")) return c; } };
  return [...document.querySelectorAll("h1, h2, dt, dd, label, button, summary, p, select, kbd, #keys")].map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [e.id || e.tagName, (a + 0.05) / (b + 0.05)];
  });
}"""


@needs_browser
def test_light_and_dark_can_both_be_read(page: Page) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        # WCAG 2.2, AA for text.
        assert [entry for entry in page.evaluate(CONTRAST) if entry[1] < 4.5] == []
    assert len(backgrounds) == 2
    page.set_viewport_size({"width": 390, "height": 800})
    first, second = (page.locator(".column").nth(i).bounding_box() for i in range(2))
    assert first and second and second["y"] > first["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_names_for_who_listens(page: Page) -> None:
    """Every control has a name that a screen reader can say."""
    tree = page.locator("body").aria_snapshot()
    for words in ('textbox "Message to both"', 'textbox "API key"', 'button "Send"', 'heading "A"', 'combobox "Model"'):
        assert words in tree, tree
    assert not re.search(r"(button|textbox|combobox|spinbutton)(?! \")", tree), tree


@needs_browser
def test_keys(browser: Browser, adapter: Path, tmp_path: Path) -> None:
    """Without a key the page asks for one; a user's key opens the playground, an administrator's the numbers too."""
    keys = KeyFile(tmp_path / "keys.json")
    user, admin = (keys.create(scope.value, scope)[1] for scope in (Scope.user, Scope.admin))
    served = Server(settings(adapter), Governance.of(spec.Serve(host="0.0.0.0", api_keys_file=str(keys.path))))
    context = browser.new_context()
    try:
        context.set_default_timeout(60_000)
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
        page.goto(served.url)
        expect(page.locator("#key-problem")).to_contain_text("API key")
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#state")).to_have_text("healthy")
        page.locator("#key").fill(user)
        page.locator("#key").press("Tab")
        expect(page.locator(".model").first).to_have_value("champion")
        expect(page.locator("#service-note")).to_contain_text("administrator")
        page.locator("#key").fill(admin)
        page.locator("#key").press("Tab")
        expect(page.locator('[data-value="running"]')).to_have_text("0")
        page.reload()
        expect(page.locator(".model").first).to_have_value("champion")
        assert not any(admin in url or user in url for url in asked)
        assert json.dumps(page.context.storage_state()).find(admin) == -1
    finally:
        context.close()
        served.close()
