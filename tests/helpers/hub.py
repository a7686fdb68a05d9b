"""The Hub, in a folder: it is out of reach in tests."""

import shutil
from unittest import mock

import pytest

from flux_attention import adapters


class Hub:
    """The Hub as ``HfApi`` shows it, on disk: repositories with branches."""

    def __init__(self, root):
        self.root, self.said = root, {}

    def api(self, token=None):
        self.said["token"] = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.said["private"] = private
        (self.root / "me" / repo_id.split("/")[-1] / "main").mkdir(parents=True, exist_ok=True)
        return mock.Mock(repo_id=f"me/{repo_id.split('/')[-1]}")

    def create_branch(self, repo_id, *, branch, exist_ok):
        assert exist_ok
        (self.root / repo_id / branch).mkdir(exist_ok=True)

    def file_exists(self, repo_id, filename, *, revision=None):
        return (self.root / repo_id / (revision or "main") / filename).exists()

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, ignore_patterns, **kwargs):
        ignore = shutil.ignore_patterns(*([ignore_patterns] if ignore_patterns else []))
        shutil.copytree(folder_path, self.root / repo_id / (revision or "main"), dirs_exist_ok=True, ignore=ignore)
        self.said.update(message=commit_message, **kwargs)
        return f"https://hub/{repo_id}/commit/{revision or 'main'}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the Hub itself, which is out of reach in tests."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(adapters, "HfApi", hub.api)

    def snapshot_download(repo_id, revision, allow_patterns):
        assert set(allow_patterns) == {"flux_config.json", "routers.safetensors"}
        return str(hub.root / repo_id / (revision or "main"))

    monkeypatch.setattr(adapters, "snapshot_download", snapshot_download)
    monkeypatch.setattr(adapters, "unreachable", lambda *arguments: None)
    return hub
