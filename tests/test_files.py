"""Files are written whole or not at all, into folders that can be written."""

import os

import pytest

from flux_attention.files import check_writable, replacing


def test_a_file_is_replaced_when_all_went_well(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with replacing(path) as place:
            place.write_text(text)
            assert place.name == "a.txt" and (not path.exists() or path.read_text() == "one")
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_former_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fail():
        with replacing(path) as place:
            place.write_text("tw")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_folders_to_write(tmp_path):
    check_writable(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=r"cannot write into .*; name another folder"):
            check_writable(folder)
    if os.geteuid():
        (tmp_path / "a").chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            check_writable(tmp_path / "a")
