"""What an adaptation changes of a codec: a few numbers from which its weights follow."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.model.specialist import own_state_dict
from nirvana.mri.model.codec import CodecModel


class ScanParameters:
    """The numbers that an adaptation learns, and the weights that they make.

    A convolution's weight is multiplied by a factor for each output channel, which starts at 1;
    other parameters are learned as they are.

    Args:
        codec: whose weights are the start; it stays as it is.
        kind: see `ScanAdaptConfig.parameters`.

    Attributes:
        values: what is learned, by the name of the parameter that it changes.

    Raises:
        InputError: the codec has no such parameters.
    """

    def __init__(self, codec: CodecModel, kind: str) -> None:
        own = own_state_dict(codec)
        self.values: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        for name, module, weight in _parameters(codec):
            if (name in own) == (kind == "backbone"):
                continue
            if weight.ndim <= 1 or kind == "all":
                self.values[name] = weight.detach().clone().requires_grad_()
            elif kind == "gains" and weight.ndim == 4:
                shape = [1] * 4
                shape[1 if isinstance(module, nn.ConvTranspose2d) else 0] = -1
                ones = weight.new_ones(weight.shape[shape.index(-1)])
                self.values[name] = ones.view(shape).requires_grad_()
                self._bases[name] = weight.detach()
        if not self.values:
            raise InputError(f"adapt.parameters = {kind!r}: this codec has no such parameters")

    @property
    def count(self) -> int:
        """How many numbers are learned."""
        return sum(value.numel() for value in self.values.values())

    def weights(self) -> dict[str, Tensor]:
        """The codec's parameters that differ, by name, with gradients to `values`."""
        bases = self._bases
        return {
            name: bases[name] * value if name in bases else value
            for name, value in self.values.items()
        }

    def copied(self) -> dict[str, Tensor]:
        """A copy of `values` without gradients."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Takes over a copy."""
        for name, value in values.items():
            self.values[name].copy_(value)


def _parameters(codec: CodecModel) -> list[tuple[str, nn.Module, Tensor]]:
    """Name, owner and value of each parameter that is a floating-point number."""
    found = []
    for path, module in codec.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            found.append((f"{path}.{name}" if path else name, module, weight))
    return found
