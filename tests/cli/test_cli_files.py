"""Which files a command line names."""

from __future__ import annotations

from vitgraph.commands.files import find_files, is_video


def test_a_folder_is_searched_recursively_by_extension(photos):
    names = [path.relative_to(photos).as_posix() for path in find_files([str(photos)]).files]
    assert names == ["a.png", "broken.jpg", "deep/b.JPG"]


def test_globs_keep_the_order_of_arguments_and_files_come_once(photos):
    found = find_files([f"{photos}/deep/*", f"{photos}/**/*", str(photos / "a.png")])
    assert [path.name for path in found.files] == ["b.JPG", "a.png", "broken.jpg"]
    assert not found.failures


def test_a_plain_file_is_taken_whatever_its_extension(photos):
    assert find_files([str(photos / "notes.txt")]).files == [photos / "notes.txt"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    path = tmp_path / "scan[1].png"
    path.write_bytes(b"")
    assert find_files([str(path)]).files == [path]


def test_arguments_that_name_nothing_are_reported(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    arguments = [str(tmp_path / "empty"), str(tmp_path / "*.webp"), "missing.png", str(photos / "a.png")]
    found = find_files(arguments)
    assert list(found.failures) == arguments[:3]
    reasons = [str(error) for error in found.failures.values()]
    assert "no image or video" in reasons[0]
    assert "nothing matches" in reasons[1]
    assert "no such file" in reasons[2]
    assert len(found.files) == 1


def test_videos_are_known_by_extension(tmp_path):
    assert is_video(tmp_path / "clip.MP4")
    assert not is_video(tmp_path / "clip.gif")
