"""Packs the heads of the study into one file: python prepare.py MRI_FOLDER OUT.npz

The folder is that of the MRI data, with train/, valid/ and test/ in it; see the table below for the
volumes, which stay under their own licences and are not part of the project. The split is the
study's own: tcga_DU7294, a training person elsewhere, is tested here, because of the test persons
ms_x19 has no slice without lesions of its own and no other has a T2.
"""

import argparse
from pathlib import Path

from nirvana.mri.report.heads import join_heads, save_heads, slices_of

# role in the study, subject, sequences, skull-stripped, mask of known lesions
VOLUMES = (
    ("train", "colin27", "T1", False, None),
    ("train", "mni152", "T1", True, None),
    ("train", "studyforrest", "T1", False, None),
    ("train", "niimath", "T1", True, None),
    ("train", "ms_x07", "FLAIR T1 T2", True, "lesion"),
    ("train", "ms_l01", "FLAIR T1 T2", False, "change"),
    ("train", "ms_l03", "FLAIR T1", False, "change"),
    ("train", "ms_l09", "FLAIR", False, "change"),
    ("train", "ms_l12", "FLAIR T1", False, "change"),
    ("train", "stroke_M2307", "T2", True, "lesion"),
    ("train", "stroke_clin", "T2", False, "lesion"),
    ("test", "tcga_DU7294", "FLAIR T1 T2", True, "autoseg"),
    ("valid", "ms_l04", "FLAIR T1", False, "change"),
    ("test", "ms_l20", "FLAIR T1", False, "change"),
    ("test", "seg3d", "T1", False, None),
    ("test", "ecog", "T1", False, None),
)
FOLDERS = {"tcga_DU7294": "train"}
FILES = {"mni152": "mni152_T1", "niimath": "niimath_T1brain"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    parts = []
    for role, subject, sequences, stripped, mask in VOLUMES:
        split = FOLDERS.get(subject, role)
        for sequence in sequences.split():
            name = FILES.get(subject, f"{subject}_{sequence}")
            lesions = None if mask is None else given.folder / split / f"{subject}_{mask}.nii.gz"
            if mask == "change" and sequence != "FLAIR":
                lesions = None  # on the grid of the FLAIR
            path = given.folder / split / f"{name}.nii.gz"
            part = slices_of(path, sequence, f"{role}/{subject}", stripped, lesions)
            print(f"{path.name}: {len(part)} slices")
            parts.append(part)
    heads = join_heads(parts)
    save_heads(given.out, heads)
    print(f"{given.out}: {len(heads)} slices, {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
