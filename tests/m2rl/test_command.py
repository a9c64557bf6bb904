"""What commands share."""

import pytest

from m2rl.command import whole_file


def test_a_file_is_complete_or_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    with whole_file(path) as file:
        file.write("first\n")
    with pytest.raises(OSError), whole_file(path) as file:
        file.write("half")
        file.flush()
        assert path.read_text() == "first\n"
        raise OSError("the disk is full")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["first\n"]
