"""Trains a codec on its frozen backbone, on simulated or measured fully sampled scans."""

import glob
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from nirvana.config import load_config, to_dict
from nirvana.cuda_graphs import TrainingGraphs
from nirvana.data.tokenizer import load_tokenizer
from nirvana.errors import InputError
from nirvana.files import existing_file
from nirvana.model.backbone import backbone_folder, fingerprint, load_backbone
from nirvana.model.specialist import own_state_dict
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.data.batch import (
    HeldBackBatch,
    MriBatch,
    Samplings,
    choice,
    micro_batch_generator,
    over_coils,
)
from nirvana.mri.data.fastmri import SUFFIXES, ScanPool
from nirvana.mri.data.report_texts import Reports, read_reports
from nirvana.mri.data.scans import is_full, target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.slice_array import Kspace
from nirvana.mri.data.slices import SlicePool, simulate_batch
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan, is_volume, read_scan, read_volume
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.model.checkpoint import load_codec, save_codec
from nirvana.mri.model.codec import CodecModel, InitialMaps, in_encoder
from nirvana.mri.model.report_tokens import ReportTokens, report_entropy
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.train.config import MriConfig
from nirvana.mri.train.loss import ssim
from nirvana.train import checkpoint
from nirvana.train.distributed import ProcessContext
from nirvana.train.loop import Outcome, check_run, fit_configured
from nirvana.train.parallel import shard
from nirvana.train.task import Task


class ReconstructionTask(Task):
    """Undersampled k-space to the RSS image, 1 - SSIM and L1, and to reports, cross-entropy.

    Args:
        config: of the whole run.
        device: where the model lies and scans are simulated.
        pool: training slices, of which `data.train` then only holds the names; None reads the files
            of `data.train`.
        arrays: measured coil sensitivities; None reads the files of `data.coil_maps`.

    Raises:
        InputError: a volume cannot be read, the backbone does not exist, or the initial codec has
            another configuration.
    """

    unit = "slices"

    def __init__(
        self,
        config: MriConfig,
        device: torch.device,
        pool: SlicePool | ScanPool | None = None,
        arrays: Sequence[Tensor] | None = None,
    ):
        data = config.data
        self.config, self.device = config, device
        self.valid = [_validation_scan(path, config) for path in expand(data.valid)]
        self.files = expand(data.train) if pool is None else [Path(name) for name in data.train]
        reports = read_reports(data.reports) if data.reports else None
        self.pool = pool or _pool(self.files, device, config, reports)
        self.arrays = read_arrays(data.coil_maps) if arrays is None else arrays
        self.tokens_and_labels = _report_tokens(config) if data.reports else None
        self.model: nn.Module = _new_codec(config).to(device)
        _freeze_other_stages(self.model, config.stage.name)
        self.frozen_before = self._backbone_bits()
        self._one_output = (_ImageOnly if config.stage.loss == "image" else _CoilImages)(self.model)
        self._graphs: TrainingGraphs | None = None
        self.units_per_step = data.batch_size * config.optim.accumulation

    def initialize(self, initial: str) -> None:
        """Loads a codec of the same configuration: a folder, a packaged one, or a run of the joint
        stage or its checkpoint. See `Task.initialize`."""
        _load_initial(self.model, self.config)

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters that the stage trains, never the backbone's."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def position(self, step: int) -> dict[str, Any]:
        """The step and the volumes in their order."""
        return {"step": step, "volumes": [file.name for file in self.files]}

    def batch(self, step: int, micro: int) -> MriBatch:
        """Scanned slices, a function of the seed, the step and the micro batch."""
        data, accumulation = self.config.data, self.config.optim.accumulation
        generator = micro_batch_generator(self.config.run.seed, step * accumulation + micro)
        size, coils = choice(data.sizes, generator), choice(data.coils, generator)
        samplings: Samplings = data.samplings
        if data.points and torch.rand((), generator=generator) < data.points:
            samplings = data.point_samplings
        if isinstance(self.pool, ScanPool):
            batch = self.pool.batch(data.batch_size, size, coils, samplings, generator)
        else:
            batch = simulate_batch(
                self.pool,
                data.batch_size,
                size,
                coils,
                samplings,
                self.config.simulation,
                generator,
                self.arrays,
            )
        stage = self.config.stage
        return batch.hold_back(stage.held_share, generator) if stage.loss == "ssdu" else batch

    def loss(self, batch: MriBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1: the reports' cross-entropy; stage 2: 1 - SSIM, L1 and L2; joint: their weighted
        sum. With `stage.loss = "ssdu"` that of the samples that were held back instead."""
        if isinstance(batch, HeldBackBatch):
            return self._held_back_loss(batch)
        stage = self.config.stage
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if stage.name == "2" or self.tokens_and_labels is None:
            image = self._output(*batch.inputs)
        else:
            text, labels = self.tokens_and_labels(batch.reports, self.device)
            image, logits = self.model(*batch.inputs, text=text, image=stage.name == "joint")
            entropy = report_entropy(logits, labels)
            total = entropy if stage.name == "1" else stage.text_weight * entropy
            terms["report_nats"] = entropy.detach()
        if image is not None:
            with torch.autocast(self.device.type, enabled=False):
                scale = batch.scale[:, None, None]
                image, target = image.float() / scale, batch.target / scale
                similarity, l1 = ssim(image, target), F.l1_loss(image, target)
                l2 = (image - target).square().mean((-2, -1)).clamp(min=1e-12).sqrt().mean()
            total = total + stage.ssim_weight * (1 - similarity) + stage.l1_weight * l1
            total = total + stage.l2_weight * l2
            terms |= {"ssim": similarity.detach(), "l1": l1.detach(), "l2": l2.detach()}
        return total, terms

    def _held_back_loss(self, batch: HeldBackBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The errors of the held-back samples in the L2 and the L1 norm, relative to their own
        norms, as SSDU weighs them (Yaman et al., arXiv 1912.07669)."""
        coils = torch.view_as_complex(self._output(*batch.inputs))
        measured = batch.held_kspace / batch.scale[:, None, None, None]
        error = (fft2c(coils) - measured) * over_coils(batch.held)
        norms = []
        for order in (2, 1):
            size, of_error = (x.abs().flatten(1).norm(order, dim=1) for x in (measured, error))
            norms.append((of_error / size.clamp(min=1e-12)).mean())
        l2, l1 = norms
        return l2 + l1, {"held_l2": l2.detach(), "held_l1": l1.detach()}

    def validate(self) -> dict[str, float]:
        """Mean PSNR and SSIM over the validation volumes, and those of their zero-filled images;
        empty in stage 1, which makes no image.

        Raises:
            RuntimeError: the backbone's weights have changed.
        """
        if self._backbone_bits() != self.frozen_before:
            raise RuntimeError("the frozen backbone's weights have changed during the training")
        if self.config.stage.name == "1":
            return {}
        rows: dict[str, list[float]] = {}
        for kspace, target, mask in self.valid:
            masked = kspace * mask
            images = {
                "": self.model.reconstruct(masked, mask).numpy(),  # type: ignore[operator]
                "zero_filled_": zero_filled(masked.numpy(), mask.numpy()),
            }
            for prefix, image in images.items():
                # A diverged codec's image has no scores.
                scores = score(target, image) if np.isfinite(image).all() else {}
                for name in ("psnr", "ssim"):
                    rows.setdefault(prefix + name, []).append(scores.get(name, np.nan))
        return {name: float(np.mean(values)) for name, values in rows.items()}

    def prepare(self, processes: ProcessContext, compiled: bool) -> None:
        """Shards codec and backbone over several processes (FSDP2), or prepares CUDA graphs.

        Args:
            processes: the processes.
            compiled: capture a CUDA graph for each shape of batch when it first occurs, except of
                steps with reports.

        Raises:
            InputError: compiled with accumulation, whose gradients a replay would overwrite, or in
                several processes, whose sharded weights move.
        """
        self.processes = processes
        if processes.size > 1:
            if compiled:
                raise InputError(f"run.compile must be false in {processes.size} processes")
            backbone = self.model.backbone
            blocks = [] if backbone is None else list(backbone.base_model.layers)  # type: ignore[union-attr,arg-type]
            shard(self.model, blocks, self.config.parallel, processes)
            # A validation reconstructs by this method, which must gather the shards as `forward`.
            register_fsdp_forward_method(self.model, "batch_images")
            register_fsdp_forward_method(self.model, "coil_images")  # of `_CoilImages`
            self.frozen_before = self._backbone_bits()
            return
        if not compiled:
            return
        if self.config.optim.accumulation > 1:
            raise InputError("run.compile needs optim.accumulation = 1 here; set one or the other")
        self._graphs = self._graphs or TrainingGraphs(self._one_output)

    def _output(self, *inputs: Tensor) -> Tensor:
        y, _, calibration, _ = inputs
        inputs = (*inputs, *(self.model.initial_maps(y, calibration) or ()))  # type: ignore[operator]
        return self._one_output(*inputs) if self._graphs is None else self._graphs(*inputs)

    def _backbone_bits(self) -> str | None:
        backbone = self.model.backbone
        return None if backbone is None else fingerprint(backbone, None)  # type: ignore[arg-type]

    def export(self, folder: Path) -> None:
        """Writes the codec without its backbone."""
        model = self.model
        if self.processes.size > 1:  # this process holds a shard; the newest checkpoint is whole
            model = _new_codec(self.config)
            if self.config.run.initial:
                _load_initial(model, self.config)
            _freeze_other_stages(model, self.config.stage.name)
            newest = checkpoint.latest(self.config.run.out)
            assert newest is not None
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            checkpoint.restore(newest, model, named)
        save_codec(model, folder, self.config.run.export_dtype)  # type: ignore[arg-type]


class _ImageOnly(nn.Module):
    """A codec as a function of tensors to one tensor, which a CUDA graph can capture."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """The images; `inputs` are those of a codec and the fields of `InitialMaps`, if any."""
        initial = InitialMaps(*inputs[4:]) if inputs[4:] else None
        return self.model(*inputs[:4], initial=initial).image


class _CoilImages(_ImageOnly):
    """Likewise, a codec's coil images: real `[B, coils, H, W, 2]`, divided by the scale."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Arguments as of `_ImageOnly.forward`."""
        initial = InitialMaps(*inputs[4:]) if inputs[4:] else None
        coils, _ = self.model.coil_images(*inputs[:4], initial=initial)  # type: ignore[operator]
        return torch.view_as_real(coils)


def _pool(
    files: list[Path], device: torch.device, config: MriConfig, reports: Reports | None
) -> SlicePool | ScanPool:
    measured = [file.suffix in SUFFIXES for file in files]
    if all(measured):
        return ScanPool(files, device, config.data.coils, reports)
    if any(measured):
        raise InputError("data.train: either scans (.h5) or image volumes, not both in one run")
    return SlicePool.read(files, device, reports=reports)


def read_arrays(paths: Sequence[str]) -> list[Tensor]:
    """Measured coil sensitivities.

    Args:
        paths: .npy files of complex `[coils, H, W]`.

    Raises:
        InputError: a file cannot be read or holds something else.
    """
    arrays = []
    for path in paths:
        try:
            array = np.load(existing_file(path), allow_pickle=False)
        except UNREADABLE as error:
            raise InputError(f"data.coil_maps: {path} cannot be read: {error}") from error
        if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "c":
            raise InputError(f"data.coil_maps: {path} holds no complex array [coils, H, W]")
        if not np.isfinite(array).all():
            raise InputError(f"data.coil_maps: {path} holds numbers that are not finite")
        arrays.append(torch.from_numpy(array.astype(np.complex64)))
    return arrays


def _report_tokens(config: MriConfig) -> ReportTokens:
    tokenizer = load_tokenizer(backbone_folder(config.codec.weights), required=())
    return ReportTokens(tokenizer, config.stage.prompt, config.stage.report_tokens)


def _new_codec(config: MriConfig) -> CodecModel:
    """A codec with random weights on its frozen backbone, on the CPU."""
    return CodecModel(config.codec, load_backbone(config.codec.backbone, config.codec.weights))


def _load_initial(model: nn.Module, config: MriConfig) -> None:
    """Loads the weights that `run.initial` names into a codec."""
    initial = config.run.initial
    another = InputError(
        f"configuration: run.initial = {initial!r} is another codec than [codec] describes; "
        "make them equal"
    )
    if (
        not (Path(initial) / "state.json").is_file()
        and not (Path(initial) / "checkpoints").is_dir()
    ):
        saved = load_codec(initial)
        if saved.config != config.codec:
            raise another
        model.load_state_dict(saved.state_dict())
        return
    found = checkpoint.find_checkpoint(initial)
    if found.config.get("codec") != json.loads(json.dumps(to_dict(config.codec))):
        raise another
    own = own_state_dict(model)
    named = [(name, p) for name, p in model.named_parameters() if name in own]
    try:
        checkpoint.restore(found, model, named)
    except InputError as error:
        raise InputError(
            f"configuration: run.initial = {initial!r} holds the weights of one stage alone: give "
            "the folder model of the finished run"
        ) from error


def _freeze_other_stages(model: nn.Module, stage: str) -> None:
    """Freezes what a stage does not train: in stage 1 all but the encoder, in stage 2 the
    encoder."""
    for name, parameter in model.named_parameters():
        encoder = in_encoder(name)
        if (stage == "1" and not encoder) or (stage == "2" and encoder):
            parameter.requires_grad_(False)


def train(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
) -> Outcome:
    """Trains a codec by a configuration file.

    Args:
        config_path: TOML file of an `MriConfig`.
        overrides: `["--section.key", "value", ...]`.
        resume: continue the run in `run.out`.
        accept_changes: resume also with other settings or data than before.

    Raises:
        InputError: the configuration, a volume or the run's folder is wrong.
    """
    config = load_config(MriConfig, config_path, overrides)
    data, weights = config.data, [config.codec.weights, config.run.initial or None]
    files = [*expand(data.train), *expand(data.valid), *data.coil_maps, data.reports or None]
    check_run(config.run.out, config_path, [*files, *weights])
    return fit_configured(config, ReconstructionTask, resume, accept_changes)


def expand(patterns: list[str]) -> list[Path]:
    """The files that match glob patterns, sorted within a pattern.

    Raises:
        InputError: a pattern matches nothing.
    """
    files = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern))
        if not found:
            raise InputError(f"no volume matches {pattern!r}")
        files += [Path(file) for file in found]
    return files


def _validation_scan(path: Path, config: MriConfig) -> tuple[Tensor, np.ndarray, Tensor]:
    """K-space, target and mask of evenly spaced slices of a scan, or of one simulated of a volume
    with a fixed seed."""
    data = config.data

    def evenly(volume: Kspace) -> np.ndarray:
        middle = volume[len(volume) // 5 : -(len(volume) // 5) or None]
        chosen = np.linspace(0, len(middle) - 1, min(data.valid_slices, len(middle))).round()
        return middle[chosen.astype(int)]

    if is_volume(path):
        scan = simulate_scan(evenly(read_volume(path)), path.name, 0, config.simulation)
    else:
        whole = read_scan(path)
        if not is_full(whole):
            raise InputError(f"{path} is undersampled; only a fully sampled scan can be scored")
        target = None if whole.target is None else evenly(whole.target)
        scan = Scan(evenly(whole.kspace), None, target, whole.name)
    sampling = Sampling(data.masks[0], data.accelerations[0], data.center_fractions[0])
    mask = sampling.mask(scan.kspace.shape[-1], seed=0)
    return torch.from_numpy(scan.kspace), target_of(scan), mask
