import numpy as np
import pytest
from benchmarks.inputs import stack_passes, write_scans


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_all_ways_to_read_stacks_give_the_same_ones(tmp_path, interval):
    write_scans(tmp_path, 24, size=12)
    found = {way: list(run()) for way, run in stack_passes(tmp_path, 24, interval).items()}
    count = len(found["in order"]) // 2  # of a series; shuffled, the two take turns
    found["in order"] = [found["in order"][place] for i in range(count) for place in (i, count + i)]
    assert {len(stacks) for stacks in found.values()} == {2 * count}
    assert not np.array_equal(found["plain loop"][0], found["plain loop"][1])
    for stacks in found.values():
        np.testing.assert_allclose(stacks, found["plain loop"], atol=1e-3)
