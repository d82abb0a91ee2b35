"""The example of a real brain that the dependencies carry, and how it is scanned."""

from importlib import resources
from pathlib import Path

from nirvana.mri.data.simulation.config import Simulation

NOISE = 0.005  # standard deviation over the brightest voxel
SIMULATION = Simulation(num_coils=8, noise=(NOISE, NOISE))


def example_volume() -> Path:
    """The file of nibabel's example, echo-planar images of 24 slices."""
    # nibabel.testing names this folder, too, but cannot be imported without pytest.
    return Path(str(resources.files("nibabel") / "tests" / "data" / "example4d.nii.gz"))
