"""Files are written whole or not at all."""

import errno
import io
import multiprocessing
import os
import resource
import stat
import tempfile

import pytest
import torch

from vdt_workflows.errors import explanation
from vdt_workflows.files import read_csv, save_atomic, write_atomic, write_csv

FORK = multiprocessing.get_context("fork")  # a process of its own without the seconds of importing torch again


@pytest.fixture
def file(tmp_path):
    """A file that is there already."""
    file = tmp_path / "models" / "model.pt"
    write_atomic(file, b"old")
    return file


def is_untouched(file):
    """Whether the file that was there is as it was, with no temporary one beside it."""
    return file.read_bytes() == b"old" and os.listdir(file.parent) == ["model.pt"]


def refuse_to_write(monkeypatch, error, after=100):
    """Let every temporary file fail with `error` in the middle of what is written to it."""
    make = tempfile.NamedTemporaryFile

    def failing(**options):
        file = make(**options)
        write = file.write

        def cut_short(content):
            write(content[:after])
            file.flush()
            raise error

        file.write = cut_short
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", failing)


def test_a_file_is_written_whole_in_a_folder_that_is_made_for_it(tmp_path):
    file = tmp_path / "a" / "b" / "x.bin"
    for content in (b"first", b"", b"second" * 1000):
        write_atomic(str(file), content)
        assert file.read_bytes() == content
    assert os.listdir(file.parent) == ["x.bin"]


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left"), OSError, r"model\.pt: could not be written \(No space left\); free"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["full disk", "interrupted"],
)
def test_a_write_that_breaks_off_leaves_the_old_file_and_no_temporary_one(file, monkeypatch, error, kind, sentence):
    refuse_to_write(monkeypatch, error)
    with pytest.raises(kind, match=sentence) as caught:
        write_atomic(file, b"new" * 1000)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert is_untouched(file)


def test_a_rename_that_fails_leaves_no_temporary_file(file):
    file.unlink()
    file.mkdir()  # a folder of that name
    with pytest.raises(OSError, match=r"model\.pt: could not be written \(Is a directory\)"):
        write_atomic(file, b"new")
    assert os.listdir(file.parent) == ["model.pt"]


def write_with_a_limit(file, limit, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_atomic({"tensor": torch.zeros(100_000)}, file)
    except OSError as error:
        answers.put(str(error))
    else:
        answers.put("written")


def test_a_file_size_limit_leaves_the_old_file_and_no_temporary_one(file):
    """The kernel's own refusal, which holds for root too."""
    answers = FORK.Queue()
    process = FORK.Process(target=write_with_a_limit, args=(file, 50_000, answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    assert f"{file}: could not be written (File too large)" in answer
    assert is_untouched(file)


def test_weights_that_do_not_fit_in_memory_leave_the_old_file_and_say_so(file, monkeypatch):
    class Small(io.BytesIO):
        def write(self, content):
            if self.tell() > 100_000:
                raise MemoryError
            return super().write(content)

    monkeypatch.setattr(io, "BytesIO", Small)
    with pytest.raises(MemoryError, match=r"model\.pt could not be put together") as caught:
        save_atomic({"tensor": torch.zeros(100_000)}, file)
    assert explanation(caught.value, ["batch_size"]).startswith("out of memory (")
    assert is_untouched(file)


def test_a_path_below_a_file_is_refused_with_a_sentence(file):
    for path in (file / "x.pt", file / "deeper" / "x.pt"):
        with pytest.raises(OSError, match=r"x\.pt: could not be written \((File exists|Not a directory)\)"):
            write_atomic(path, b"new")
    assert is_untouched(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_permission_is_refused_with_a_sentence(file):
    file.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"model\.pt: could not be written \(Permission denied\)"):
            write_atomic(file, b"new")
    finally:
        file.parent.chmod(0o700)
    assert is_untouched(file)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_files_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "x", b"")
        assert os.umask(umask) == umask  # and the umask is as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_text_is_no_formula_for_a_spreadsheet_and_comes_back_as_it_was(tmp_path):
    guarded = ["=1+1", "+x", "-y", "@z", "\tq", "'=a", "''=b", "-1+1"]
    others = ["'c", "-1.5", "+3", "-inf", "plain", "a=b", ""]
    write_csv(tmp_path / "t.csv", [{"=name": text, "n": -2} for text in (*guarded, *others)], ["=name", "n"])
    stored = [line.partition(",")[0] for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert stored == ["'=name", *(f"'{text}" for text in guarded), *others]
    assert [row["=name"] for row in read_csv(tmp_path / "t.csv", ["=name", "n"])] == [*guarded, *others]


def test_a_name_too_long_for_the_disk_is_said_with_its_own_remedy(tmp_path):
    with pytest.raises(OSError, match=r"could not be written \(File name too long\); shorten the name$"):
        write_atomic(tmp_path / ("x" * 256), b"")
    write_atomic(tmp_path / ("x" * 255), b"")
