"""How well a codec predicts measured samples that it does not see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nirvana.mri.adapt.lines import acquired, stands_for, weights
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.model.codec import CodecModel, InitialMaps, slice_batches
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss

NEIGHBOURHOOD = 5  # sides of the square, in pixels, over which noise is compared with signal


class CoilKspace(nn.Module):
    """The k-space of all coils that a codec makes of its input, whose brightness is 1."""

    def __init__(self, codec: CodecModel) -> None:
        super().__init__()
        self.codec = codec

    def forward(self, *inputs: Any) -> Tensor:
        """Complex `[B, coils, H, W]`; arguments as of `CodecModel.coil_images`."""
        return fft2c(self.codec.coil_images(*inputs)[0])


@dataclass(frozen=True)
class ScanSlice:
    """A slice of the scan whose samples are predicted.

    Attributes:
        kspace: complex `[1, coils, H, W]` of brightness 1, zero where not measured.
        calibration: as of `CodecModel.forward`.
        initial: of `CodecModel.initial_maps`.
        measured: bool `[1 or H, W]`.
        weight: `[H, W]`, of squared differences in k-space.
        signal: `[H, W]`, of squared differences in the image, see `signal_share`.
    """

    kspace: Tensor
    calibration: Tensor
    initial: InitialMaps | None
    measured: np.ndarray
    weight: Tensor
    signal: Tensor

    @classmethod
    def of(
        cls, codec: CodecModel, acquisition: Acquisition, index: int, weight_power: float
    ) -> "ScanSlice":
        """A slice of a scan.

        Args:
            codec: whose image separates the object from the background.
            acquisition: the scan.
            index: of the slice.
            weight_power: see `lines.weights`.
        """
        reference = acquisition.reference
        measured = np.array(acquisition.mask(index))
        single = replace(
            acquisition,
            kspace=np.asarray(acquisition.kspace[index])[None],
            pattern=measured[None],
            reference=None if reference is None else reference[index][None],
        )
        (batch,) = slice_batches(single, 1, codec.device)
        kspace, noise = batch.kspace / acquisition.scale, acquisition.noise / acquisition.scale
        weight = weights(kspace[0].cpu().numpy(), measured, noise, weight_power)
        found = cls(
            kspace=kspace,
            calibration=batch.calibration,
            initial=codec.initial_maps(kspace, batch.calibration),
            measured=measured,
            weight=torch.from_numpy(weight).to(codec.device),
            signal=torch.ones_like(kspace[0, 0].real),
        )
        with torch.no_grad():
            image = rss(ifft2c(found.predicted(CoilKspace(codec), {}, kspace, [measured])))[0]
        return replace(found, signal=signal_share(image, noise, kspace.shape[1]))

    def predicted(
        self,
        model: CoilKspace,
        changed: Mapping[str, Tensor],
        kspace: Tensor,
        given: Sequence[np.ndarray],
    ) -> Tensor:
        """The k-space that the codec makes of parts of it, complex `[B, coils, H, W]`.

        Args:
            model: of the codec.
            changed: weights that differ from the codec's, by name.
            kspace: complex `[B or 1, coils, H, W]`.
            given: bool `[1 or H, W]` each, B of them, the samples that it sees.
        """
        mask = torch.from_numpy(np.stack(given)).to(kspace.device)
        initial, count = self.initial, len(given)
        if initial is not None:
            initial = InitialMaps(*(part.expand(count, *part.shape[1:]) for part in initial))
        inputs = kspace * mask[:, None], mask, self.calibration, kspace.new_ones(count).real
        named = {f"codec.{name}": weight for name, weight in changed.items()}
        return functional_call(model, named, (*inputs, initial))

    def error(self, found: Tensor, hidden: np.ndarray) -> Tensor:
        """The squared error at samples that were hidden from the codec, over their energy.

        Each counts as much as the samples that it stands for, and in the image the object counts
        and not the noise around it.

        Args:
            found: complex `[coils, H, W]`, the codec's k-space.
            hidden: bool `[1 or H, W]`, within `measured`.
        """
        unseen = np.zeros_like(hidden)
        unseen[acquired(self.measured)] = True
        unseen &= ~self.measured | hidden
        share = torch.from_numpy(stands_for(hidden, unseen))
        weight = (share.to(self.weight.device) * self.weight).sqrt()

        def seen(kspace: Tensor) -> Tensor:
            image = torch.view_as_real(ifft2c(kspace * weight))
            return (image.square().sum((0, -1)) * self.signal).sum()

        return seen(found - self.kspace[0]) / seen(self.kspace[0])


def signal_share(image: Tensor, noise: float, coils: int) -> Tensor:
    """Of the energy around each pixel, the share that noise does not explain, 0..1.

    Args:
        image: real `[..., H, W]`, root sum of squares.
        noise: standard deviation in the real part of a coil's k-space.
        coils: their number.
    """
    power = torch.nn.functional.avg_pool2d(
        image.square()[None], NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False
    )[0]
    floor = 2 * coils * noise**2
    return (1 - floor / power.clamp(min=torch.finfo(power.dtype).tiny)).clamp(min=0)
