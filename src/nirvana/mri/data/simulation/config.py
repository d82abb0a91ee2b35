"""The settings of the simulator: each is one property of measured scans."""

from dataclasses import dataclass, fields

from nirvana.errors import InputError

Range = tuple[float, float]

OFF: Range = (0.0, 0.0)
SHARES = ("birdcage", "loops", "shading", "prewhitened", "kspace_filter", "zero_padding")
SHARES += ("partial_fourier", "fat", "scalp", "wrap")


@dataclass(frozen=True)
class Simulation:
    """Settings of the simulator; a value is drawn from every range for each image or volume, and a
    share is the probability that an image or volume has a property.

    The defaults are a plain scan of smooth phase, even coils and white noise. `REALISTIC` has all
    properties of measured scans.

    Attributes:
        num_coils: number of receive coils.
        gamma: exponent of the contrast change, drawn log-uniformly; 1 is no change.
        scalp: share of images that get a bright rim around the object (`scalp.add_scalp`).
        phase: peak of the smooth phase, in radians.
        phase_grid: control points of the smooth phase along each side; more are rougher.
        fine_phase: root mean square of the phase at 8 to 64 control points and pixel scale, radians
            (`phase.fine_phase`).
        tissue_phase: root mean square of the phase that follows the tissue's susceptibility,
            radians (`phase.tissue_phase`).
        cavity_phase: peak of the off-resonance around air cavities, radians (`phase.cavity_phase`).
        fat: share of images whose brightest tissue is out of phase (`phase.fat_phase`).
        ramp: largest distance of the centre of k-space from the middle, samples along each side.
        vessels: mean number of vessels of random phase (`flow.vessels`).
        pulsation: standard deviation of the vessels' signal from one column of k-space to another,
            relative to their mean (`flow.pulsate`).
        birdcage: probability of birdcage coils; the others are random and smooth.
        loops: probability of circular loops around the head instead (`coils.loop_maps`).
        coil_radius: distance of the birdcage from its centre, in half fields of view.
        coil_offset: largest displacement of the birdcage's centre, in half fields of view.
        coil_grid: control points of the random smooth coils along each side.
        shading: share of scans whose coils keep their brightness, brighter at the rim, as in an
            uncorrected scan. The others are scaled to sum_c |S_c|^2 = 1, so that the root sum of
            squares of the noise-free scan is the image.
        noise: standard deviation of the noise in the real and in the imaginary part, relative
            to the image's (or volume's) maximum; drawn log-uniformly, (0, 0) for none.
        noise_spread: standard deviation of the logarithm of the coils' noise levels.
        noise_correlation: root mean square of the noise correlation between two coils.
        prewhitened: share of scans whose coils are then combined to white noise of equal strength.
        kspace_filter: share of scans whose k-space falls off towards its corners
            (`acquisition.window`).
        zero_padding: share of scans with empty columns and rows around the measured ones.
        partial_fourier: share of scans that lack up to three eighths of the columns on one side.
        wrap: share of the batches of a training whose objects exceed the field of view along the
            columns' direction and fold over.

    Raises:
        InputError: values out of their range.
    """

    num_coils: int = 8
    gamma: Range = (0.7, 1.4)
    scalp: float = 0.0
    phase: Range = (0.2, 2.0)
    phase_grid: int = 4
    fine_phase: Range = OFF
    tissue_phase: Range = OFF
    cavity_phase: Range = OFF
    fat: float = 0.0
    ramp: float = 0.0
    vessels: float = 0.0
    pulsation: float = 0.0
    birdcage: float = 0.7
    loops: float = 0.0
    coil_radius: Range = (1.2, 1.8)
    coil_offset: float = 0.2
    coil_grid: int = 4
    shading: float = 0.0
    noise: Range = (0.002, 0.02)
    noise_spread: float = 0.0
    noise_correlation: float = 0.0
    prewhitened: float = 0.0
    kspace_filter: float = 0.0
    zero_padding: float = 0.0
    partial_fourier: float = 0.0
    wrap: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_coils <= 256:
            raise InputError(f"{self.num_coils} coils cannot be simulated; give 1 to 256")
        if not 0 <= self.noise[0] <= self.noise[1] < 1 or (self.noise[0] == 0 < self.noise[1]):
            raise InputError(
                f"noise {self.noise} is not a range of relative standard deviations; give "
                "0 < low <= high < 1, or 0 and 0 for none"
            )
        if not 0 < self.gamma[0] <= self.gamma[1]:
            raise InputError(f"gamma {self.gamma} is not a range; give 0 < low <= high")
        if self.phase_grid < 2 or self.coil_grid < 2:
            raise InputError("phase_grid and coil_grid need at least 2 control points")
        for name in ("phase", "fine_phase", "tissue_phase", "cavity_phase", "coil_radius"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise InputError(
                    f"{name} ({low:g}, {high:g}) is not a range; give 0 <= low <= high"
                )
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} {getattr(self, name):g} is no share; give 0 to 1")
        for name in ("ramp", "vessels", "pulsation", "noise_spread", "noise_correlation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} {getattr(self, name):g} must be 0 or more")


REALISTIC = Simulation(
    gamma=(0.6, 1.6),
    scalp=0.5,
    phase=(0.2, 3.0),
    fine_phase=(0.02, 0.15),
    tissue_phase=(0.0, 0.15),
    cavity_phase=(0.0, 2.0),
    fat=0.3,
    ramp=2.0,
    vessels=2.0,
    pulsation=0.15,
    birdcage=0.5,
    loops=0.6,
    shading=0.7,
    noise=(0.001, 0.02),
    noise_spread=0.2,
    noise_correlation=0.2,
    prewhitened=0.5,
    kspace_filter=0.25,
    zero_padding=0.25,
    partial_fourier=0.1,
    wrap=0.1,
)
"""All properties of measured scans. Sources: phase, residual phase of measured heads, mean absolute
0.05 to 0.12 rad with 0.5 to 5 % of the pixels above 0.5 rad; noise, levels of the coils of one
array that differ by a factor of 1.2 to 1.7 and correlations of 0.1 to 0.2 in the mean."""

PROPERTIES = tuple(
    field.name
    for field in fields(Simulation)
    if getattr(REALISTIC, field.name) != getattr(Simulation(), field.name)
)
"""Names of the settings in which `REALISTIC` differs from a plain scan."""
