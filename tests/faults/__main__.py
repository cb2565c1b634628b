"""Damage files, kill processes and take the disk away, and count what becomes of it.

    python -m tests.faults files --number 2000 --json files.json      images, volumes, tables, weights, caches
    python -m tests.faults kills --times 20 --json kills.json         kills in training, preparation, packaging
    python -m tests.faults places --json places.json                  full disk, read-only disk
    python -m tests.faults processes --json processes.json            a loader process and a rank that die
    python -m tests.faults training --json training.json              a loss of NaN, and too little memory

Each case ends as *survived* (the result is whole: the values of an oracle), *undetectable* (other values, which
everything that reads the format reads without finding fault: a voxel of a file without checksums, a digit in a table),
*named* (the other files are used, and the log says which was left out),
*refused* (one sentence that names the file or the setting), *unclear* (an error without such a sentence; must be 0) or
*lost* (a wrong result without a word, or a result that was there and is gone or cut short; must be 0).
"""

import fire

from tests.faults.damage import files
from tests.faults.interruptions import kills, places, processes, training

COMMANDS = {"files": files, "kills": kills, "places": places, "processes": processes, "training": training}

if __name__ == "__main__":
    fire.Fire(COMMANDS, name="tests.faults", serialize=lambda result: None)  # the table says it
