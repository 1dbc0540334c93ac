"""Names of models that cannot be had are refused at once and in plain words."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from headway.data.hub_names import why_not_there
from headway.data.tokenizers import load_tokenizer
from headway.errors import DataError


@pytest.fixture
def hub(monkeypatch):
    """A hub that hangs up on whoever calls; the calls that it got."""
    calls = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, caller = server.accept()
            except OSError:
                return
            calls.append(caller)
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    yield calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(hub):
    with pytest.raises(DataError, match=r"'nobody/nothing' .*the hub cannot be reached .*; pass 'bytes', a folder"):
        load_tokenizer("nobody/nothing")
    assert 1 <= len(hub) <= 2  # the client may dial once more where a connection breaks off


def test_offline_the_answer_is_the_same():
    assert "the hub cannot be reached" in (why_not_there("nobody/nothing") or "")


def test_folders_and_what_was_fetched_before_need_no_hub(hub, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / "models--nobody--known" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    assert why_not_there(str(tmp_path)) is None
    assert why_not_there("nobody/known") is None
    assert hub == []


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "out/of/nothing", "~/nothing", "no such name?"])
def test_a_name_that_no_repository_can_have_is_not_asked_for(name, hub):
    assert "there is no such folder" in (why_not_there(name) or "")
    assert hub == []


def test_a_file_is_no_folder(tmp_path: Path, hub):
    (tmp_path / "model").write_text("")
    assert why_not_there(str(tmp_path / "model")) == "it is a file, not a folder"
    assert hub == []
