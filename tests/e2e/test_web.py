"""The web pages over HTTP, as their own client speaks to them; tests/e2e/test_browser.py looks at them."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.e2e.stack import Stack
from tests.tiny import tiny_model

KEY = "a-key-that-is-long-enough"
SETTINGS = ["", "0", "", "", "", "24", ""]
"""No system text, greedy, at most 24 tokens."""


@pytest.fixture(scope="module")
def address(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    made = stack.quartet("endpoint", "create", "smollm2", "--name", "web", "--json")
    assert made.returncode == 0, made.stderr
    with stack.gateway(tmp_path_factory.mktemp("gateway"), KEY) as running:
        yield running
    assert stack.quartet("endpoint", "delete", "web").returncode == 0


class Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are answers."""

    def redirect_request(self, *args: object) -> None:
        return None


def ask(address: str, path: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    """(status, text, headers)."""
    request = urllib.request.Request(address + path, urlencode(form).encode() if form else None, headers)
    try:
        with urllib.request.build_opener(Stay).open(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


@pytest.fixture(scope="module")
def cookie(address: str) -> str:
    status, _, headers = ask(address, "/login", {"key": KEY})
    assert status == 303
    return headers["set-cookie"].partition(";")[0]


@pytest.fixture(scope="module")
def web(address: str, cookie: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("downloads")
    client = Client(address, headers={"cookie": cookie}, verbose=False, analytics_enabled=False, download_files=folder)
    yield client
    client.close()


def test_pages_want_the_key_and_nothing_from_elsewhere(address: str, cookie: str) -> None:
    for path in ("/", "/compare", "/train", "/jobs", "/rows"):
        status, _, headers = ask(address, path, Accept="text/html")
        assert (status, headers["location"]) == (303, "/login")
        status, text, headers = ask(address, path, Cookie=cookie)
        assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
        # Links for search engines and social media are not followed by a browser that shows the page.
        assert "fonts.googleapis" not in text and "cdnjs" not in text
    assert ask(address, "/config")[0] == ask(address, "/gradio_api/info")[0] == 401
    status, text, _ = ask(address, "/login", {"key": "wrong"})
    assert status == 401 and "not the API key" in text


def test_the_api_stays_where_it_is(address: str, cookie: str) -> None:
    assert ask(address, "/v1/models", Cookie=cookie)[0] == 401
    assert ask(address, "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
    assert "unknown_url" in ask(address, "/v1/nothing")[1]


def typed(text: str) -> dict[str, object]:
    """What the chat's box holds."""
    return {"text": text, "files": []}


def test_chat_streams(web: Client) -> None:
    job = web.submit(typed("What is the capital of France?"), "web", *SETTINGS, api_name="/chat")
    pieces = [str(piece) for piece in job]
    assert len(pieces) > 1 and "Paris" in pieces[-1]


def test_an_error_is_an_answer_in_words(web: Client) -> None:
    assert "no endpoint" in str(web.predict(typed("hi"), "nobody", *SETTINGS, api_name="/chat")).lower()
    hot = ["", "hot", *SETTINGS[2:]]
    assert "Temperature must be a number" in str(web.predict(typed("hi"), "web", *hot, api_name="/chat"))


def test_two_models_are_asked_side_by_side(web: Client) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    for side in ("left", "right"):
        said = web.predict(turns, "web", *SETTINGS, api_name=f"/compare_{side}")
        assert said[0]["role"] == "user" and "Paris" in str(said[1])


def test_what_is_learned_is_marked(web: Client, stack: Stack, rows: Path) -> None:
    assert stack.quartet("dataset", "create", "web-rows", str(rows)).returncode == 0
    shown = web.predict("web-rows", "smollm2", "the model's own", "", 3, 2, 0, api_name="/preview")
    assert shown.count("<section") == 2 and "<mark>3 plus 3 is 6.&lt;|im_end|&gt;" in shown
    with pytest.raises(AppError, match="unknown template"):
        web.predict("web-rows", "smollm2", "nothing", "", 0, 1, 0, api_name="/preview")


def test_a_run_is_planned_and_followed_to_its_end(web: Client, stack: Stack, rows: Path, tmp_path: Path) -> None:
    recipe = "smollm2_135m_lora_assistant_e1"
    assert stack.quartet("model", "import", str(tiny_model(tmp_path / "tiny")), "--name", "web-tiny").returncode == 0
    assert stack.quartet("dataset", "create", "web-run", str(rows)).returncode == 0
    fields = [None, 3, *[None] * 7]
    plan = [recipe, "web-tiny", ["web-run"], "web-run", "", "data.max_length=128", *fields]
    assert "steps   3" in web.predict(*plan, api_name="/plan")
    with pytest.raises(AppError, match=r"optim\.rl"):
        web.predict(*plan[:5], "optim.rl=1", *fields, api_name="/plan")
    options = ["schedule.max_steps=3", "data.max_length=128", "report.log_every=1", "report.sample_every=2"]
    command = ["train", recipe, "--base", "web-tiny", "--data", "web-run", "--name", "web-run", "--detach"]
    assert stack.quartet(*command, "--cfg-options", *options, 'report.prompts=["Who?"]').returncode == 0
    told = list(web.submit("web-run", api_name="/follow"))
    heading, curve, answers, lines = told[-1]
    assert "SUCCEEDED" in heading and "step 3 of 3" in heading and "checkpoints/3" in heading
    assert "training, step 3:" in curve and "<h4>Who?</h4>" in answers and "SUCCEEDED" in lines
