"""Packs the brain slices of the report study into one file.

    python -m experiments.report.prepare MRI_FOLDER OUT.npz [--roles test valid]

The folder is that of the MRI data, with train/, valid/ and test/ in it. `VOLUMES` lists the
volumes, which keep their own licences and are not part of the project. The split differs from the
folders: tcga_DU7294, a training person elsewhere, is tested here, because ms_x19 has no slice free
of lesions and no other test person has a T2 with a mask.

Training volumes with voxels of 1 mm are also cut at other pitches (but for `STILL`), since there
are few people and a tilted section shows other gyri.

The masks of the people ms_l mark only the lesions that changed. Slices at a height where their
FLAIR shows one of those, or bright spots, are left out of all their sequences (`spotted`). seg3d
has no mask; half of that brain is left out (`VISIBLE`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from experiments.common.program import make_parser
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.mri.anatomy.brain_slices import SLAB, join_brain_slices, save_brain_slices, slices_of
from nirvana.mri.anatomy.lobes import brain_mask, distance, frame_of
from nirvana.mri.io import read_affine, read_spacing, read_volume

# Heights in mm at which lesions are visible that no mask marks: a malformed cortex around the right
# Sylvian fissure, and a cavity near the ventricle.
VISIBLE = {"seg3d": [(-math.inf, 486.0)]}
BORDER = 6.0  # mm of cortex at the rim of the brain, where spots are not searched
AROUND = 8.0  # mm, standard deviation of the surroundings of a spot
BRIGHT = 1.3  # times as bright as the surroundings
PITCHES = (-12.0, -6.0, 6.0, 12.0)  # degrees
STILL = {"stroke_clin"}  # tilted, each of its slices would show the lesion
SPOT = 12.0  # mm² of the smallest spot, 4 mm across

# role in the study, subject, sequences, skull-stripped, mask of known lesions
VOLUMES = (
    ("train", "colin27", "T1", False, None),
    ("train", "mni152", "T1", True, None),
    ("train", "studyforrest", "T1", False, None),
    ("valid", "niimath", "T1", True, None),
    ("train", "ms_x07", "FLAIR T1 T2", True, "lesion"),
    ("train", "ms_l01", "FLAIR T1 T2", False, "change"),
    ("train", "ms_l03", "FLAIR T1", False, "change"),
    ("train", "ms_l09", "FLAIR", False, "change"),
    ("train", "ms_l12", "FLAIR", False, "change"),  # moved by 3 mm before the T1
    ("train", "stroke_M2307", "T2", True, "lesion"),
    ("train", "stroke_clin", "T2", False, "lesion"),
    ("test", "tcga_DU7294", "FLAIR T1 T2", True, "autoseg"),
    ("valid", "ms_l04", "FLAIR T1", False, "change"),
    ("test", "ms_l20", "FLAIR T1", False, "change"),
    ("test", "seg3d", "T1", False, None),
    ("test", "ecog", "T1", False, None),
)
ROLES = ("train", "valid", "test")
FOLDERS = {"tcga_DU7294": "train", "niimath": "train"}
FILES = {"mni152": "mni152_T1", "niimath": "niimath_T1brain"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.report.prepare", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES, help="to pack")
    given = parser.parse_args(arguments)
    folders = {FOLDERS.get(subject, role) for role, subject, *_ in VOLUMES}
    check_outputs({"OUT": given.out}, [given.folder / name for name in folders])
    parts = []
    for role, subject, sequences, stripped, mask in VOLUMES:
        if role not in given.roles:
            continue
        split = FOLDERS.get(subject, role)
        for sequence in sequences.split():
            name = FILES.get(subject, f"{subject}_{sequence}")
            lesions = None if mask is None else given.folder / split / f"{subject}_{mask}.nii.gz"
            without: list[tuple[float, float]] = []
            if lesions is not None and mask == "change":  # on the grid of the FLAIR, and not all
                flair = given.folder / split / f"{subject}_FLAIR.nii.gz"
                lesions, without = None, spotted(flair, lesions)
            without += VISIBLE.get(subject, [])
            path = given.folder / split / f"{name}.nii.gz"
            who, spacing = f"{role}/{subject}", read_spacing(path)
            tilted = role == "train" and subject not in STILL and not without
            tilted &= spacing is not None and max(spacing) < 1.5
            for pitch in (0.0, *(PITCHES if tilted else ())):
                part = slices_of(path, sequence, who, stripped, lesions, without, pitch)
                print(f"{path.name}, {pitch:+.0f} degrees: {len(part)} slices")
                parts.append(part)
    brains = join_brain_slices(parts)
    save_brain_slices(given.out, brains)
    print(f"{given.out}: {len(brains)} slices, {given.out.stat().st_size / 1e6:.1f} MB")


def spotted(path: Path, changed: Path) -> list[tuple[float, float]]:
    """Heights (see `slices_of`) at which a FLAIR shows a lesion that changed or bright spots:
    lesions, but also the plexus and anything else as bright."""
    volume, spacing, affine = read_volume(path), read_spacing(path), read_affine(path)
    assert spacing is not None
    assert affine is not None
    brain = brain_mask(volume, spacing)
    frame = frame_of(brain, spacing)
    inside = np.stack([distance(part, spacing[1:]) > BORDER for part in brain])
    typical = np.median(volume[inside])
    tissue = inside & (volume > 0.6 * typical)  # without fluid
    sigma = (0.0, AROUND / spacing[1], AROUND / spacing[2])
    weight = ndimage.gaussian_filter(tissue.astype(np.float32), sigma)
    around = ndimage.gaussian_filter(np.minimum(volume, BRIGHT * typical) * tissue, sigma)
    smooth = ndimage.gaussian_filter(volume, (0.0, 0.7 / spacing[1], 0.7 / spacing[2]))
    bright = (inside & (smooth * weight > BRIGHT * around)) | (read_volume(changed) > 0.5)
    ranges = []
    margin = 0.45 * (spacing[0] + SLAB)  # a slice shows a tenth of the next one or more
    for number, part in enumerate(bright):
        found: Any = ndimage.label(part, np.ones((3, 3)))
        labels, count = found
        areas = np.bincount(labels.ravel())[1:] * spacing[1] * spacing[2]
        if count and areas.max() >= SPOT:
            height = (affine @ (number, frame.row, frame.column, 1))[2]
            ranges.append((height - margin, height + margin))
    return ranges


if __name__ == "__main__":
    script(main)
