"""Brain slices drawn with formulas, for tests of lesions and reports."""

import torch

from nirvana.mri.anatomy.brain_slices import PIXEL, BrainSlices
from nirvana.mri.anatomy.lesions import SEQUENCES


def drawn_brain_slices(
    size: tuple[int, int] = (160, 128), subjects: int = 2, names: tuple[str, ...] = ()
) -> BrainSlices:
    """An ellipse of even tissue in each sequence and at three heights, for each subject."""
    H, W = size
    names = names or tuple(f"person{s}" for s in range(subjects))
    half_length, half_width = 0.42 * H, 0.42 * W
    y = (torch.arange(H) - (H - 1) / 2)[:, None] / half_length
    x = (torch.arange(W) - (W - 1) / 2)[None] / half_width
    radius = torch.hypot(x, y)
    depth = ((1 - radius) * min(half_length, half_width) * PIXEL).clamp(min=0)
    image = 0.5 * (depth > 0)
    levels = (0.2, 0.3, 0.4)
    rows = [(s, q, w) for s in range(len(names)) for q in range(len(SEQUENCES)) for w in levels]
    frame = [[(W - 1) / 2, (H - 1) / 2, half_width, half_length, w, 0.0] for _, _, w in rows]
    return BrainSlices(
        images=(image * 255).byte().expand(len(rows), H, W).contiguous(),
        depth=depth.round().byte().expand(len(rows), H, W).contiguous(),
        frame=torch.tensor(frame),
        sequence=torch.tensor([q for _, q, _ in rows]),
        subject=torch.tensor([s for s, _, _ in rows]),
        names=names,
    )
