"""Tests of the upload to the hub and of downloads, against a fake of it on this machine."""

import huggingface_hub.constants
import pytest

from mmrl_jax.pretrained import chat, hub_repository
from mmrl_jax.pretrained.hub import load_language_model
from tests import fake_hub, processors

TOKEN = "hf_secret"
FILES = {
    "README.md": b"---\ntags: [mmrl_jax]\n---\n",
    "model.safetensors": b"\0\1",
    "a/b.json": b"1",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that all requests go to, with a token in the environment and none in a file."""
    with fake_hub.running() as running:
        # huggingface_hub has read HF_ENDPOINT and HF_HOME when it was imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.address)
        files = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub_repository.pull.cache_clear()
        yield running
        hub_repository.pull.cache_clear()


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "out"


@pytest.mark.parametrize("private", [True, False])
def test_a_directory_is_uploaded_with_the_token(private, hub, directory):
    hub_repository.check("me/tuned")
    assert not hub.calls
    address = hub_repository.push(directory, "me/tuned", private=private)
    assert address.startswith(f"{hub.address}/me/tuned/commit/")
    assert hub.repositories == {"me/tuned": FILES} and hub.private == {"me/tuned": private}
    assert {call.token for call in hub.calls if call.method == "POST"} == {f"Bearer {TOKEN}"}
    # A second upload, as of a longer run, replaces the files.
    (directory / "model.safetensors").write_bytes(b"\2")
    hub_repository.push(directory, "me/tuned", private=private)
    assert hub.repositories["me/tuned"]["model.safetensors"] == b"\2"


def test_a_private_upload_does_not_go_to_a_public_repository(hub, directory):
    hub.repositories["me/tuned"], hub.private["me/tuned"] = {}, False
    with pytest.raises(
        ValueError, match="me/tuned: this repository exists and is public. Add --pub"
    ):
        hub_repository.push(directory, "me/tuned", private=True)
    assert not hub.repositories["me/tuned"]


@pytest.mark.parametrize("name", ["tuned", "me/tuned/x", "/tuned", "me/", "../tuned", "me/a b"])
def test_a_name_that_is_none_of_a_repository_is_refused(name, hub):
    with pytest.raises(ValueError, match=r"--push_to=.* must be owner/name"):
        hub_repository.check(name)


def test_without_a_token_nothing_is_tried(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="needs a token .*hf auth login.*HF_TOKEN"):
        hub_repository.check("me/tuned")
    assert not hub.calls


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the upload to me/tuned \(401: .* the token has no permission"),
        (403, r"refuses the upload to me/tuned \(403: .* the token has no permission"),
        (507, r"The hub failed in the upload to me/tuned \(507: "),
    ],
)
def test_what_the_hub_refuses_is_explained(status, message, hub, directory):
    hub.status = status
    with pytest.raises(ValueError, match=message) as refused:
        hub_repository.push(directory, "me/tuned", private=True)
    assert f"hf upload me/tuned {directory}" in str(refused.value)
    assert "You are not welcome here" in str(refused.value) and TOKEN not in str(refused.value)


def test_a_hub_that_cannot_be_reached_is_named(hub, directory, monkeypatch):
    # Nothing listens on this port, which only the administrator may use.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        ValueError, match=r"cannot be reached for the upload.*\(ConnectError.*HF_ENDPOINT"
    ):
        hub_repository.push(directory, "me/tuned", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"cannot be reached for the upload.*\(OfflineMode.*HF_HUB_OFF"
    ):
        hub_repository.push(directory, "me/tuned", private=True)


def test_a_model_of_the_hub_is_downloaded_without_code(hub, tmp_path):
    source = processors.save_decoder(tmp_path / "llama")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    code = {"modeling.py": b"1", "pytorch_model.bin": b"2", "run.pkl": b"3"}
    hub.repositories["me/llama"], hub.private["me/llama"] = files | code, True
    planned = hub_repository.pull("me/llama@v1.0", weights=False)
    assert {path.name for path in planned.iterdir()} == {
        name for name in files if not name.endswith(".safetensors")
    }
    directory = chat.directory_of("hf://me/llama@v1.0")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files
    assert any(call.path == "/api/models/me/llama/revision/v1.0" for call in hub.calls)
    assert chat.read_chat(directory, load_language_model(directory).model.vocabulary).stops
    # Nothing is asked a second time, and without a network the earlier download is found.
    count = len(hub.calls)
    assert chat.directory_of("hf://me/llama@v1.0") == directory and len(hub.calls) == count
    hub.status = 500
    hub_repository.pull.cache_clear()
    assert chat.directory_of("hf://me/llama@v1.0") == directory


def test_what_cannot_be_downloaded_is_explained(hub):
    with pytest.raises(ValueError, match="hf://llama must be hf://owner/name"):
        chat.directory_of("hf://llama")
    with pytest.raises(ValueError, match=r"for the download of me/absent"):
        chat.directory_of("hf://me/absent")
    with pytest.raises(ValueError, match="no directory 'me/llama'.*give hf://me/llama"):
        chat.directory_of("me/llama")
