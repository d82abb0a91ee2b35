"""Adaptation of a codec to one scan, without any image of it.

The measured samples outside of the calibrated middle are split into folds. For each fold a copy of
the codec learns from the others: in every step few of their samples are hidden, so that the scan
stays nearly as accelerated as it is, and the copy learns to predict them, as in zero-shot
self-supervised learning (Yaman et al., ICLR 2022, arXiv 2102.07737). Then it predicts its fold, of
which it has learned nothing. So every sample is predicted once, before and after the adaptation,
and a paired interval of the gain decides whether the codec adapts; if so, it gets the mean of the
copies' weights.

Where an image holds noise alone, hidden samples teach only to remove it, while the codec was
trained on images of full scans, which are noisy there. So the adapted image is used where there is
signal, and the codec's own where there is none.
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
from nirvana.mri.adapt.lines import outside_of_middle, parts, require_lines
from nirvana.mri.adapt.parameters import ScanParameters
from nirvana.mri.adapt.prediction import CoilKspace, ScanSlice, signal_share
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.methods import SliceImage, codec_method
from nirvana.mri.model.codec import CodecModel
from nirvana.statistics import Interval, t_interval

ADAPTED = "Nirvana, adapted"
"""The name of the method in tables."""

HIDDEN_SETS = 2  # of samples that a step hides, each from a prediction of its own
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
    best, gain = best_look(errors)
    adapted, kept = deepcopy(codec), 0
    if best and gain.low > 0:
        kept = min(best * config.check_every, config.steps)
        with torch.no_grad():
            for name in runs[0].looks[best]:
                mean = torch.stack([run.looks[best][name] for run in runs]).mean(0)
                adapted.get_parameter(name).copy_(mean)
    record = {"parameters": runs[0].parameters.count, "steps": config.folds * config.steps}
    record |= {"kept": kept, "curve": errors.mean(axis=1).tolist(), "gain": gain.figure}
    record |= {"low": gain.low, "high": gain.high, "config": asdict(config)}
    return ScanAdaptation(adapted, record)


def best_look(errors: np.ndarray) -> tuple[int, Interval]:
    """The look with the least mean error, and the interval of the gain since the first.

    Args:
        errors: in dB, `[looks, groups of samples]`.
    """
    best = int(errors.mean(axis=1).argmin())
    return best, t_interval(errors[0] - errors[best])


class AdaptedMethod:
    """The method of a codec that first adapts to the scan, see `methods.Method`.

    It keeps the codec's own image where that holds noise alone.

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
        before = codec_method(self.codec, self.batch_size)(acquisition)
        if not found.record["kept"]:
            yield from before
            return
        after = codec_method(found.codec, self.batch_size)(acquisition)
        for first, second in zip(before, after, strict=True):
            yield _blended(first, second, acquisition)


def _blended(first: SliceImage, second: SliceImage, acquisition: Acquisition) -> SliceImage:
    """The second image where there is signal, and the first where there is none."""
    magnitude = torch.from_numpy(first.magnitude)
    signal = signal_share(magnitude, acquisition.noise, acquisition.num_coils).numpy()

    def blend(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + signal * (b - a)

    coils = blend(first.coils(), second.coils())
    return SliceImage(
        np.linalg.norm(coils, axis=0),
        lambda: blend(first.combined(), second.combined()),
        lambda: coils,
    )


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
        self._learned = [
            outside_of_middle(each.measured, each.kspace.shape[-2]) & ~own
            for each, own in zip(slices, fold, strict=True)
        ]
        count = max(round(1 / (config.folds * config.hidden_share)), 1)
        self._tests = [parts(own, count, generator) for own in fold]
        self._hidden: list[list[np.ndarray]] = [[] for _ in slices]
        self.looks: list[dict[str, Tensor]] = []
        self.errors = np.zeros((0, sum(map(len, self._tests))))

    def learn(self) -> None:
        """Takes all steps."""
        config, values = self._config, list(self.parameters.values.values())
        optimizer = torch.optim.Adam(values, lr=config.step_size, betas=(0.9, 0.99))
        self._look()
        for step in range(1, config.steps + 1):
            optimizer.param_groups[0]["lr"] = config.step_size * min(step / WARMUP, 1)
            slopes = grad(self._loss(step % len(self._slices)), values, allow_unused=True)
            for value, slope in zip(values, slopes, strict=True):
                value.grad = slope
            optimizer.step()
            if self._progress is not None:
                self._progress(1)
            if step % config.check_every == 0 or step == config.steps:
                self._look()

    def _loss(self, number: int) -> Tensor:
        """The error at hidden samples of a slice."""
        each = self._slices[number]
        hidden = [self._next_hidden(number) for _ in range(HIDDEN_SETS)]
        given = [each.measured & ~part for part in hidden]
        found = each.predicted(self._model, self.parameters.weights(), each.kspace, given)
        errors = [each.error(*pair) for pair in zip(found, hidden, strict=True)]
        return torch.stack(errors).mean()

    def _next_hidden(self, number: int) -> np.ndarray:
        """Samples of a slice to hide; each is hidden once before any is hidden again."""
        if not self._hidden[number]:
            count = round(1 / self._config.hidden_share)
            self._hidden[number] = parts(self._learned[number], count, self._generator)
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
        measured, height = acquisition.mask(index), acquisition.size[0]
        require_lines(measured, height, config.folds, acquisition.name)
    return [ScanSlice.of(codec, acquisition, index, config.weight_power) for index in chosen]
