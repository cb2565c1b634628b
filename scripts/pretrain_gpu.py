"""Pre-train encoders on one GPU that holds all pictures as uint8, where a data loader would be what one waits for.

    python scripts/pretrain_gpu.py pack DIR_OR_ZIP pictures.pt   # decode once; packs of equal classes may be joined
    python scripts/pretrain_gpu.py train a.pt,b.pt --val val.pt --runs scripts/encoders.json --output out --seconds 400

What is trained is the bundle imagenet_vdt_pretraining's network, in bfloat16 and as a CUDA graph; its crops, colours
and slices are drawn on the GPU, for whole batches. Every draw is a function of (seed, step), so that a killed run goes
on from its `resume.pt` as if nothing had happened. On a machine without GPU everything runs the same, slowly: try it
there with `--epochs 1` and few pictures.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from gpu_pictures import Pictures, Run, crop, load, pack, to_volumes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from networks import ResNet2DClassifier, ResNet3DClassifier

PEAK = 989e12  # bfloat16 FLOP/s of an H100 or H200 without sparsity, by its data sheet
logger = logging.getLogger("pretrain_gpu")
RATES = (0.15, 0.4, 1.0)  # per 512 pictures
RATE_EPOCHS = 3
SAVE_EVERY = 60  # seconds


def build(run: Run, num_classes: int, device: torch.device) -> nn.Module:
    """Make the bundle's network for one run."""
    torch.manual_seed(run.seed)
    options: dict[str, Any] = dict(base_channels=run.width, norm=run.norm, zero_init_residual=True)
    network = (ResNet2DClassifier if run.twin else ResNet3DClassifier)(18, num_classes, **options)
    return network.to(device).to(memory_format=memory_format(run))


def memory_format(run: Run) -> torch.memory_format:
    """The order of the axes in memory."""
    last = torch.channels_last if run.twin else torch.channels_last_3d
    return last if run.channels_last else torch.contiguous_format


class Step:
    """Forward and backward of one batch, in bfloat16; on a GPU captured once as a graph and replayed."""

    def __init__(self, network: nn.Module, run: Run, batch: int, side: int, device: torch.device) -> None:
        self.network, self.device = network, device
        shape = (batch, 3, side, side) if run.twin else (batch, 1, run.slices, side, side)
        self.x = torch.randn(shape, device=device).contiguous(memory_format=memory_format(run))
        self.y = torch.zeros(batch, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            state = {name: value.clone() for name, value in network.state_dict().items()}
            trial = torch.cuda.Stream()
            trial.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(trial):
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(trial)
            network.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self.loss = self._run()
                self.graph = graph
            except RuntimeError as error:
                logger.warning("no graph, each kernel by itself: %s", str(error).splitlines()[0])
            network.load_state_dict(state)  # without what the trials did to the running statistics

    def _run(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            logits = self.network(self.x)
        loss = F.cross_entropy(logits.float(), self.y, label_smoothing=0.1)
        loss.backward()
        return loss.detach()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Leave the gradients in the parameters, and give the loss."""
        self.x.copy_(x)
        self.y.copy_(y)
        if self.graph is None:
            self.network.zero_grad(set_to_none=True)
            return self._run()
        self.graph.replay()
        return self.loss


def optimise(network: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum; norms and biases do not decay."""
    plain = [p for p in network.parameters() if p.dim() < 2]
    decayed = [p for p in network.parameters() if p.dim() >= 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def rate_at(step: int, steps: int) -> float:
    """Warm up over a twentieth of the schedule, then half a cosine to zero; as a part of the peak."""
    warm = max(steps // 20, 1)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


@torch.no_grad()
def evaluate(network: nn.Module, run: Run, pictures: Pictures) -> dict[str, float]:
    """Top-1 and top-5 of the whole pictures, and of three slices where the run has more."""
    network.eval()
    kinds = {"": run, **({"3 slices ": Run("", slices=3, twin=run.twin, grey=run.grey)} if run.slices != 3 else {})}
    result: dict[str, float] = {}
    for kind, form in kinds.items():
        hits = torch.zeros(2, device=pictures.labels.device)
        for start in range(0, len(pictures), 500):
            part = slice(start, start + 500)
            with torch.autocast(pictures.images.device.type, torch.bfloat16):
                logits = network(to_volumes(pictures.images[part], form))
            best = logits.topk(min(5, logits.shape[1])).indices
            found = best == pictures.labels[part, None]
            hits += torch.stack([found[:, 0].sum(), found.sum()])
        top1, top5 = (hits / len(pictures)).tolist()
        result |= {f"{kind}top1": round(top1, 4), f"{kind}top5": round(top5, 4)}
    network.train()
    return result


def train_run(
    run: Run, pictures: Pictures, val: Pictures, batch: int, rate: float, epochs: int, folder: Path | None, until: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one encoder; where there is a folder, write what a killed run needs, once a minute.

    `until` is a time (`time.time()`) at which it is given up.
    """
    device = pictures.images.device
    classes = len(pictures.classes)
    labels = pictures.labels
    if run.shuffle_labels:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.seed)).to(device)]
    network = build(run, classes, device)
    steps = epochs * len(pictures) // batch
    side = pictures.images.shape[-1]
    optimizer = optimise(network, rate, run.weight_decay)
    step, started = 0, time.time()
    resume = folder / f"{run.name}_resume.pt" if folder else None
    step_graph = Step(network, run, batch, side, device)
    if resume is not None and resume.exists():
        state = torch.load(resume, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    saved, log, order = time.time(), [], torch.empty(0)
    epoch = -1
    while step < steps:
        if step * batch // len(pictures) != epoch:
            epoch = step * batch // len(pictures)
            order = torch.cat([
                torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1000 * run.seed + e))
                for e in (epoch, epoch + 1)
            ]).to(device)  # fmt: skip
        chosen = order[step * batch - epoch * len(pictures) :][:batch]
        draw = torch.Generator(device).manual_seed(run.seed * 1_000_003 + step)
        x = to_volumes(crop(pictures.images[chosen], draw, (0.25, 1.0)), run, draw)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        loss = step_graph(x, labels[chosen])
        optimizer.step()
        step += 1
        if resume is not None and time.time() - saved > SAVE_EVERY:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, resume.with_suffix(".part"))
            resume.with_suffix(".part").replace(resume)  # a kill while writing leaves the one before
            saved = time.time()
        if (folder and step % max(steps // 8, 1) == 0) or step == steps:
            row = {"step": step, "epoch": round(step * batch / len(pictures), 2), "loss": round(float(loss), 4)}
            row |= {"seconds": round(time.time() - started, 1), **evaluate(network, run, val)}
            log.append(row)
            if folder:
                logger.info("%s %s", run.name, json.dumps(row))
            if not math.isfinite(row["loss"]) or time.time() > until:
                break
    return network, {"steps": step, "of": steps, "log": log, "seconds": round(time.time() - started, 1)}


def measure(run: Run, pictures: Pictures, batch: int, steps: int) -> dict[str, float]:
    """Pictures a second of whole steps, FLOP utilisation and memory; `run` gets the faster order in memory."""
    device = pictures.images.device
    side = pictures.images.shape[-1]
    results = {}
    for last in (False, True) if run.channels_last is None else (run.channels_last,):
        run.channels_last = last
        network = build(run, 200, device)
        with FlopCounterMode(display=False) as counter:
            network(to_volumes(pictures.images[:2], run)).sum().backward()
        flop = counter.get_total_flops() / 2
        network.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step_graph, optimizer = Step(network, run, batch, side, device), optimise(network, 0.01, 0.0)
        began = 0.0
        for count in range(steps + 3):
            if count == 3:
                synchronize(device)
                began = time.time()
            draw = torch.Generator(device).manual_seed(count)
            chosen = torch.randint(len(pictures), (batch,), device=device, generator=draw)
            x = to_volumes(crop(pictures.images[chosen], draw, (0.25, 1.0)), run, draw)
            step_graph(x, pictures.labels[chosen] * 0)
            optimizer.step()
        synchronize(device)
        speed = batch * steps / (time.time() - began)
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        results[run.channels_last] = {"img/s": round(speed), "GFLOP/img": round(flop / 1e9, 3),
                                      "MFU": round(flop * speed / PEAK, 4), "GiB": round(memory, 2)}  # fmt: skip
        logger.info("%s, channels last %s: %s", run.name, run.channels_last, json.dumps(results[run.channels_last]))
        del step_graph, network, optimizer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    run.channels_last = max(results, key=lambda order: results[order]["img/s"])
    return results[run.channels_last]


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(
    pictures: str,
    val: str,
    runs: str,
    output: str,
    *,
    epochs: int = 40,
    seconds: float = 0,
    batch: int = 512,
) -> None:
    """Train the encoders of a JSON list of runs; write fp16 weights, and `log.json` after each.

    Args:
        pictures: packs, joined by commas.
        val: pack of the validation pictures.
        runs: JSON list of the arguments of `Run`.
        output: folder.
        epochs: of a whole schedule.
        seconds: fit the epochs to this time, by the measured speed of each run; 0 takes them as they are.
        batch: pictures of a step.
    """
    began = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_pictures = load(pictures, device)
    val_pictures = load(val, device, train_pictures.classes)
    chosen = [Run(**options) for options in json.loads(Path(runs).read_text())]
    for run in chosen:
        run.notes = measure(run, train_pictures, batch, 20 if device.type == "cuda" else 1)
    factor = fit(chosen, epochs, len(train_pictures), seconds - (time.time() - began)) if seconds else 1.0
    until = began + seconds if seconds else math.inf
    rates: dict[tuple[str, bool], float] = {}
    report: list[dict[str, Any]] = []
    for run in chosen:
        run.epochs = max(round(run.share * epochs * factor), 1)
        kind = (run.norm, run.twin)
        if run.rate is None and kind not in rates:
            rates[kind] = choose_rate(run, train_pictures, val_pictures, batch, until)
        rate = rates[kind] if run.rate is None else run.rate
        peak = rate * batch / 512
        network, result = train_run(run, train_pictures, val_pictures, batch, peak, run.epochs, folder, until)
        state = {
            name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
        }
        torch.save({name: value.cpu().contiguous() for name, value in state.items()}, folder / f"{run.name}.pt")
        (folder / f"{run.name}_resume.pt").unlink(missing_ok=True)
        report.append({**vars(run), "used_rate": rate, "batch": batch, "pictures": len(train_pictures), **result})
        (folder / "log.json").write_text(json.dumps(report, indent=1))
        del network


def fit(runs: list[Run], epochs: int, pictures: int, seconds: float) -> float:
    """Give what the epochs are multiplied with, so that all runs and the choice of their rates end in that time."""
    kinds = {(run.norm, run.twin) for run in runs if run.rate is None}
    trainings = len(runs) + len(RATES) * len(kinds)
    total = sum(run.share * epochs * pictures / run.notes["img/s"] for run in runs)
    total += sum(
        RATE_EPOCHS * len(RATES) * pictures / next(r.notes["img/s"] for r in runs if (r.norm, r.twin) == kind)
        for kind in kinds
    )
    spare = seconds - 3 * trainings  # to make and measure the networks
    factor = min(spare / (1.08 * total), 1.5)
    logger.info("%.0f s for %d epochs, %.0f s left: times %.3f", total, epochs, spare, factor)
    return factor


def choose_rate(run: Run, pictures: Pictures, val: Pictures, batch: int, until: float) -> float:
    """Give the rate of the best top-1 after a short schedule, for all runs of the same norm."""
    tried = {}
    for rate in RATES:
        _, result = train_run(run, pictures, val, batch, rate * batch / 512, RATE_EPOCHS, None, until)
        tried[rate] = result["log"][-1]["top1"] if result["log"] else 0.0
    run.notes["rates"] = tried
    logger.info("%s: top-1 by rate %s", run.name, tried)
    return max(tried, key=lambda rate: tried[rate])


if __name__ == "__main__":
    import fire

    fire.Fire({"pack": pack, "train": train})
