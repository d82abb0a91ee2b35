"""Adaptation of a codec to one scan, without any image of it.

Of the measured samples outside of the calibrated middle a part is set aside, which decides when to
stop. In every step some of the others are held back: the codec reconstructs a slice without them,
and learns to predict them. Thereafter it reconstructs the scan from all samples. The scheme is that
of zero-shot self-supervised learning (Yaman et al., ICLR 2022, arXiv 2102.07737), on few
parameters of a trained codec, and with the codec as it was where the gain is not clear.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.adapt.lines import held_back, require_lines, weights
from nirvana.mri.adapt.parameters import ScanParameters
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.methods import SliceImage, codec_method
from nirvana.mri.model.codec import CodecModel, InitialMaps, slice_batches
from nirvana.mri.physics.fourier import fft2c

ADAPTED = "Nirvana, adapted"
"""The name of the method in tables."""

StepCounter = Callable[[int], None]
"""Called with the number of steps just taken."""


@dataclass(frozen=True)
class ScanAdaptation:
    """A codec for one scan, and how it was made.

    Attributes:
        codec: a copy with adapted weights; those of the given codec where nothing was gained.
        record: `parameters` (how many numbers were learned), `steps` taken, `kept` (the step whose
            weights the codec has; 0: as it was), `before` and `after` (the weighted error at the
            samples that were set aside, relative to their energy) and `curve`, that error at each
            look.
    """

    codec: CodecModel
    record: dict[str, Any]


def adapt_to_scan(
    codec: CodecModel,
    acquisition: Acquisition,
    config: ScanAdaptConfig | None = None,
    progress: StepCounter | None = None,
) -> ScanAdaptation:
    """Adapts a codec to a scan; the given codec stays as it is.

    Args:
        codec: the codec.
        acquisition: undersampled k-space.
        config: how; the defaults of `ScanAdaptConfig` when None.
        progress: see `StepCounter`.

    Raises:
        InputError: the coils cannot be calibrated, too few samples lie outside of the middle, or
            the codec has no parameters of the kind.
    """
    config = config or ScanAdaptConfig()
    acquisition.require_calibration()
    generator = np.random.default_rng(config.seed)
    problems = _problems(codec, acquisition, config, generator)
    parameters = ScanParameters(codec, config.parameters)
    model = _CoilKspace(codec)
    optimizer = torch.optim.Adam(parameters.values.values(), lr=config.lr, betas=(0.9, 0.99))
    curve = [_error(model, parameters, problems)]
    best, kept, taken, waited = parameters.copied(), 0, 0, 0
    while taken < config.steps and waited < config.patience:
        problem = problems[taken % len(problems)]
        hidden = held_back(problem.learned, problem.height, config.loss_share, generator)
        loss = problem.error(model, parameters, problem.learned & ~hidden, hidden)
        learned = list(parameters.values.values())
        for value, slope in zip(learned, grad(loss, learned, allow_unused=True), strict=True):
            value.grad = slope
        optimizer.step()
        taken += 1
        if progress is not None:
            progress(1)
        if taken % config.check_every and taken < config.steps:
            continue
        curve.append(_error(model, parameters, problems))
        if curve[-1] < min(curve[:-1]):
            best, kept, waited = parameters.copied(), taken, 0
        else:
            waited += 1
    if not min(curve) < (1 - config.least_gain) * curve[0]:
        kept = 0
    adapted = deepcopy(codec)
    if kept:
        parameters.restore(best)
        with torch.no_grad():
            for name, weight in parameters.weights().items():
                adapted.get_parameter(name).copy_(weight)
    record = {"parameters": parameters.count, "steps": taken, "kept": kept}
    record |= {"before": curve[0], "after": min(curve) if kept else curve[0], "curve": curve}
    return ScanAdaptation(adapted, {**record, "config": asdict(config)})


class AdaptedMethod:
    """The method of a codec that first adapts to the scan, see `methods.Method`.

    Args:
        codec: the codec, which stays as it is.
        batch_size: slices that it reconstructs at once.
        config: of the adaptation.
        progress: see `StepCounter`.

    Attributes:
        record: of the last scan, see `ScanAdaptation`; empty before.
    """

    def __init__(
        self,
        codec: CodecModel,
        batch_size: int,
        config: ScanAdaptConfig,
        progress: StepCounter | None = None,
    ) -> None:
        self.codec, self.batch_size, self.config = codec, batch_size, config
        self.progress = progress
        self.record: dict[str, Any] = {}

    def __call__(self, acquisition: Acquisition) -> Iterator[SliceImage]:
        """The images of a scan."""
        found = adapt_to_scan(self.codec, acquisition, self.config, self.progress)
        self.record = found.record
        yield from codec_method(found.codec, self.batch_size)(acquisition)


class _CoilKspace(nn.Module):
    """The k-space of all coils that a codec makes of its input, whose brightness is 1."""

    def __init__(self, codec: CodecModel) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, *inputs: Any) -> Tensor:
        """Complex `[1, coils, H, W]`; arguments as of `CodecModel.coil_images`."""
        return fft2c(self.codec.coil_images(*inputs)[0])


@dataclass(frozen=True)
class _Problem:
    """A slice of the scan.

    Attributes:
        kspace: complex `[1, coils, H, W]` of brightness 1, zero where not measured.
        calibration: as of `CodecModel.forward`.
        initial: of `CodecModel.initial_maps`.
        weight: `[H, W]`, of squared differences.
        learned: bool `[1 or H, W]`, the samples that are learned from.
        stop: bool likewise, those that decide when to stop.
        height: H.
    """

    kspace: Tensor
    calibration: Tensor
    initial: InitialMaps | None
    weight: Tensor
    learned: np.ndarray
    stop: np.ndarray
    height: int

    def error(
        self, model: _CoilKspace, parameters: ScanParameters, given: np.ndarray, wanted: np.ndarray
    ) -> Tensor:
        """The weighted squared error at samples of which the codec sees nothing, over their energy.

        Args:
            model: of the codec.
            parameters: what its weights are changed by.
            given: bool `[1 or H, W]`, the samples that it sees.
            wanted: bool likewise, those that it predicts.
        """
        device = self.kspace.device
        mask, hidden = (torch.from_numpy(x).to(device) for x in (given, wanted))
        inputs = self.kspace * mask, mask[None], self.calibration, self.kspace.new_ones(1).real
        changed = {f"codec.{name}": weight for name, weight in parameters.weights().items()}
        found = functional_call(model, changed, (*inputs, self.initial))
        weight = self.weight * hidden
        difference = torch.view_as_real(found - self.kspace).square().sum(-1)
        energy = torch.view_as_real(self.kspace).square().sum(-1)
        return (difference * weight).sum() / (energy * weight).sum()


@torch.no_grad()
def _error(model: _CoilKspace, parameters: ScanParameters, problems: list[_Problem]) -> float:
    """The mean error at the samples that were set aside."""
    errors = [each.error(model, parameters, each.learned, each.stop) for each in problems]
    return float(torch.stack(errors).mean())


def _problems(
    codec: CodecModel,
    acquisition: Acquisition,
    config: ScanAdaptConfig,
    generator: np.random.Generator,
) -> list[_Problem]:
    """Slices of the scan, evenly spread, each with the samples that are set aside."""
    count, height = min(config.slices, len(acquisition)), acquisition.size[0]
    chosen = [(2 * number + 1) * len(acquisition) // (2 * count) for number in range(count)]
    scale, problems = acquisition.scale, []
    for index in chosen:
        measured = np.array(acquisition.mask(index))
        require_lines(measured, height, acquisition.name)
        stop = held_back(measured, height, config.stop_share, generator)
        single = _single(acquisition, index)
        (batch,) = slice_batches(single, 1, codec.device)
        kspace = batch.kspace / scale
        weight = weights(
            kspace[0].cpu().numpy(), measured, acquisition.noise / scale, config.weight_power
        )
        problems.append(
            _Problem(
                kspace=kspace,
                calibration=batch.calibration,
                initial=codec.initial_maps(kspace, batch.calibration),
                weight=torch.from_numpy(weight).to(codec.device),
                learned=measured & ~stop,
                stop=stop,
                height=height,
            )
        )
    return problems


def _single(acquisition: Acquisition, index: int) -> Acquisition:
    """One slice of an acquisition."""
    reference = acquisition.reference
    return replace(
        acquisition,
        kspace=np.asarray(acquisition.kspace[index])[None],
        pattern=np.array(acquisition.mask(index))[None],
        reference=None if reference is None else reference[index][None],
    )
