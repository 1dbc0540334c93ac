import os
import sysconfig
from pathlib import Path

import pytest

from headway.data.sources import SourceReport, iter_files, standard_library
from headway.errors import DataError


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_names_and_groups_are_relative_and_order_is_by_name(tmp_path):
    write(tmp_path, {"b/z.py": b"1", "b/a/y.py": b"2", "a.py": b"3", "a/x.txt": b"4"})
    documents = [*iter_files([tmp_path])]
    assert [document.name for document in documents] == ["a.py", "a/x.txt", "b/a/y.py", "b/z.py"]
    assert [document.group for document in documents] == ["a", "a", "b", "b"]
    assert [document.data for document in documents] == [b"3", b"4", b"2", b"1"]
    assert [*iter_files(str(tmp_path))] == documents


def test_several_paths_keep_their_names_apart(tmp_path):
    write(tmp_path, {"one/text/a.txt": b"1", "two/text/a.txt": b"2", "c.txt": b"3"})
    documents = [*iter_files([tmp_path / "one/text", tmp_path / "two/text", tmp_path / "c.txt"])]
    assert [(document.name, document.group) for document in documents] == [
        ("text/a.txt", "text/a"),
        ("text#2/a.txt", "text#2/a"),
        ("c.txt", "c.txt"),
    ]


def test_the_same_text_elsewhere_has_the_same_names(tmp_path, monkeypatch):
    files = {"p/a.py": b"1", "q.py": b"2"}
    first = [*iter_files([write(tmp_path / "first", files)])]
    monkeypatch.chdir(write(tmp_path / "second", files))
    assert [*iter_files(["."])] == first


def test_suffixes_choose_in_folders_and_named_files_are_always_read(tmp_path):
    write(tmp_path, {"a.PY": b"1", "b.txt": b"2", "c.md": b"3"})
    report = SourceReport()
    names = [document.name for document in iter_files([tmp_path], suffixes=[".py", "md"], report=report)]
    assert names == ["a.PY", "c.md"]
    assert report.other_suffix == 1
    assert [document.data for document in iter_files(tmp_path / "b.txt", suffixes=[".py"])] == [b"2"]


def test_strange_text_is_kept_and_counted(tmp_path):
    write(
        tmp_path,
        {
            "empty": b"",
            "nul": b"a\0b",
            "latin": b"caf\xe9",
            "utf16": "text".encode("utf-16"),
            "line": b"x" * (3 << 20),
            "lines": (b"x" * 999 + b"\n") * 3000,
        },
    )
    report = SourceReport()
    documents = {document.name: document.data for document in iter_files([tmp_path], report=report)}
    assert documents.keys() == {"nul", "latin", "utf16", "line", "lines"}
    assert documents["latin"] == b"caf\xe9"
    assert (report.documents, report.empty, report.with_nul, report.undecodable, report.long_lines) == (5, 1, 2, 2, 1)
    assert report.num_bytes == sum(map(len, documents.values()))
    assert report.describe() == (
        f"5 documents, {report.num_bytes / 1e6:.2f} MB; left out: 1 empty; "
        "kept although: 2 with undecodable bytes, 2 with NUL bytes, 1 with lines above 1 MiB"
    )


def test_hidden_files_are_left_out_unless_named(tmp_path):
    write(tmp_path, {".git/config": b"1", "__pycache__/a.pyc": b"2", ".env": b"3", "a.py": b"4"})
    report = SourceReport()
    assert [document.name for document in iter_files([tmp_path], report=report)] == ["a.py"]
    assert report.hidden == 3
    assert [document.data for document in iter_files([tmp_path / ".env"])] == [b"3"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    data = write(tmp_path / "data", {"a/one.txt": b"1", "b.txt": b"2"})
    write(tmp_path, {"outside/two.txt": b"3", "private.txt": b"4"})
    (data / "a/up").symlink_to(data, target_is_directory=True)
    (data / "around").symlink_to(tmp_path, target_is_directory=True)
    (data / "self").symlink_to(data / "self")
    (data / "dangling").symlink_to(tmp_path / "nowhere")
    (data / "same.txt").symlink_to(data / "b.txt")
    (data / "wiki").symlink_to(tmp_path / "outside", target_is_directory=True)
    report = SourceReport()
    documents = {document.name: document.data for document in iter_files([data], report=report)}
    assert documents == {"a/one.txt": b"1", "b.txt": b"2", "wiki/two.txt": b"3"}
    assert (report.repeated, report.special) == (3, 2)


def test_a_file_reached_from_two_paths_is_read_once(tmp_path):
    write(tmp_path, {"a/x.txt": b"1", "b.txt": b"2"})
    report = SourceReport()
    documents = [*iter_files([tmp_path, tmp_path / "a", tmp_path / "b.txt"], report=report)]
    assert [document.data for document in documents] == [b"1", b"2"]
    assert report.repeated == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_never_blocks_the_reader(tmp_path):
    write(tmp_path, {"a.txt": b"1"})
    os.mkfifo(tmp_path / "pipe")
    report = SourceReport()
    assert [document.name for document in iter_files([tmp_path], report=report)] == ["a.txt"]
    assert report.special == 1
    with pytest.raises(DataError, match="neither a file nor a folder"):
        iter_files([tmp_path / "pipe"])


def test_unreadable_files_and_folders_are_left_out_and_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"1", "bad.txt": b"2", "closed/c.txt": b"3"})
    read_bytes, scandir = Path.read_bytes, os.scandir

    def refuse(path):
        if path.name == "bad.txt":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    def refuse_folder(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(os, "scandir", refuse_folder)
    report = SourceReport()
    assert [document.name for document in iter_files([tmp_path], report=report)] == ["a.txt"]
    assert report.unreadable == [("closed/", "permission denied"), ("bad.txt", "permission denied")]
    assert "2 unreadable ('closed/' permission denied, 'bad.txt' permission denied)" in report.describe()


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_file_names_that_are_not_text_become_printable(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_bytes(b"1")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (document,) = iter_files([tmp_path])
    assert document.name == "caf\\xe9.txt"
    assert document.name.encode()


def test_a_path_that_is_not_there_is_an_error_at_once(tmp_path):
    with pytest.raises(DataError, match=r"no such file or directory.*check the spelling"):
        iter_files([tmp_path / "missing"])
    with pytest.raises(DataError, match="name the text to read"):
        iter_files([])


@pytest.mark.parametrize("files", [{}, {"a.txt": b""}, {"a.bin": b"1"}])
def test_a_source_with_nothing_in_it_says_so_and_what_to_do(tmp_path, files):
    write(tmp_path, files)
    with pytest.raises(DataError, match=r"no text in .*0 documents.*name files with text in them, or other suffixes"):
        list(iter_files([tmp_path], suffixes=[".txt"]))


def test_the_standard_library_comes_in_whole_packages_without_its_tests():
    report = SourceReport()
    documents = [*standard_library(report=report)]
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert len(names) == len(set(names)) == report.documents
    assert report.num_bytes > 5_000_000
    assert {"argparse", "asyncio", "json"} <= {document.group for document in documents}
    assert next(document for document in documents if document.name == "json/decoder.py").group == "json"
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"})
    assert not [name for name in names if name.startswith(("_sysconfigdata", "/")) or not name.endswith(".py")]


def test_an_interpreter_without_library_source_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python.zip")})
    with pytest.raises(DataError, match="no standard-library source on disk"):
        list(standard_library())
