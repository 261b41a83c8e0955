"""What a certificate notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from services.finetune import chat_template
from services.finetune.errors import FailedPrecondition
from services.finetune.formats import Message
from services.finetune.prepare.certificate import PROBES, Certificate, certify, check
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from tests.tiny import CHATML, tiny_tokenizer


def made(folder: Path, name: str = "tokenizer") -> Certificate:
    tokenizer = Tokenizer.from_files(folder)
    return certify(tokenizer, load_template(name, tokenizer))


def swapped(folder: Path) -> None:
    """Two tokens change their ids, as in the tokenizer of a sister model."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["?"], vocab["!"] = vocab["!"], vocab["?"]
    path.write_text(json.dumps(data))


def another_template(folder: Path) -> None:
    jinja = folder / "chat_template.jinja"
    jinja.write_text(jinja.read_text().replace("'<|im_end|>' + '\n'", "'<|im_end|>' + ' \n'"))


def a_branch_that_no_probe_takes(folder: Path) -> None:
    jinja = folder / "chat_template.jinja"
    jinja.write_text(jinja.read_text() + "{% if tools %}tools{% endif %}")


def test_equal_files_make_equal_certificates(tmp_path: Path) -> None:
    one, two = made(tiny_tokenizer(tmp_path / "a")), made(tiny_tokenizer(tmp_path / "b"))
    assert one == two == json.loads(json.dumps(one))
    check(one, two, "m")
    assert [p["name"] for p in one["probes"]] == list(PROBES)
    assert not any("refused" in p for p in one["probes"])


@pytest.mark.parametrize(
    ("tamper", "probe", "index", "tokens"),
    [
        (swapped, "en", 17, ("33 '?'", "3 '?'")),
        (another_template, "en", 19, ("201 'Ċ'", "223 'Ġ'")),
        (a_branch_that_no_probe_takes, "", None, ("", "")),
    ],
)
def test_what_is_changed_is_refused_with_the_place(
    tmp_path: Path, tamper: Callable[[Path], None], probe: str, index: int | None, tokens: tuple[str, str]
) -> None:
    trained = made(tiny_tokenizer(tmp_path / "a"))
    tamper(tiny_tokenizer(tmp_path / "b"))
    with pytest.raises(FailedPrecondition) as caught:
        check(trained, made(tmp_path / "b"), "workspaces/w/models/m")
    error = caught.value
    assert error.reason == "PARITY_MISMATCH" and error.message.startswith("workspaces/w/models/m was trained on")
    if index is None:
        assert "index" not in error.metadata
        return
    found = next(p["ids"] for p in made(tmp_path / "b")["probes"] if p["name"] == probe)
    kept = next(p["ids"] for p in trained["probes"] if p["name"] == probe)
    assert found[:index] == kept[:index] and found[index] != kept[index]
    assert (error.metadata["probe"], error.metadata["index"]) == (probe, str(index))
    assert (error.metadata["trained_token"], error.metadata["own_token"]) == tokens
    assert all(token in error.message for token in tokens)


def test_another_named_template_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    with pytest.raises(FailedPrecondition) as caught:
        check(made(folder, "chatml"), made(folder, "vicuna"), "m")
    assert caught.value.metadata["trained_template"] == "chatml" and caught.value.metadata["index"] == "0"


def test_a_template_that_refuses_a_probe_has_a_certificate_too(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    plain = made(folder)
    (folder / "chat_template.jinja").write_text(refusal + CHATML)
    certificate = made(folder)
    assert [p["name"] for p in certificate["probes"] if p.get("refused")] == ["zh-system", "turns"]
    check(certificate, made(folder), "m")
    with pytest.raises(FailedPrecondition, match="refuses the conversation"):
        check(plain, certificate, "m")


def test_the_day_does_not_matter(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y %f') }}" + CHATML)
    assert made(folder) == made(folder)
    tokenizer = Tokenizer.from_files(folder)
    ids = to_prompt_ids(load_template("", tokenizer), tokenizer, [Message("user", "q")])
    assert chat_template.CLOCK.get() is None
    assert tokenizer.decode(ids).startswith(datetime.now().strftime("%d"))
