"""The state of a codec's iterations."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nirvana.mri.model.operator import MeasuredKspace, conjugate, expand, reduce


@dataclass(frozen=True)
class Iterate:
    """What cascades read and write: either k, of gradient cascades, or x and z.

    Attributes:
        measured: the scan.
        maps: sensitivities, complex `[B, sets, coils, H, W]`, middle first.
        certainty: how well the maps explain the calibration data, `[B, sets, H, W]`, centred.
        scan: of `Conditioning`, `[B, dim]`; None without.
        k: coil k-space, complex `[B, coils, H, W]`, in the layout of the measured.
        x: images, complex `[B, sets, H, W]`, middle first.
        z: the images before the last data consistency, likewise.
    """

    measured: MeasuredKspace
    maps: Tensor
    certainty: Tensor
    scan: Tensor | None
    k: Tensor | None = None
    x: Tensor | None = None
    z: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The combined images, complex `[B, sets, H, W]`, centred."""
        x = self.x
        if x is None:
            assert self.k is not None
            x = reduce(self.measured.images(self.k), conjugate(self.maps))
        return self.measured.from_middle(x)

    @property
    def coil_kspace(self) -> Tensor:
        """Coil k-space, complex `[B, coils, H, W]`, in the layout of the measured."""
        if self.x is None:
            assert self.k is not None
            return self.k
        return self.measured.kspace(expand(self.x, self.maps))

    def corrected(self, change: Tensor) -> "Iterate":
        """The same with a change of the first set's image, complex `[B, H, W]`, centred."""
        change = self.measured.to_middle(change)[:, None]
        if self.x is None:
            assert self.k is not None
            return replace(self, k=self.k + self.measured.kspace(expand(change, self.maps[:, :1])))
        rest = self.x[:, 1:]
        return replace(self, x=torch.cat([self.x[:, :1] + change, rest], dim=1))
