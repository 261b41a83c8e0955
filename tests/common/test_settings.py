from __future__ import annotations

import stat
from pathlib import Path

import pytest

from services.common.settings import Settings
from services.finetune.errors import QuartetError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_defaults_hang_on_home(tmp_path: Path) -> None:
    settings = Settings.from_args([], "q")
    home = tmp_path / ".quartet"
    assert (settings.host, settings.port) == ("127.0.0.1", 50050)
    assert settings.store_uri == f"file://{home}/store"
    assert settings.database_url == f"sqlite:///{home}/quartet.db"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_PORT", "1234")
    assert Settings.from_args([], "q").port == 1234
    assert Settings.from_args(["--port", "99"], "q").port == 99
    monkeypatch.setenv("QUARTET_PORT", "many")
    with pytest.raises(QuartetError) as caught:
        Settings.from_args([], "q")
    assert "QUARTET_PORT" in caught.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org"])
def test_an_exposed_address_wants_a_secret(host: str) -> None:
    with pytest.raises(QuartetError) as caught:
        Settings.from_args(["--host", host], "q")
    assert caught.value.reason == "ADDRESS_EXPOSED"
    assert Settings.from_args(["--host", host, "--token-file", "/t"], "q").host == host
    # TLS alone says who the server is, not who the client is.
    with pytest.raises(QuartetError):
        Settings.from_args(["--host", host, "--tls-cert", "/c", "--tls-key", "/k"], "q")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "unix:/tmp/s"])
def test_loopback_needs_none(host: str) -> None:
    assert Settings.from_args(["--host", host], "q").loopback


@pytest.mark.parametrize(
    "flags", [["--tls-cert", "/c"], ["--tls-client-ca", "/c"], ["--reflection", "maybe"], ["--launcher", "nomad"]]
)
def test_halves_are_refused(flags: list[str]) -> None:
    with pytest.raises(QuartetError) as caught:
        Settings.from_args(flags, "q")
    assert caught.value.reason == "SETTING_INVALID"
