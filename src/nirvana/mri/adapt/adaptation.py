"""Adaptation of a codec to one scan, without any image of it.

The measured samples outside of the calibrated middle are split into folds. For each fold a copy of
the codec learns from the others, by two terms of the loss:

- A few samples are hidden, and the copy learns to predict them, as in zero-shot self-supervised
  learning (Yaman et al., ICLR 2022, arXiv 2102.07737). This alone would also teach it the wider
  gaps, and to remove noise that the image of a full scan has.
- The scan is repeated with another pattern of as many samples: the codec's reconstruction, with
  the measured samples in it and noise in the others, is measured there, and the copy learns to
  make the same image of it.

Then the copy predicts its fold, of which it has learned nothing. So every sample is predicted
once, before and after the adaptation, and a paired interval of the gain decides whether the codec
adapts; if so, it gets the mean of the copies' weights.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad

from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.adapt.lines import outside_of_middle, parts, redrawn, require_lines
from nirvana.mri.adapt.parameters import ScanParameters
from nirvana.mri.adapt.prediction import CoilKspace, ScanSlice, image_loss
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.methods import SliceImage, codec_method
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.statistics import t_interval

ADAPTED = "Nirvana, adapted"
"""The name of the method in tables."""

WARMUP = 4  # steps over which the step size rises: Adam's first steps are as long as its last

StepCounter = Callable[[int], None]
"""Called with the number of steps just taken."""


@dataclass(frozen=True)
class ScanAdaptation:
    """A codec for one scan, and how it was made.

    Attributes:
        codec: a copy with adapted weights; those of the given codec where nothing was gained.
        record: `parameters` (how many numbers were learned), `steps` taken in all folds, `kept`
            (the step of a fold whose weights the codec has; 0: as it was), `curve` (the mean error
            in dB at each look, see `ScanSlice.error`), `gain` (by how many dB it fell until the
            best look) with the bounds `low` and `high` of its interval, and `config`.
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
    slices = _slices(codec, acquisition, config)
    folds = [
        parts(outside_of_middle(each.measured, acquisition.size[0]), config.folds, generator)
        for each in slices
    ]
    runs = [
        _Run(codec, slices, [own[number] for own in folds], config, generator, progress)
        for number in range(config.folds)
    ]
    for run in runs:
        run.learn()
    errors = np.concatenate([run.errors for run in runs], axis=1)
    curve = errors.mean(axis=1)
    best = int(curve.argmin())
    gain = t_interval(errors[0] - errors[best])
    adapted, kept = deepcopy(codec), 0
    if gain.low > config.least_gain:
        kept = min(best * config.check_every, config.steps)
        with torch.no_grad():
            for name in runs[0].looks[best]:
                mean = torch.stack([run.looks[best][name] for run in runs]).mean(0)
                adapted.get_parameter(name).copy_(mean)
    record = {"parameters": runs[0].parameters.count, "steps": config.folds * config.steps}
    record |= {"kept": kept, "curve": curve.tolist(), "gain": gain.figure}
    record |= {"low": gain.low, "high": gain.high, "config": asdict(config)}
    return ScanAdaptation(adapted, record)


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


class _Run:
    """The adaptation of one copy, which does not learn from its fold.

    Args:
        codec: the codec.
        slices: of the scan.
        fold: the samples of each slice that it does not learn from.
        config: how.
        generator: of the choice of samples.
        progress: see `StepCounter`.

    Attributes:
        parameters: what it learns.
        looks: its weights before the first step and at each look, by name.
        errors: those at parts of the fold in dB, `[looks, slices x parts]`.
    """

    def __init__(
        self,
        codec: CodecModel,
        slices: list[ScanSlice],
        fold: list[np.ndarray],
        config: ScanAdaptConfig,
        generator: np.random.Generator,
        progress: StepCounter | None,
    ) -> None:
        self.parameters = ScanParameters(codec, config.parameters)
        self._model, self._slices, self._config = CoilKspace(codec), slices, config
        self._generator, self._progress = generator, progress
        self._given = [each.measured & ~own for each, own in zip(slices, fold, strict=True)]
        with torch.no_grad():
            self._complete = [
                each.predicted(self._model, {}, each.kspace, [given])
                for each, given in zip(slices, self._given, strict=True)
            ]
        count = max(round(1 / (config.folds * config.hidden_share)), 1)
        self._tests = [parts(own, count, generator) for own in fold]
        self._hidden: list[list[np.ndarray]] = [[] for _ in slices]
        self.looks: list[dict[str, Tensor]] = []
        self.errors = np.zeros((0, sum(map(len, self._tests))))

    def learn(self) -> None:
        """Takes all steps."""
        config, values = self._config, list(self.parameters.values.values())
        optimizer = torch.optim.Adam(values, lr=config.lr, betas=(0.9, 0.99))
        self._look()
        for step in range(1, config.steps + 1):
            optimizer.param_groups[0]["lr"] = config.lr * min(step / WARMUP, 1)
            slopes = grad(self._loss(step % len(self._slices)), values, allow_unused=True)
            for value, slope in zip(values, slopes, strict=True):
                value.grad = slope
            optimizer.step()
            if self._progress is not None:
                self._progress(1)
            if step % config.check_every == 0 or step == config.steps:
                self._look()

    def _loss(self, number: int) -> Tensor:
        """The two terms of the loss, of one slice."""
        weight, each = self._config.repeat_weight, self._slices[number]
        hidden = self._next_hidden(number)
        kspace, given = [each.kspace], [each.measured & ~hidden]
        if weight:
            kspace.append(each.again(self._complete[number], self._given[number], self._generator))
            given.append(redrawn(each.measured, each.kspace.shape[-2], self._generator))
        changed = self.parameters.weights()
        found = each.predicted(self._model, changed, torch.cat(kspace), given)
        loss = each.error(found[0], hidden)
        if weight:
            loss = loss + weight * image_loss(rss(ifft2c(found[1:])), rss(ifft2c(kspace[1])))
        return loss

    def _next_hidden(self, number: int) -> np.ndarray:
        """Samples of a slice to hide; each is hidden once before any is hidden again."""
        if not self._hidden[number]:
            each = self._slices[number]
            learned = outside_of_middle(each.measured, each.kspace.shape[-2])
            learned &= self._given[number]
            count = round(1 / self._config.hidden_share)
            self._hidden[number] = parts(learned, count, self._generator)
        return self._hidden[number].pop()

    @torch.no_grad()
    def _look(self) -> None:
        """Keeps the weights, and predicts the fold."""
        weights = {name: weight.clone() for name, weight in self.parameters.weights().items()}
        errors = []
        for each, tests in zip(self._slices, self._tests, strict=True):
            given = [each.measured & ~part for part in tests]
            found = each.predicted(self._model, weights, each.kspace, given)
            errors += [float(each.error(*pair)) for pair in zip(found, tests, strict=True)]
        self.looks.append(weights)
        self.errors = np.vstack([self.errors, 10 * np.log10(errors)])


def _slices(
    codec: CodecModel, acquisition: Acquisition, config: ScanAdaptConfig
) -> list[ScanSlice]:
    """Slices of the scan, evenly spread."""
    count = min(config.slices, len(acquisition))
    chosen = [(2 * number + 1) * len(acquisition) // (2 * count) for number in range(count)]
    for index in chosen:
        require_lines(acquisition.mask(index), acquisition.size[0], acquisition.name)
    return [ScanSlice.of(codec, acquisition, index, config.weight_power) for index in chosen]
