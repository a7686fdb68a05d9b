"""Names that users give, checked without loading anything."""

import os
from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from flux_attention import names


@pytest.mark.parametrize("name", ["./routers", "/x/routers", "~/routers", "../routers", "a/b/routers", "routers/"])
def test_paths_are_told_from_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        names.check_folder(name)
    if not name.startswith(("/", "~", "..")):
        os.makedirs(name)
        names.check_folder(name)


def test_ids_and_files(tmp_path):
    for name in ("gpt2", "owner/name", "owner/na.me-1_B"):
        names.check_folder(name)
    with pytest.raises(ValueError, match="no such folder"):
        names.check_folder(tmp_path / "routers")  # a path object is a path
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        names.check_folder(str(tmp_path / "file"))


class ConnectError(Exception):
    """What HTTP libraries raise is no OSError."""


def test_why_a_repository_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda *_, **__: None)
    asked = []

    def answer(error=None):
        def request(url, timeout):
            asked.append((url, timeout))
            if error is not None:
                raise error

        monkeypatch.setattr(names, "get_hf_file_metadata", request)
        return names.unreachable("owner/name", "config.json")

    assert answer() is None
    assert asked[0][0].endswith("owner/name/resolve/main/config.json") and asked[0][1] <= 10
    assert "the Hub cannot be reached: ConnectError" in answer(ConnectError("no route"))
    assert len(asked) == 2  # no second try
    response = SimpleNamespace(status_code=404, headers={}, request=None)
    assert "the Hub has no such repository" in answer(errors.RepositoryNotFoundError("lecture", response=response))
    assert "hf auth login" in answer(errors.GatedRepoError("lecture", response=response))
    response = SimpleNamespace(status_code=503, headers={}, request=None)
    assert answer(errors.HfHubHTTPError("lecture", response=response)) == "the Hub answered 503"
    assert "not the id of a Hub repository" in names.unreachable("a b", "config.json")
    assert answer(ConnectError("no route")).endswith("ConnectError")
    assert names.unreachable("shiped", "config.json").endswith("did you mean shipped?")
    ranking = names.known_rankings()[0]
    assert f"{ranking} comes along as an adapter" in names.unreachable(ranking, "config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in names.unreachable("owner/name", "config.json")
    monkeypatch.setattr(names, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert names.unreachable("owner/name", "config.json") is None
