"""Runs one method of the MRI study: trains it, scores it, adds a row to results.jsonl.

    python -m experiments.mri.study --method nirvana --seed 0 --minutes 2

A finished method is not run again; an interrupted training continues from its newest checkpoint.
The data are one file, written by `experiments.mri.prepare`. Test scans are measured, or simulated
on the CPU with fixed seeds, so that all methods get the same ones on any machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.common.program import make_parser
from experiments.common.results import append_row, read_rows
from experiments.mri.methods import CLASSICAL, CODECS, recipe_of, tiny
from experiments.mri.speed import peak_memory, speed
from nirvana.bench.measure import commit
from nirvana.config import to_dict
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs, write_json
from nirvana.mri.classical.bart import bart_pics
from nirvana.mri.classical.grappa import grappa
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import PROPERTIES, Simulation
from nirvana.mri.data.slices import SlicePool
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.methods import classical_method
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.train.config import MriConfig, MriDataSection
from nirvana.mri.train.task import ReconstructionTask
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import init_distributed
from nirvana.train.loop import fit

SAMPLINGS = {
    f"{kind} {acceleration:g}x": Sampling(kind, acceleration, center)  # type: ignore[arg-type]
    for kind in ("equispaced", "random")
    for acceleration, center in ((4.0, 0.08), (8.0, 0.04))
}
CONTRAST_SHIFT = ("tumor_pyr1_T1post",)  # after contrast medium, of which training has nothing
COILS = 8
Method = Callable[[Acquisition], np.ndarray]


def configuration(options: argparse.Namespace, steps: int) -> MriConfig:
    """How a codec is trained."""
    codec, recipe = CODECS[options.method], recipe_of(options.method)
    small = options.tiny
    lr = options.lr or recipe.lr
    plain = Simulation()
    without = {name: getattr(plain, name) for name in options.without}
    data = MriDataSection(
        train=[options.data.name],
        batch_size=2 if small else recipe.batch_size,
        sizes=[(48, 32)] if small else list(recipe.sizes),
        coils=[2] if small else list(recipe.coils),
        masks=["equispaced", "random"],
        accelerations=[4.0, 4.0, 8.0],
        center_fractions=[0.08, 0.08, 0.04],
        points=recipe.points,
    )
    run = RunConfig(
        out=str(options.out / f"{options.method}-{options.seed}"),
        steps=steps,
        initial=str(options.initial or ""),
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
        stage=recipe.stage,
        simulation=replace(recipe.simulation, **without),
        optim=OptimConfig(
            lr=lr,
            min_lr=lr / 100,
            warmup_steps=min(100, steps // 10),
            betas=(0.9, 0.99),
            weight_decay=0.01,
        ),
    )


def affordable_steps(task: ReconstructionTask, seconds: float) -> int:
    """The number of steps that fit into a time, by measuring some. Captured graphs are kept."""
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
    coils = [name for name in archive.files if name.startswith("coils/")]
    coils = coils if options.arrays and recipe_of(options.method).arrays else []
    config = configuration(options, options.steps or 1000)
    with init_distributed(options.device) as processes:
        torch.manual_seed(options.seed)
        pool = SlicePool([torch.from_numpy(archive[name]) for name in names], processes.device)
        arrays = [torch.from_numpy(archive[name]) for name in coils]
        task = ReconstructionTask(config, processes.device, pool, arrays)
        compiled = config.run.compile and processes.device.type == "cuda"
        task.prepare(processes, compiled)
        started = time.perf_counter()
        if not options.steps:
            settled = Path(config.run.out) / "config.json"
            if settled.exists():  # a continued run keeps its length
                steps = json.loads(settled.read_text())["run"]["steps"]
            else:
                steps = affordable_steps(task, 60 * options.minutes)
            config = configuration(options, steps)
            task.config = config
        # Measuring the speed has drawn random numbers: start again from the seed.
        torch.manual_seed(options.seed)
        fit(task, config.optim, config.run, to_dict(config), True, processes)
    model = task.model.eval()
    assert isinstance(model, CodecModel)
    seconds = time.perf_counter() - started
    slices = config.run.steps * task.units_per_step
    backbone = model.backbone
    frozen = 0 if backbone is None else sum(p.numel() for p in backbone.parameters())
    trained = sum(p.numel() for p in model.parameters()) - frozen
    described = to_dict(config)
    for name in ("out", "initial"):  # no paths of this machine
        described["run"][name] = Path(described["run"][name]).name
    described["arrays"] = coils
    facts = {
        "config": described,
        "parameters": {"trained": trained, "frozen": frozen},
        "training": {
            "seconds": seconds,
            "steps": config.run.steps,
            "slices": slices,
            "slices_per_second": slices / seconds,
            "memory_gib": peak_memory(processes.device),
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
        assert scan.target is not None  # simulated from it
        yield group, name, torch.from_numpy(scan.kspace), scan.target, list(SAMPLINGS)
        # Inverted brightness, which no training image has, stands in for an unknown sequence.
        inverted = np.where(volume > 0.05, 1.05 - volume, volume).astype(np.float32)
        scan = simulate_scan(inverted, name, number, settings)
        assert scan.target is not None
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
            inside = head_mask(target)
            for mask_name in masks:
                mask = SAMPLINGS[mask_name].mask(kspace.shape[-1], seed=number)
                started = time.perf_counter()
                image = method(Acquisition(kspace.numpy(), mask.numpy()))
                seconds = (time.perf_counter() - started) / len(kspace)
                row: dict[str, Any] = {"group": group, "volume": name, "mask": mask_name}
                row["seconds_per_slice"] = seconds
                jobs.append((row, workers.submit(score, target, image, inside)))
    return [{**row, **scores.result()} for row, scores in jobs]


def codec_method(codec: CodecModel, batch_size: int = 4) -> Method:
    """A codec as a method: its images of a scan, `batch_size` slices at once."""

    def method(acquisition: Acquisition, /) -> np.ndarray:
        images = codec.images(acquisition, batch_size)
        return torch.cat([each.magnitude for each in images]).numpy()

    return method


def classical(
    name: str, workers: int, settings_of: Callable[[Acquisition], Any] = lambda _: None
) -> Method:
    """The classical method of a name.

    Args:
        name: one of `CLASSICAL`.
        workers: processes of sigpy's and pygrappa's methods.
        settings_of: settings for an acquisition; None are the package's for its acceleration.
    """
    methods: dict[str, Any] = {
        "zero-filled": lambda acquisition, _: acquisition.slices(),
        "sense": partial(sense, workers=workers),
        "bart-sense": lambda acquisition, settings: bart_pics(acquisition, settings or "l2"),
        "grappa": partial(grappa, workers=workers),
        "l1-wavelet": partial(l1_wavelet, workers=workers),
        "bart-l1-wavelet": lambda acquisition, settings: bart_pics(acquisition, settings or "l1"),
    }
    kspace_of = methods[name]
    method = classical_method(lambda acquisition: kspace_of(acquisition, settings_of(acquisition)))
    return lambda acquisition: np.stack([image.magnitude for image in method(acquisition)])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Mean PSNR and SSIM of every method so far."""
    columns = [("unseen people", mask) for mask in SAMPLINGS]
    columns += [(group, next(iter(SAMPLINGS))) for group in ("inverted contrast", "measured head")]
    columns += [("measured knee", next(iter(SAMPLINGS)))]
    table = Table("method", "seed", "parameters", "steps")
    for group, mask in columns:
        table.add_column(f"{mask}\n{group}", justify="right")
    for row in rows:
        cells = [row["method"], str(row["seed"])]
        cells.append(f"{row.get('parameters', {}).get('trained', 0):,}")
        cells.append(str(row.get("training", {}).get("steps", "")))
        for group, mask in columns:
            scans = [x for x in row["volumes"] if (x["group"], x["mask"]) == (group, mask)]
            means = [np.mean([x[key] for x in scans]) for key in ("psnr", "ssim")] if scans else []
            cells.append("{:.2f} {:.3f}".format(*means) if scans else "")
        table.add_row(*cells)
    Console(width=180).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    results = options.results or options.out / "results.jsonl"
    folder = options.out / f"codec-{options.method}-{options.seed}"
    check_outputs({"--results": results, "--out (codec)": folder}, [options.data])
    done = read_rows(results)
    if any((row["method"], row["seed"]) == (options.method, options.seed) for row in done):
        print(f"{options.method}, seed {options.seed}: already done, see {results}")
        return print_table(done)
    try:
        archive = np.load(options.data, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(
            f"{options.data} cannot be read, write it with experiments.mri.prepare: {error}"
        ) from error
    row: dict[str, Any] = {"method": options.method, "seed": options.seed}
    row["commit"] = options.commit or commit() or "unknown"
    row["torch"] = torch.__version__
    if options.method in CLASSICAL:
        method, row["device"] = classical(options.method, options.workers), "cpu"
    else:
        about = folder / "facts.json"
        if not about.exists():
            model, facts = train(options, archive)
            save_codec(model, folder, torch.float16)
            write_json(about, facts)
        if options.train_only:
            print(f"{folder}: trained; run again without --train-only to score it")
            return None
        # The saved codec is scored, in half precision.
        model = load_codec(folder, choose_device(options.device))
        device = next(model.parameters()).device
        row |= json.loads(about.read_text())
        row["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        row["weights_bytes"] = (folder / "model.safetensors").stat().st_size
        side, coils, count = (64, 2, 2) if options.tiny else (320, 16, 8)
        row["speed"] = speed(model, side, coils, count)
        method = codec_method(model, 8)

    started = time.perf_counter()
    row["volumes"] = evaluate(method, archive, 1 if options.tiny else 0)
    row["evaluation_seconds"] = time.perf_counter() - started
    append_row(results, row)
    print_table(read_rows(results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.study", __doc__)
    parser.add_argument("--method", required=True, choices=[*CLASSICAL, *CODECS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("data/mri-study.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/mri-study"), help="folder of runs")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --out")
    parser.add_argument("--steps", type=int, default=0, help="steps of the training")
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="its time, if --steps is not given"
    )
    parser.add_argument("--lr", type=float, help="highest learning rate; default: the method's")
    parser.add_argument("--initial", type=Path, help="folder of the codec to continue from")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=PROPERTIES,
        help="properties of measured scans that the simulation leaves out",
    )
    parser.add_argument(
        "--no-arrays",
        dest="arrays",
        action="store_false",
        help="without coil sensitivities of measured arrays",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--workers", type=int, default=1, help="processes of sense and l1-wavelet")
    parser.add_argument(
        "--train-only", action="store_true", help="stop when the codec is saved; score it later"
    )
    parser.add_argument("--tiny", action="store_true", help="a minute on any machine, for a test")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
