"""Fixtures around the loopback Hub."""

from pathlib import Path

import pytest

from tests.hub.loopback.server import TOKEN, HubServer, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A loopback Hub that the client in this process talks to, with an empty cache and quick retries."""
    with running_hub(part_size=200_000, page_size=3) as server:
        use_hub(monkeypatch, server, tmp_path / "hf-home")
        yield server


def use_hub(monkeypatch: pytest.MonkeyPatch, server: HubServer, home: Path) -> None:
    """Points the already imported client at `server`; a new process takes `server.environment(home)` instead."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    waits = _http.time.sleep
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: waits(min(seconds, 0.05)))
    huggingface_hub.utils.close_session()
    assert file_download.constants is constants
