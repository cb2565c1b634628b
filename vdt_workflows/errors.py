"""Errors as one sentence: those that these packages raise, and those of the machine."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from traceback import walk_tb

_PACKAGES = {"networks", "vdt_transforms", "vdt_workflows"}
REMEDIES = {
    errno.ENAMETOOLONG: "shorten the name",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096), or use fewer workers",
    errno.ENFILE: "too many are open on this machine; end other programs",
}
DISK_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
ANCDATA = "received 0 items of ancdata"  # what a process says that could not open what another one sent
ONEDNN = "could not create a primitive"  # how its convolutions end where memory lacks; they say no more
LESS_MEMORY = {  # settings that lower the need for memory, and how
    "micro_batch": "with fewer samples",
    "batch_size": "with fewer samples",
    "patch_size": "with fewer voxels",
    "checkpointing": "True",
    "cache": "disk",
    "num_workers": "0",
}


def not_written(path: object, error: OSError) -> OSError:
    """Give the error of a file or folder that cannot be written, with what to do."""
    reason = f"{path}: could not be written ({error.strerror}); {remedy(error)}"
    return OSError(error.errno, reason)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError, naming the argument, if its value is none of the choices.

    `networks.resnet3d` has its own, since the networks import nothing of this package and most of it no network.
    """
    if value not in choices:
        *most, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(most)} or {last}, got {value!r}")


def explanation(error: BaseException, settings: Iterable[str] = ()) -> str | None:
    """Give the sentence that says what went wrong, from wherever in the chain of causes these packages raised it.

    Args:
        error: what ended a run.
        settings: names of the settings that the user can change, for advice on memory.

    Returns:
        The sentence, or None for an unforeseen error.
    """
    try:
        return _explanation(error, settings)
    except RuntimeError as dead:  # a loader process died, whose signal torch turns into an error wherever it arrives
        return _explanation(dead, settings)


def _explanation(error: BaseException, settings: Iterable[str]) -> str | None:
    inner: BaseException | None = error
    while inner is not None:
        if is_out_of_memory(inner):
            return out_of_memory(inner, settings)
        if _is_of_a_dead_loader(inner):
            return (
                "a loader process died, most likely for want of memory or of shared memory (/dev/shm);"
                " use fewer --num_workers, or 0"
            )
        if isinstance(inner, ValueError | OSError):
            lines = str(inner).strip().splitlines()
            if lines and "DataLoader worker process" in lines[0]:
                return lines[-1].partition(": ")[2]
            if isinstance(inner, OSError) and inner.errno in REMEDIES and remedy(inner) not in str(inner):
                return f"{inner.filename or 'a file'}: {inner.strerror}; {remedy(inner)}"
            if _raised_here(inner):
                return str(inner)
            if isinstance(inner, OSError) and inner.errno in DISK_ERRORS and inner.filename:  # of a library's own file
                return f"{inner.filename}: {inner.strerror}; {remedy(inner)}"
        if isinstance(inner, RuntimeError) and ANCDATA in str(inner):
            return f"Too many open files; {REMEDIES[errno.EMFILE]}"
        inner = inner.__cause__
    return None


def _is_of_a_dead_loader(error: BaseException) -> bool:
    """Whether torch reports that a loader process died, or reading from one broke off."""
    if isinstance(error, ConnectionError | EOFError):
        frames = walk_tb(error.__traceback__)
        return any(frame.f_globals.get("__name__") == "torch.utils.data.dataloader" for frame, _ in frames)
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device ran out of memory; torch has no type of its own for it on the CPU."""
    texts = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory", ONEDNN)
    phrases = (*texts, "can't start new thread")  # its stack is memory
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and any(phrase in str(error) for phrase in phrases)
    )


def out_of_memory(error: BaseException, settings: Iterable[str]) -> str:
    """Say in a sentence which of the settings take less memory."""
    known = [f"--{name} {value}" for name, value in LESS_MEMORY.items() if name in settings]
    what = next(iter(str(error).strip().splitlines()), "")
    advice = f"try {' or '.join(known)}" if known else "use smaller batches or patches"
    return f"out of memory ({what[:200] or type(error).__name__}); {advice}, or a device with more memory"


def remedy(error: OSError) -> str:
    """Say what helps against an error of the system."""
    return REMEDIES.get(error.errno or 0, "free space or choose a folder you may write")


def in_one_line(text: object) -> str:
    """Write letters that are not printed, such as a line feed in the name of a file, as their codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def root_cause(error: BaseException) -> BaseException:
    """Give the error that began a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _raised_here(error: BaseException) -> bool:
    frames = list(walk_tb(error.__traceback__))
    return bool(frames) and bool({*frames[-1][0].f_globals["__name__"].split(".")} & _PACKAGES)
