import errno
import pickle

import pytest
import torch

from vdt_workflows import errors
from vdt_workflows.errors import explanation, in_one_line, out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_want_of_memory_names_the_settings_that_help(error):
    wrapped = RuntimeError("Failed to instantiate component")
    wrapped.__cause__ = error
    assert explanation(wrapped).startswith("out of memory (")
    said = out_of_memory(error, ["patch_size", "cache", "seed"])
    assert said.endswith("; try --patch_size with fewer voxels or --cache disk, or a device with more memory")


def test_the_signal_of_a_dead_loader_may_arrive_while_its_error_is_explained(monkeypatch):
    dead, original = (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        errors.is_out_of_memory,
    )
    calls = []

    def interrupted(error):
        calls.append(error)
        if len(calls) == 1:
            raise dead
        return original(error)

    monkeypatch.setattr(errors, "is_out_of_memory", interrupted)
    assert explanation(EOFError()).startswith("a loader process died")
    assert calls[1] is dead


def test_a_librarys_own_file_that_cannot_be_written_is_named():
    error = RuntimeError("Failed to instantiate component")
    error.__cause__ = OSError(30, "Read-only file system", "/data/eval")
    assert explanation(error) == "/data/eval: Read-only file system; free space or choose a folder you may write"
    assert explanation(OSError(2, "No such file or directory", "/x")) is None


def test_an_error_nobody_foresaw_has_no_sentence():
    assert explanation(KeyError("x")) is None
    assert explanation(pickle.UnpicklingError("x")) is None


def test_a_want_of_open_files_is_said_with_what_helps():
    sentence = "a.nii: Too many open files; raise the limit of open files (ulimit -n 4096), or use fewer workers"
    assert explanation(OSError(errno.EMFILE, "Too many open files", "a.nii")) == sentence
    assert explanation(RuntimeError("received 0 items of ancdata")) == sentence.removeprefix("a.nii: ")
    assert explanation(RuntimeError("anything else")) is None


def test_a_name_with_line_feeds_stays_in_one_line():
    assert in_one_line("a\nb\x1b[1m: Größe \udcff") == r"a\nb\x1b[1m: Größe \udcff"
