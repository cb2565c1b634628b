"""A contestant of the race: nnU-Net by its own plan, its schedule fitted to so many minutes of this process.

    nnunet/bin/python scripts/benchmarks/race_nnunet.py TRAINING TEST OUT --minutes 6 --seed 0 --names "a,b"

It runs in nnU-Net's own environment, and imports nothing of this repository. TRAINING and TEST hold `images/` and
`labels/`; OUT gets a label file of the same name for each of TEST's images. What does not serve the last checkpoint is
left out: pictures of the progress, the other checkpoints, and all but one validation batch an epoch.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ALONE = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}  # no processes beside the training
EPOCHS = 20  # the rate changes after each


def plan(training: Path, root: Path, names: list[str]) -> Path:
    """Lay the cases out as nnU-Net wants them, and let it plan and preprocess, once."""
    prepared = root / "preprocessed" / "Dataset501_Race"
    for variable in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{variable}"] = str(root / variable)
    if (prepared / "done").exists():
        return prepared
    raw = root / "raw" / "Dataset501_Race"
    images = sorted((training / "images").iterdir())
    for folder, end in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (raw / f"{folder}Tr").mkdir(parents=True, exist_ok=True)
        for image in images:
            link = raw / f"{folder}Tr" / image.name.replace(".nii.gz", end)
            link.unlink(missing_ok=True)
            link.symlink_to((training / folder / image.name).resolve())
    about = {"channel_names": {"0": "MRI"}, "labels": {name: value for value, name in enumerate(names)}}
    (raw / "dataset.json").write_text(json.dumps({**about, "numTraining": len(images), "file_ending": ".nii.gz"}))
    command = "nnUNetv2_plan_and_preprocess", "-d", "501", "-c", "3d_fullres", "-np", "1", "-npfp", "1"
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)
    (prepared / "done").touch()
    return prepared


def train(prepared: Path, minutes: float) -> Path:
    """Train for `minutes` of CPU time since the process began; give the folder of the last checkpoint."""
    os.environ.update(ALONE)
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    about = json.loads((prepared / "dataset.json").read_text())
    trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", "all", about, torch.device("cpu"))
    trainer.num_epochs, trainer.num_val_iterations_per_epoch = EPOCHS, 1
    trainer._best_ema = float("inf")
    trainer.plot_network_architecture = lambda: None
    start_epoch, step, began, steps = trainer.on_epoch_start, trainer.train_step, [0.0], [0]

    def fit_epoch() -> None:
        """Give the epoch its share of the steps for which there is time."""
        trainer.logger.plot_progress_png = lambda folder: None
        now, left = time.process_time(), EPOCHS - trainer.current_epoch
        if steps[0]:
            each = (now - began[0]) / steps[0]
            trainer.num_iterations_per_epoch = max(1, round((60 * minutes - now) / each / left))
        else:
            trainer.num_iterations_per_epoch, began[0] = 2, now
        start_epoch()

    def count_step(batch: dict) -> dict:
        steps[0] += 1
        return step(batch)

    trainer.on_epoch_start, trainer.train_step = fit_epoch, count_step
    trainer.run_training()
    print(f"{steps[0]} steps, {time.process_time():.0f} s")
    return Path(trainer.output_folder_base)


def segment(trained: Path, test: Path, output_dir: Path) -> None:
    """Segment the test cases with the last checkpoint, as nnU-Net does by default."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(trained), ("all",), "checkpoint_final.pth")
    images = sorted((test / "images").iterdir())
    output_dir.mkdir(parents=True, exist_ok=True)
    out = [str(output_dir / image.name.removesuffix(".nii.gz")) for image in images]
    predictor.predict_from_files_sequential([[str(image)] for image in images], out)


def main() -> None:
    """Read the arguments, and plan, train and segment."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("training", "test", "output_dir"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--names", required=True)
    parser.add_argument("--root", type=Path, help="of nnU-Net's own files, kept for the next seed")
    parser.add_argument("--plan_only", action="store_true")
    given = parser.parse_args()
    prepared = plan(given.training, given.root or given.output_dir / "nnunet", given.names.split(","))
    if given.plan_only:
        return
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(given.seed)
    np.random.seed(given.seed)
    torch.manual_seed(given.seed)
    segment(train(prepared, given.minutes), given.test, given.output_dir)


if __name__ == "__main__":
    main()
