"""The newest checkpoint that is whole."""

import shutil

from flux_attention.training.checkpoints import last_checkpoint


def test_damaged_checkpoints_are_passed_over(finished, tmp_path):
    assert last_checkpoint(finished).name == "checkpoint-6"
    for name, content in (("training.safetensors", b"\x10"), ("optimizer.pt", b"PK"), ("trainer_state.json", b"null")):
        copy = tmp_path / name
        shutil.copytree(finished, copy)
        (copy / "checkpoint-6" / name).write_bytes(content)
        assert last_checkpoint(copy).name == "checkpoint-4"
