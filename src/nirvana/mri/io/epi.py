"""Echo-planar lines: every second one is read backwards, and its phase differs."""

from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.lines import ChosenLines, RawLines


class ReversedLines:
    """Turns lines that were read backwards, and removes the phase by which they differ.

    Between a readout and the next one, backwards, gradient delays shift the echo, which is a phase
    linear along the readout of the image, and eddy currents add a constant one. Both are measured
    by navigators, lines without phase encoding in either direction (Ahn and Cho, IEEE Trans. Med.
    Imaging 6:32, 1987): with D the sum over coils of forward times conjugate backward image line,
    the slope is the phase of sum_x D(x + 1) conj D(x), and the offset that of D without it.

    Args:
        lines: of the file.
        chosen: lines of the image and its navigators.
        path: of the file.

    Raises:
        InputError: the image has lines that were read backwards, and no navigators.
    """

    def __init__(self, lines: RawLines, chosen: ChosenLines, path: Path):
        self.phases: dict[int, np.ndarray] = {}
        self.samples = 0
        if not chosen.image["reversed"].any():
            return
        usable = chosen.navigators[chosen.navigators["samples"] == chosen.image["samples"][0]]
        self.samples = int(chosen.image["samples"][0])
        for number in np.unique(usable["slice"]).tolist():
            own = usable[usable["slice"] == number]
            if own["reversed"].all() or not own["reversed"].any():
                continue
            values = np.stack(list(lines.read(own)))
            forward = _image(values[~own["reversed"]].mean(axis=0))
            backward = _image(values[own["reversed"]].mean(axis=0)[:, ::-1])
            self.phases[number] = _phase((forward * backward.conj()).sum(axis=0))
        missing = set(np.unique(chosen.image["slice"]).tolist()) - set(self.phases)
        if missing:
            raise InputError(
                f"{path} holds lines read backwards (echo-planar) and no navigators in both "
                f"directions, for slice {min(missing)}, to correct their phase by"
            )

    def turned(self, line: np.ndarray, head: np.ndarray) -> np.ndarray:
        """A line `[coils, samples]` as if it had been read forwards."""
        if not head["reversed"]:
            return line
        if line.shape[1] != self.samples:
            return line[:, ::-1]
        image = _image(line[:, ::-1]) * self.phases[int(head["slice"])]
        spectrum = np.fft.fft(np.fft.ifftshift(image, axes=-1), axis=-1)
        return np.fft.fftshift(spectrum, axes=-1).astype(np.complex64)


def _image(line: np.ndarray) -> np.ndarray:
    spectrum = np.fft.ifft(np.fft.ifftshift(line, axes=-1), axis=-1)
    return np.fft.fftshift(spectrum, axes=-1)


def _phase(product: np.ndarray) -> np.ndarray:
    """exp(i (slope x + offset)) of the linear phase of `[samples]`."""
    slope = np.angle((product[1:] * product[:-1].conj()).sum())
    ramp = np.exp(1j * slope * np.arange(len(product)))
    return ramp * np.exp(1j * np.angle((product * ramp.conj()).sum()))
