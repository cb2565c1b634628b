import os
import signal

import pytest

from vdt_workflows.parallel import free_memory, run_parallel


def square(number):
    if number < 0:
        raise ValueError(f"number must be 0 or more, got {number}")
    return os.getpid(), number * number


def kill(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_task_gives_its_result_once(workers):
    found = list(run_parallel(square, range(20), workers=workers))
    assert sorted(result for _, result in found) == [n * n for n in range(20)]
    assert (os.getpid() in {pid for pid, _ in found}) == (workers == 1)
    assert list(run_parallel(square, [], workers=workers)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_as_it_is(workers):
    with pytest.raises(ValueError, match="number must be 0 or more, got -1"):
        list(run_parallel(square, [1, -1, 2], workers=workers))


def test_a_killed_worker_is_told():
    with pytest.raises(OSError, match="a worker process was killed, most likely for want of memory; use fewer workers"):
        list(run_parallel(kill, [1, 2], workers=2))


def test_free_memory_is_that_of_the_system_or_of_its_container():
    assert 1e6 < free_memory() < float("inf") or not os.path.exists("/proc/meminfo")
