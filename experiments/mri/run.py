"""One arm of the MRI study: trains it, scores it, adds a line to results.jsonl.

    python experiments/mri/run.py --arm nirvana --seed 0 --minutes 2

A finished arm is not run again; an interrupted training goes on from its newest checkpoint. The
data are one file, made by prepare.py. Test scans are simulated on the CPU with fixed seeds, or
measured, so every arm meets the same ones on whatever machine.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nirvana.config import to_dict
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.mri.baselines import l1_wavelet, sense, zero_filled
from nirvana.mri.data import SlicePool
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.metrics import head_mask, score
from nirvana.mri.model import CodecModel, load_codec, save_codec
from nirvana.mri.physics import Sampling, calibration_width, fft2c, ifft2c, rss
from nirvana.mri.settings import MriConfig, MriDataSection, StageSection
from nirvana.mri.simulate import Simulation, simulate_scan
from nirvana.mri.toolbox import bart_pics
from nirvana.mri.train import ReconstructionTask
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import init_distributed
from nirvana.train.loop import fit

sys.path.insert(0, str(Path(__file__).parent))
from arms import ARMS, CLASSICAL, tiny

SAMPLINGS = {
    f"{kind} {acceleration:g}x": Sampling(kind, acceleration, center)  # type: ignore[arg-type]
    for kind in ("equispaced", "random")
    for acceleration, center in ((4.0, 0.08), (8.0, 0.04))
}
CONTRAST_SHIFT = ("tumor_pyr1_T1post",)  # after contrast medium, of which training has nothing
COILS = 8
Method = Callable[[Tensor, Tensor], np.ndarray]


def configuration(options: argparse.Namespace, steps: int) -> MriConfig:
    """Training of an arm: the same for all but for the codec."""
    codec = ARMS[options.arm]
    small = options.tiny
    data = MriDataSection(
        train=[options.data.name],
        batch_size=2 if small else 16,
        sizes=[(48, 32)] if small else [(160, 128), (224, 192)],
        coils=[2] if small else [8, 8, 8, 4, 1],
        masks=["equispaced", "random"],
        accelerations=[4.0, 4.0, 8.0],
        center_fractions=[0.08, 0.08, 0.04],
    )
    run = RunConfig(
        out=str(options.out / f"{options.arm}-{options.seed}"),
        steps=steps,
        seed=options.seed,
        device=options.device,
        compile=not options.no_graphs,
        log_interval=min(100, steps),
        validation_interval=0,
        checkpoint_interval=max(500, steps // 3),
        keep_checkpoints=1,
    )
    return MriConfig(
        data=data,
        run=run,
        codec=tiny(codec) if small else codec,
        stage=StageSection(l1_weight=4.0),
        simulation=Simulation(gamma=(0.6, 1.6)),
        optim=OptimConfig(
            lr=options.lr,
            min_lr=options.lr / 100,
            warmup_steps=min(100, steps // 10),
            betas=(0.9, 0.99),
            weight_decay=0.01,
        ),
    )


def affordable_steps(task: ReconstructionTask, seconds: float) -> int:
    """How many steps fit in, by the time that some take. Graphs captured on the way are kept."""
    started = time.perf_counter()
    cuda = task.device.type == "cuda"
    task.model.train()
    batches = [task.batch(step, 0) for step in range(24 if cuda else 2)]
    for _ in range(2):  # the first round captures
        begun = time.perf_counter()
        for batch in batches:
            with torch.autocast(task.device.type, torch.bfloat16, enabled=cuda):
                loss, _ = task.loss(batch)
            loss.backward()
            task.model.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        each = (time.perf_counter() - begun) / len(batches)
    begun = time.perf_counter()
    for step in range(len(batches)):
        task.batch(step, 0)
    if cuda:
        torch.cuda.synchronize()
    each += (time.perf_counter() - begun) / len(batches) + (0.004 if cuda else 0.0)
    left = seconds - (time.perf_counter() - started)
    return max(20, int(left / each))


def train(options: argparse.Namespace, archive: Any) -> tuple[CodecModel, dict[str, Any]]:
    """The trained codec, and facts about its training."""
    names = [name for name in archive.files if name.startswith("train/")]
    config = configuration(options, options.steps or 1000)
    with init_distributed(options.device) as world:
        torch.manual_seed(options.seed)
        pool = SlicePool([torch.from_numpy(archive[name]) for name in names], world.device)
        task = ReconstructionTask(config, world.device, pool)
        compiled = config.run.compile and world.device.type == "cuda"
        task.prepare(world, compiled)
        started = time.perf_counter()
        if not options.steps:
            settled = Path(config.run.out) / "config.json"
            if settled.exists():  # a run that goes on keeps its length
                steps = json.loads(settled.read_text())["run"]["steps"]
            else:
                steps = affordable_steps(task, 60 * options.minutes)
            config = configuration(options, steps)
            task.config = config
        # A new arm starts from its seed, whatever was measured before.
        torch.manual_seed(options.seed)
        fit(task, config.optim, config.run, to_dict(config), True, world)
    model = task.model.eval()
    assert isinstance(model, CodecModel)
    seconds = time.perf_counter() - started
    slices = config.run.steps * task.units_per_step
    backbone = model.backbone
    frozen = 0 if backbone is None else sum(p.numel() for p in backbone.parameters())
    trained = sum(p.numel() for p in model.parameters()) - frozen
    described = to_dict(config)
    described["run"]["out"] = Path(config.run.out).name  # where it lay is nobody's business
    facts = {
        "config": described,
        "parameters": {"trained": trained, "frozen": frozen},
        "training": {
            "seconds": seconds,
            "steps": config.run.steps,
            "slices": slices,
            "slices_per_second": slices / seconds,
            "memory_gib": peak_memory(world.device),
        },
    }
    return model, facts


def scans(archive: Any, only: int) -> Iterator[tuple[str, str, Tensor, np.ndarray, list[str]]]:
    """Group, name, full k-space, target and names of masks of every test scan."""
    volumes = [name for name in archive.files if name.startswith("test/")][: only or None]
    for number, full_name in enumerate(volumes):
        name = full_name.removeprefix("test/")
        volume = archive[full_name].astype(np.float32) / 255
        settings = Simulation(num_coils=COILS)
        group = "contrast medium" if name in CONTRAST_SHIFT else "unseen people"
        scan = simulate_scan(volume, name, number, settings)
        yield group, name, torch.from_numpy(scan.kspace), scan.target, list(SAMPLINGS)
        # Dark where it was bright, as no training image is: a stand-in for an unknown sequence.
        inverted = np.where(volume > 0.05, 1.05 - volume, volume).astype(np.float32)
        scan = simulate_scan(inverted, name, number, settings)
        first = next(iter(SAMPLINGS))
        yield "inverted contrast", name, torch.from_numpy(scan.kspace), scan.target, [first]
    for full_name in [name for name in archive.files if name.startswith("kspace/")]:
        kspace = torch.from_numpy(archive[full_name])
        name = full_name.removeprefix("kspace/")
        group = "measured knee" if "knee" in name else "measured head"
        yield group, name, kspace, rss(ifft2c(kspace)).numpy(), list(SAMPLINGS)


def evaluate(method: Method, archive: Any, only: int) -> list[dict[str, Any]]:
    """A row of scores for every scan and mask."""
    jobs = []
    with ThreadPoolExecutor(8) as workers:
        for number, (group, name, kspace, target, masks) in enumerate(scans(archive, only)):
            head = head_mask(target)
            for mask_name in masks:
                mask = SAMPLINGS[mask_name].mask(kspace.shape[-1], seed=number)
                started = time.perf_counter()
                image = method(kspace * mask, mask)
                seconds = (time.perf_counter() - started) / len(kspace)
                row = {"group": group, "volume": name, "mask": mask_name}
                row["seconds_per_slice"] = seconds
                jobs.append((row, workers.submit(score, target, image, head)))
    return [{**row, **scores.result()} for row, scores in jobs]


def speed(model: CodecModel, device: torch.device, small: bool) -> dict[str, float]:
    """Seconds and memory of slices of 320 x 320 and 16 coils, after a warm-up: of one alone, and of
    each of the eight of a volume."""
    side, coils, count = (64, 2, 2) if small else (320, 16, 8)
    kspace = fft2c(torch.rand(count, coils, side, side).to(torch.complex64))
    mask = Sampling().mask(side, 0)
    kspace *= mask

    def seconds(volume: Tensor) -> float:
        times = []
        for _ in range(4):
            started = time.perf_counter()
            model.reconstruct(volume, mask, batch_size=count)
            times.append(time.perf_counter() - started)
        return float(np.median(times[1:]))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "side": side,
        "coils": coils,
        "seconds": seconds(kspace[:1]),
        "seconds_in_volume": seconds(kspace) / count,
        "memory_gib": peak_memory(device),
    }


def classical(arm: str) -> Method:
    """The method of a name."""
    if arm == "zero-filled":
        return zero_filled
    if arm.startswith("bart-"):
        norm: Any = "l2" if arm == "bart-sense" else "l1"
        return lambda kspace, mask: bart_pics(kspace, mask, calibration_width(mask), norm)
    solve = sense if arm == "sense" else l1_wavelet
    return lambda kspace, mask: solve(
        kspace, mask, calibration_width(mask), workers=options.workers
    )


def peak_memory(device: torch.device) -> float | None:
    """GiB of a GPU that tensors took at most; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def commit() -> str:
    """The commit of the code, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def finished(results: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def append(results: Path, line: dict[str, Any]) -> None:
    """Adds a line whole, also when several arms end at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(results.with_name(f".{results.name}.lock"))
    with lock, open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def show(lines: list[dict[str, Any]]) -> None:
    """Mean PSNR and SSIM of every arm so far."""
    columns = [("unseen people", mask) for mask in SAMPLINGS]
    columns += [(group, next(iter(SAMPLINGS))) for group in ("inverted contrast", "measured head")]
    columns += [("measured knee", next(iter(SAMPLINGS)))]
    table = Table("arm", "seed", "parameters", "steps")
    for group, mask in columns:
        table.add_column(f"{mask}\n{group}", justify="right")
    for line in lines:
        cells = [line["arm"], str(line["seed"])]
        cells.append(f"{line.get('parameters', {}).get('trained', 0):,}")
        cells.append(str(line.get("training", {}).get("steps", "")))
        for group, mask in columns:
            rows = [r for r in line["volumes"] if (r["group"], r["mask"]) == (group, mask)]
            means = (
                [np.mean([row[key] for row in rows]) for key in ("psnr", "ssim")] if rows else []
            )
            cells.append("{:.2f} {:.3f}".format(*means) if rows else "")
        table.add_row(*cells)
    Console(width=180).print(table)


def main() -> None:
    results = options.results or options.out / "results.jsonl"
    folder = options.out / f"codec-{options.arm}-{options.seed}"
    check_outputs({"--results": results, "--out (codec)": folder}, [options.data])
    done = finished(results)
    if any((line["arm"], line["seed"]) == (options.arm, options.seed) for line in done):
        print(f"{options.arm}, seed {options.seed}: done already, see {results}")
        return show(done)
    try:
        archive = np.load(options.data, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(
            f"{options.data} cannot be read, make it with prepare.py: {error}"
        ) from error
    line: dict[str, Any] = {"arm": options.arm, "seed": options.seed}
    line["commit"] = options.commit or commit()
    line["torch"] = torch.__version__
    if options.arm in CLASSICAL:
        method, line["device"] = classical(options.arm), "cpu"
    else:
        model, facts = train(options, archive)
        save_codec(model, folder, torch.float16)
        device = next(model.parameters()).device
        # What is scored is what was saved, half precision and all.
        model = load_codec(folder, device)
        line |= facts
        line["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        line["weights_bytes"] = (folder / "model.safetensors").stat().st_size
        line["speed"] = speed(model, device, options.tiny)

        def method(kspace: Tensor, mask: Tensor) -> np.ndarray:
            return model.reconstruct(kspace, mask, batch_size=8).numpy()

    started = time.perf_counter()
    line["volumes"] = evaluate(method, archive, 1 if options.tiny else 0)
    line["evaluation_seconds"] = time.perf_counter() - started
    append(results, line)
    show(finished(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", required=True, choices=[*CLASSICAL, *ARMS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/mri-study.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/mri-study"), help="folder of runs")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --out")
    parser.add_argument("--steps", type=int, default=0, help="steps of the training")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="or its time; --steps goes first"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="", help="of the code, where git does not tell it")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--workers", type=int, default=1, help="of sense and l1-wavelet")
    parser.add_argument(
        "--tiny", action="store_true", help="a minute on any machine, to try it out"
    )
    options = parser.parse_args()
    script(main)
