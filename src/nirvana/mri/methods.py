"""The methods that are compared: from an acquisition to images, slice by slice."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from nirvana.errors import InputError
from nirvana.mri.classical.bart import bart_pics
from nirvana.mri.classical.common import padded
from nirvana.mri.classical.grappa import grappa
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.partial_fourier import complete
from nirvana.mri.physics.sense import combine_coils, principal_coil

FOURIER, ZERO_FILLED, SENSE, GRAPPA = "Fourier", "zero-filled", "SENSE", "GRAPPA"
WAVELET, NIRVANA = "L1-wavelet", "Nirvana"
BART: dict[Literal["l1", "l2"], str] = {"l2": "BART SENSE", "l1": "BART L1-wavelet"}

LOW_RESOLUTION = 32  # samples along each axis of the k-space from which sensitivities are taken

SliceCounter = Callable[[int], None]
"""Called with the number of slices just done."""
Progress = Callable[[str], SliceCounter]
"""Called with a method's name before it runs; returns the counter of its slices."""


class SliceImage(NamedTuple):
    """The image of one slice."""

    magnitude: np.ndarray  # float32 [H, W], root sum of squares of the coil images
    # Computes the complex image of the same coil images, complex64 [H, W], see
    # `sense.combine_coils`: by a codec's own sensitivities, or by those of `_sensitivities`.
    combined: Callable[[], np.ndarray]
    # Returns these coil images, complex64 [coils, H, W], until the next image is made.
    coils: Callable[[], np.ndarray]


Method = Callable[[Acquisition], Iterator[SliceImage]]


def fourier_method(acquisition: Acquisition) -> Iterator[SliceImage]:
    """The Fourier transform of k-space, with zeros where nothing was measured."""
    return _images(acquisition.slices(), acquisition)


def codec_method(model: CodecModel, batch_size: int) -> Method:
    """The method of a codec, some slices at once."""

    def images(acquisition: Acquisition) -> Iterator[SliceImage]:
        for batch in model.images(acquisition, batch_size):
            for magnitude, combined, coils in zip(*batch, strict=True):
                yield SliceImage(magnitude.numpy(), combined.numpy, partial(_numpy, coils))

    return images


def method_named(name: str) -> str:
    """The method that an option names, as it is called in tables.

    Args:
        name: the same in lower case with hyphens.

    Raises:
        InputError: there is no such method.
    """
    labels = (NIRVANA, WAVELET, SENSE, GRAPPA, ZERO_FILLED, *BART.values())
    known = {label.lower().replace(" ", "-"): label for label in labels}
    if name not in known:
        raise InputError(f"--method {name} is unknown; choose one of {', '.join(known)}")
    return known[name]


def comparison_methods(
    codecs: Mapping[str, Any],
    *,
    wavelet: bool = True,
    sense: bool = False,
    grappa: bool = False,
    bart: bool = False,
    also: str = ZERO_FILLED,
    batch_size: int = 4,
) -> dict[str, Method]:
    """The methods that are compared, in the order of the tables: zero-filled, classical, codecs.

    Args:
        codecs: name in the tables -> `CodecModel`.
        wavelet: with ESPIRiT + L1-wavelet.
        sense: with ESPIRiT + SENSE.
        grappa: with pygrappa's GRAPPA.
        bart: with BART's two reconstructions.
        also: a method of this name in any case, a codec excepted.
        batch_size: slices that a codec reconstructs at once.
    """
    methods: dict[str, Method] = {ZERO_FILLED: fourier_method}
    if sense or also == SENSE:
        methods[SENSE] = classical_method(_sense)
    if grappa or also == GRAPPA:
        methods[GRAPPA] = classical_method(_grappa)
    if wavelet or also == WAVELET:
        methods[WAVELET] = classical_method(l1_wavelet)
    if bart or also in BART.values():
        methods |= {name: classical_method(_bart(norm)) for norm, name in BART.items()}
    return methods | {label: codec_method(model, batch_size) for label, model in codecs.items()}


def classical_method(kspace_of: Callable[[Acquisition], Iterable[np.ndarray]]) -> Method:
    """The method whose result is a generator's k-space, complex `[coils, H, W]` of each slice."""
    return lambda acquisition: _images(kspace_of(acquisition), acquisition)


_sense, _grappa = sense, grappa  # under names that the options of `comparison_methods` do not hide


def _bart(norm: Literal["l1", "l2"]) -> Callable[[Acquisition], Iterator[np.ndarray]]:
    return lambda acquisition: bart_pics(acquisition, norm)


def _images(slices: Iterable[np.ndarray], acquisition: Acquisition) -> Iterator[SliceImage]:
    for index, kspace in enumerate(slices):
        coils = ifft2c(_completed(kspace, acquisition))
        combined = partial(_combined, coils, acquisition, index)
        yield SliceImage(rss(coils).numpy(), combined, coils.numpy)


def _numpy(coils: torch.Tensor) -> np.ndarray:
    return coils.cpu().numpy()


def _combined(coils: torch.Tensor, acquisition: Acquisition, index: int) -> np.ndarray:
    """The complex image of the coil images of a slice."""
    coil = principal_coil(torch.from_numpy(acquisition.coil_gram))
    return combine_coils(coils, _sensitivities(acquisition, index), coil).numpy()


def _completed(kspace: np.ndarray, acquisition: Acquisition) -> torch.Tensor:
    """K-space `[coils, H, W]` of a slice with its missing side, if one is."""
    found = torch.from_numpy(kspace)
    return found if acquisition.extent is None else complete(found, acquisition.extent)


def _sensitivities(acquisition: Acquisition, index: int) -> torch.Tensor:
    """Coil sensitivities of a slice from the middle of k-space: each coil's image of low resolution
    over their root sum of squares, complex64 `[coils, H, W]`."""
    block = acquisition.calibration(index)
    for axis in (1, 2):
        count = min(block.shape[axis], LOW_RESOLUTION)
        first = block.shape[axis] // 2 - count // 2
        block = np.take(block, range(first, first + count), axis=axis)
        window = np.hanning(count + 2)[1:-1].astype(np.float32)
        block = block * (window[:, None] if axis == 1 else window)
    maps = ifft2c(torch.from_numpy(padded(block, acquisition.size)))
    return maps / rss(maps).clamp(min=torch.finfo(torch.float32).tiny)
