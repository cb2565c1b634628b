"""Damage files, kill processes and take the disk away, and count what becomes of it.

    python -m tests.faults files --number 2000 --json files.json      images, volumes, tables, checkpoints
    python -m tests.faults kills --times 20 --json kills.json         kill -9 in training, preparation, packaging
    python -m tests.faults places --json places.json                  full disk, read-only disk
    python -m tests.faults processes --json processes.json            a loader process and a rank that die
    python -m tests.faults training --json training.json              a loss of NaN, and too little memory

Each case ends as *survived* (the result is whole), *refused* (one sentence that names the file or the setting),
*unclear* (an error without such a sentence; must be 0) or *lost* (a result that was there is gone or wrong; must be 0).
"""

import fire

from tests.faults.damage import files
from tests.faults.interruptions import kills, places, processes, training

if __name__ == "__main__":
    commands = {"files": files, "kills": kills, "places": places, "processes": processes, "training": training}
    fire.Fire(commands, name="tests.faults", serialize=lambda result: None)  # the table says it
