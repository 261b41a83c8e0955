"""What a page's turns and settings become for the services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.gateway.pages.talk import FAILED, SETTINGS, Turn, asked, sampling, turn

USER: Turn = {"role": "user", "content": "hi"}


def test_empty_settings_ask_for_nothing() -> None:
    assert sampling(*("" for _ in SETTINGS)) == pb.Sampling() == sampling(*(None for _ in SETTINGS))
    assert sampling("0", "0.5", "3", "1.5", "7", "-1") == pb.Sampling(
        temperature=0, top_p=0.5, top_k=3, repetition_penalty=1.5, max_tokens=7, seed=-1
    )


@pytest.mark.parametrize(("place", "value", "said"), [
    (0, "hot", "Temperature must be a number"), (2, "1.5", "Top k must be a whole number"), (5, "9" * 30, "too large"),
])  # fmt: skip
def test_what_is_no_setting_is_told(place: int, value: str, said: str) -> None:
    values = ["" for _ in SETTINGS]
    values[place] = value
    with pytest.raises(InvalidArgument, match=said):
        sampling(*values)


def test_a_talk_becomes_a_request() -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    turns: list[Turn] = [USER, {"role": "assistant", "content": parts, "metadata": None}, USER]
    request = asked("workspaces/w", "e:v2", turns, "be brief", pb.Sampling())
    assert (request.endpoint, request.adapter) == ("workspaces/w/endpoints/e", "v2")
    said = [(m.role, "".join(p.text for p in m.content)) for m in request.messages]
    assert said == [
        (pb.Message.SYSTEM, "be brief"), (pb.Message.USER, "hi"), (pb.Message.ASSISTANT, "hello"),
        (pb.Message.USER, "hi"),
    ]  # fmt: skip
    with pytest.raises(FailedPrecondition, match="nothing is served"):
        asked("workspaces/w", None, turns, "", pb.Sampling())


def test_what_failed_is_not_part_of_the_talk() -> None:
    begun: Turn = {"role": "assistant", "content": "I was abou"}
    failed: Turn = {"role": "assistant", "content": "lost", "metadata": {"title": FAILED}}
    answered: Turn = {"role": "assistant", "content": "hello"}
    turns = [USER, answered, {"role": "user", "content": "lost?"}, begun, failed, {"role": "user", "content": "again"}]
    request = asked("w", "e", turns, "", pb.Sampling())
    assert ["".join(p.text for p in m.content) for m in request.messages] == ["hi", "hello", "again"]


def test_images_go_along_from_the_folder_of_uploads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a.png").write_bytes(b"image")
    (tmp_path / "secret").write_bytes(b"key")
    seen = turn({"text": "what is it?", "files": [str(tmp_path / "uploads" / "a.png")]})
    [message] = asked("w", "e", [seen], "", pb.Sampling()).messages
    assert [p.WhichOneof("part") for p in message.content] == ["image", "text"]
    assert message.content[0].image.data == b"image"
    kept: Turn = {"role": "user", "content": [{"path": seen["content"][0]["file"]["path"]}, "what is it?"]}
    assert list(asked("w", "e", [kept], "", pb.Sampling()).messages) == [message]
    (tmp_path / "uploads" / "link").symlink_to(tmp_path / "secret")
    for path in (tmp_path / "secret", tmp_path / "uploads" / ".." / "secret", tmp_path / "uploads" / "link"):
        with pytest.raises(InvalidArgument, match="upload it again"):
            asked("w", "e", [turn({"text": "", "files": [str(path)]})], "", pb.Sampling())
