"""Training a codec on its frozen backbone, on simulated acquisitions of magnitude volumes."""

import glob
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses.ssim_loss import SSIMLoss
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.mri.baselines import zero_filled
from nirvana.mri.codec import CodecConfig
from nirvana.mri.data import MriBatch, SlicePool, simulate_batch
from nirvana.mri.io import read_volume
from nirvana.mri.metrics import score
from nirvana.mri.model import CodecModel, load_backbone, save_codec
from nirvana.mri.physics import MaskKind, Sampling
from nirvana.mri.simulate import Simulation, simulate_scan
from nirvana.train.config import OptimConfig, RunConfig, load_config, require, to_dict
from nirvana.train.loop import Outcome, fit
from nirvana.train.task import Task
from nirvana.train.world import World, join


@dataclass(frozen=True)
class MriDataSection:
    """[data]: volumes, and how they are scanned. Every batch draws one of each list."""

    train: list[str]  # magnitude volumes (NIfTI, npy); patterns with * are expanded
    valid: list[str] = field(default_factory=list)  # the same, scored during the training
    batch_size: int = 8  # slices in a micro batch
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(128, 96), (192, 160)])  # H, W
    coils: list[int] = field(default_factory=lambda: [4, 8, 12])  # number of receive coils
    masks: list[MaskKind] = field(default_factory=lambda: ["equispaced", "random"])
    accelerations: list[float] = field(default_factory=lambda: [4.0, 8.0])
    center_fractions: list[float] = field(default_factory=lambda: [0.08, 0.04])  # one for each
    valid_slices: int = 8  # slices, evenly spread, of every validation volume
    ssim_weight: float = 1.0  # of 1 - SSIM in the loss
    l1_weight: float = 1.0  # of the mean absolute error in the loss

    def __post_init__(self) -> None:
        for name in ("train", "sizes", "coils", "masks", "accelerations"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "not empty")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(
            len(self.center_fractions) == len(self.accelerations),
            "data.center_fractions",
            self.center_fractions,
            f"{len(self.accelerations)} numbers, one for each acceleration",
        )


@dataclass(frozen=True)
class MriConfig:
    """All of a codec's training."""

    data: MriDataSection
    run: RunConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    simulation: Simulation = field(default_factory=Simulation)
    optim: OptimConfig = field(default_factory=OptimConfig)


class ReconstructionTask(Task):
    """Undersampled k-space to the RSS image, 1 - SSIM and L1.

    Args:
        config: of the whole run.
        device: where the model lies and scans are simulated.

    Raises:
        InputError: for volumes that cannot be read or a backbone that does not exist.
    """

    unit = "slices"

    def __init__(self, config: MriConfig, device: torch.device):
        self.config = config
        self.valid = [_validation_scan(path, config) for path in expand(config.data.valid)]
        self.files = expand(config.data.train)
        self.pool = SlicePool(self.files, device)
        backbone = load_backbone(config.codec.backbone)
        self.model: nn.Module = CodecModel(config.codec, backbone).to(device)
        self.ssim = SSIMLoss(spatial_dims=2, data_range=1.0, kernel_type="uniform", win_size=7)
        self.graphs: dict[tuple[int, ...], Callable[..., Tensor]] | None = None
        self.units_per_step = config.data.batch_size * config.optim.accumulation

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Every parameter but the backbone's."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def position(self, step: int) -> dict[str, Any]:
        """The volumes, in their order, and the step."""
        return {"step": step, "volumes": [file.name for file in self.files]}

    def batch(self, step: int, micro: int) -> MriBatch:
        """Slices scanned as seed, step and micro batch say."""
        data, accumulation = self.config.data, self.config.optim.accumulation
        generator = torch.Generator().manual_seed(
            (self.config.run.seed << 40) + step * accumulation + micro
        )

        def draw(options: list) -> int:
            return int(torch.randint(len(options), (), generator=generator).item())

        which = draw(data.accelerations)
        sampling = Sampling(
            data.masks[draw(data.masks)], data.accelerations[which], data.center_fractions[which]
        )
        return simulate_batch(
            self.pool,
            data.batch_size,
            data.sizes[draw(data.sizes)],
            data.coils[draw(data.coils)],
            sampling,
            self.config.simulation,
            generator,
        )

    def loss(self, batch: MriBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """1 - SSIM + L1."""
        data = self.config.data
        inputs = (batch.kspace, batch.mask, batch.calibration, batch.scale)
        image = self._callable(inputs)(*inputs)
        with torch.autocast(image.device.type, enabled=False):
            scale = batch.scale[:, None, None]
            image, target = image.float() / scale, batch.target / scale
            dissimilarity = self.ssim(image[:, None], target[:, None])
            l1 = F.l1_loss(image, target)
        loss = data.ssim_weight * dissimilarity + data.l1_weight * l1
        return loss, {"ssim": 1 - dissimilarity.detach(), "l1": l1.detach()}

    def validate(self) -> dict[str, float]:
        """Mean PSNR and SSIM over the validation volumes, beside the zero-filled images'."""
        rows: dict[str, list[float]] = {}
        for kspace, target, mask in self.valid:
            masked = kspace * mask
            images = {
                "": self.model.reconstruct(masked, mask).numpy(),  # type: ignore[operator]
                "zero_filled_": zero_filled(masked.numpy(), mask.numpy()),
            }
            for prefix, image in images.items():
                scores = score(target, image)
                for name in ("psnr", "ssim"):
                    rows.setdefault(prefix + name, []).append(scores[name])
        return {name: float(np.mean(values)) for name, values in rows.items()}

    def prepare(self, world: World, compiled: bool) -> None:
        """Compiled: captures a CUDA graph for every shape of batch when it first comes, for a step
        is thousands of small kernels, and launching them takes longer than running them.

        Raises:
            InputError: with accumulation, where replays would overwrite kept gradients; for more
                than one process.
        """
        super().prepare(world, compiled)
        if not compiled:
            return
        if self.config.optim.accumulation > 1:
            raise InputError("run.compile needs optim.accumulation = 1 here; set one or the other")
        self.graphs = {}

    def _callable(self, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        if self.graphs is None:
            return self.model
        shape = tuple(inputs[0].shape)
        if shape not in self.graphs:
            bf16 = torch.is_autocast_enabled("cuda")
            # A cast weight that autocast kept would be one graph's memory in another graph.
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
                self.graphs[shape] = torch.cuda.make_graphed_callables(  # type: ignore[assignment]
                    _Captured(self.model), tuple(x.clone() for x in inputs)
                )
        return self.graphs[shape]

    def export(self, folder: Path) -> None:
        """Writes the codec, without its backbone."""
        save_codec(self.model, folder, self.config.run.export_dtype)  # type: ignore[arg-type]


class _Captured(nn.Module):
    """A module of its own for each graph, because capturing replaces the module's forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)


def train(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
) -> Outcome:
    """Trains a codec as a configuration file (`MriConfig`) says; see `nirvana.train.language`.

    Raises:
        InputError: for whatever is wrong in the configuration, the volumes or the run's folder.
    """
    config = load_config(MriConfig, config_path, overrides)
    with join(config.run.device) as world:
        torch.manual_seed(config.run.seed)
        task = ReconstructionTask(config, world.device)
        return fit(
            task,
            config.optim,
            config.run,
            to_dict(config),
            resume,
            world,
            accept_changes=accept_changes,
        )


def expand(patterns: list[str]) -> list[Path]:
    """The files that the patterns name, sorted within a pattern.

    Raises:
        InputError: for a pattern that names nothing.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise InputError(f"no volume matches {pattern!r}")
        files += [Path(file) for file in found]
    return files


def _validation_scan(path: Path, config: MriConfig) -> tuple[Tensor, np.ndarray, Tensor]:
    """K-space, target and mask of evenly spread slices, simulated once with a fixed seed."""
    data = config.data
    volume = read_volume(path)
    middle = volume[len(volume) // 5 : -(len(volume) // 5) or None]
    chosen = np.linspace(0, len(middle) - 1, min(data.valid_slices, len(middle))).round()
    scan = simulate_scan(middle[chosen.astype(int)], path.name, 0, config.simulation)
    assert scan.target is not None
    sampling = Sampling(data.masks[0], data.accelerations[0], data.center_fractions[0])
    mask = sampling.mask(scan.kspace.shape[-1], seed=0)
    return torch.from_numpy(scan.kspace), scan.target, mask
