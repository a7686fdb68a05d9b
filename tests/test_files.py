"""Files are written whole or not at all."""

import pytest

from flux_attention.files import replacing


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
