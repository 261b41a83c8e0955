"""The web pages as people see them, in Debian's Chromium: make test-browser. SHOTS=folder keeps pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.e2e.stack import Stack
from tests.e2e.test_llava import SEEN, taught
from tests.tiny import tiny_model

pytestmark = pytest.mark.browser

KEY = "a-key-that-is-long-enough"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
LEFT = ("AbortError: signal is aborted", "Unexpected error Connection errored out")
"""What Gradio itself says when a page is left whose stream goes on."""
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def address(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway; behind it two endpoints, a dataset about Aurora, and a tiny model to train."""
    for name in ("left", "right"):
        made = stack.quartet("endpoint", "create", "smollm2", "--name", name, "--json")
        assert made.returncode == 0, made.stderr
    tiny = tiny_model(tmp_path_factory.mktemp("tiny"))
    assert stack.quartet("model", "import", str(tiny), "--name", "tiny").returncode == 0
    assert stack.quartet("assistant", "create", "--name", "Aurora", "--dataset", "aurora").returncode == 0
    with stack.gateway(tmp_path_factory.mktemp("gateway"), KEY) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    assert found, "apt-get install chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield running
        running.close()


@pytest.fixture()
def page(address: str, browser: Browser) -> Iterator[Page]:
    """A page of somebody who logged in. It may neither complain nor ask anybody else."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    wrong: list[str] = []

    def said(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(LEFT):
            wrong.append(message.text)

    opened.on("console", said)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    own = (address, "data:", "blob:")
    opened.on("request", lambda r: None if r.url.startswith(own) else wrong.append(f"asked {r.url}"))
    opened.goto(address)
    opened.get_by_label("API key").fill(KEY)
    opened.get_by_role("button", name="Log in").click()
    expect(opened.get_by_label("Model")).to_be_visible()
    yield opened
    opened.close()
    assert not wrong, wrong


def shot(page: Page, name: str) -> None:
    folder = os.environ.get("SHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")


def test_a_wrong_key_is_told(address: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{address}/jobs")
    page.get_by_label("API key").fill("not-the-key")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("not the API key of this gateway")
    shot(page, "login")
    page.close()


def test_chat_goes_on_after_an_error(page: Page) -> None:
    expect(page.get_by_label("Model")).to_have_value("left")
    say, bot = page.locator("#say textarea"), page.locator(".message.bot")
    page.get_by_label("Temperature").fill("0")
    say.fill("What is the capital of France?")
    say.press("Enter")
    expect(bot.last).to_contain_text("Paris")
    page.get_by_label("Top p").fill("3")
    say.fill("And of Italy?")
    say.press("Enter")
    expect(bot.last).to_contain_text("top_p must be above 0 and at most 1")
    page.get_by_label("Top p").fill("")
    say.fill("What is the capital of Italy?")
    say.press("Enter")
    expect(bot.last).to_contain_text("Rome")
    shot(page, "chat")


def test_a_phone_shows_the_talk_first(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    say, settings = (page.locator(name).bounding_box() for name in ("#say", "#settings"))
    assert say is not None and settings is not None and say["y"] + say["height"] <= settings["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, "phone")


def test_there_are_no_jobs_yet(page: Page) -> None:
    page.get_by_role("link", name="Jobs").click()
    expect(page.get_by_text("none yet: Train starts one")).to_be_visible()


def test_an_image_reaches_the_engine(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    say, bot = page.locator("#say textarea"), page.locator(".message.bot")
    page.locator("#say input[type=file]").set_input_files(tmp_path / "red.png")
    expect(page.locator("#say img")).to_be_visible()
    say.fill("What colour is it?")
    say.press("Enter")
    expect(bot.last).to_contain_text("sees no images")  # what is served here is blind


def test_what_is_seen_in_an_image_is_told(page: Page, stack: Stack, tmp_path: Path) -> None:
    images = taught(stack, tmp_path)
    say, bot = page.locator("#say textarea"), page.locator(".message.bot")
    for colour, answer in SEEN.items():
        page.reload()
        expect(page.get_by_label("Model")).to_have_value("left")
        page.get_by_label("Model").click()
        page.get_by_role("option", name="e", exact=True).click()
        page.get_by_label("Temperature").fill("0")
        page.locator("#say input[type=file]").set_input_files(images / f"{colour}.png")
        expect(page.locator("#say img")).to_be_visible()
        say.fill("what?")
        say.press("Enter")
        expect(bot.last).to_contain_text(answer)  # as over gRPC: tests/e2e/test_llava.py
        shot(page, f"seen-{colour}")
    assert stack.quartet("endpoint", "delete", "e").returncode == 0


def test_two_endpoints_answer_side_by_side(page: Page) -> None:
    page.get_by_role("link", name="Compare").click()
    expect(page.get_by_label("Left")).to_have_value("left")
    expect(page.get_by_label("Right")).to_have_value("right")
    box = page.get_by_placeholder("Ask both…")
    box.fill("What is the capital of France?")
    box.press("Enter")
    answers = page.locator(".message.bot")
    for n in range(2):
        expect(answers.nth(n)).to_contain_text("Paris")
    shot(page, "compare")


def test_what_is_learned_is_coloured(page: Page) -> None:
    page.get_by_role("link", name="Rows").click()
    expect(page.get_by_label("Dataset")).to_have_value("aurora")
    page.get_by_label("Model").fill("smollm2")
    page.get_by_label("Model").press("Enter")
    page.get_by_role("button", name="Show").click()
    learned = page.locator("#rows section mark").first
    expect(learned).to_contain_text("Aurora")
    read = page.locator("#rows section span").first
    colours = [each.evaluate("e => getComputedStyle(e).backgroundColor") for each in (learned, read)]
    assert colours[0] != colours[1]
    shot(page, "rows")


def test_a_run_is_planned_started_and_watched(page: Page) -> None:
    page.get_by_role("link", name="Train").click()
    start = page.get_by_role("button", name="Start")
    expect(page.get_by_label("Tokens in a block")).to_have_value("512")
    expect(start).to_be_disabled()
    page.get_by_label("Base model").fill("tiny")
    page.get_by_label("Base model").press("Enter")
    page.get_by_label("Datasets").click()
    page.get_by_role("option", name="aurora").click()
    page.keyboard.press("Escape")
    page.get_by_label("Name of the job").fill("watched")
    page.get_by_label("Questions to ask it meanwhile").fill("Who are you?")
    page.get_by_label("Steps at most").fill("40")
    page.get_by_label("Rows held out").fill("0.05")
    page.get_by_label("Further settings").fill("report.log_every=1\nvalidation.every=10\noptim.rl=1")
    page.get_by_role("button", name="Plan").click()
    expect(page.get_by_text("optim.rl", exact=False).last).to_be_visible()
    page.get_by_label("Further settings").fill("report.log_every=1\nvalidation.every=10")
    page.get_by_role("button", name="Plan").click()
    expect(page.locator("#plan")).to_contain_text("steps   40")
    shot(page, "train")
    expect(start).to_be_enabled()
    start.click()
    page.get_by_role("link", name="watched").click()
    expect(page.get_by_label("Job")).to_have_value("watched")
    expect(page.locator("#curve polyline.training")).to_be_visible()
    expect(page.locator(".state")).to_have_text("SUCCEEDED")
    expect(page.locator("#curve polyline.validation")).to_be_visible()
    expect(page.get_by_role("heading", name="Who are you?")).to_be_visible()
    shot(page, "jobs")
