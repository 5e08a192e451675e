"""Outputs are written atomically."""

import pytest

from gptj8.runtime.errors import UserError
from gptj8.runtime.files import (
    format_bytes,
    read_json,
    replace_directory,
    replace_file,
    require_free_space,
    write_json,
)


def test_private_files_get_the_default_permissions(tmp_path):
    with replace_directory(tmp_path / "out") as staging:
        for name, mode in (("private", 0o600), ("usual", None)):
            (staging / name).write_text("x")
            if mode:
                (staging / name).chmod(mode)
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1
    (tmp_path / "new").write_text("x")
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_directory_appears_when_it_is_complete(tmp_path):
    with replace_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_keeps_the_existing_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("new")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_success_replaces_the_existing_directory_completely(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with replace_directory(tmp_path / "out") as staging:
        (staging / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_files_left_by_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete" / "half").write_text("half")
    with replace_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a"]


def test_a_kill_between_the_two_renames_loses_no_data(tmp_path):
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_a_file_or_link_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is not a folder"), replace_directory(tmp_path / name):
            pytest.fail("the work began")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_file_is_replaced_or_left_unchanged(tmp_path):
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(ValueError), replace_file(file) as staging:
        staging.write_text("half")
        raise ValueError
    assert read_json(file) == {"x": 1}
    assert [p.name for p in file.parent.iterdir()] == ["a.json"]


def test_write_json_rejects_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1, "nothing")
    with pytest.raises(UserError, match=r"a model needs 1000000\.00 TB"):
        require_free_space(tmp_path / "not" / "yet", 10**18, "a model")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (6.06e9, "6.06 GB"), (2.5e12, "2.50 TB")]
)
def test_bytes_are_readable(count, text):
    assert format_bytes(count) == text
