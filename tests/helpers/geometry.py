"""Affines to draw, and where they put the voxels of a volume."""

import numpy as np
from hypothesis import strategies as st


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    """A rotation about the three axes, one after another."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.roll(np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]), axis, (0, 1))
        turned = turned @ turn
    return turned


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Rotated, mirrored or not, any voxel size, far away or near."""
    angle = st.floats(-3.1, 3.1)
    zoom = st.floats(0.2, 8)
    affine = np.eye(4)
    affine[:3, :3] = rotation(draw(st.tuples(angle, angle, angle)))
    affine[:3, :3] *= [draw(zoom) * draw(st.sampled_from([-1, 1])), draw(zoom), draw(zoom)]
    affine[:3, 3] = draw(st.tuples(*[st.floats(-400, 400)] * 3))
    return affine


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where each voxel lies, `[voxels, 3]`, in C order."""
    index = np.stack([*np.indices(shape[:3]).reshape(3, -1), np.ones(np.prod(shape[:3]))])
    return (affine @ index)[:3].T


def by_place(where: np.ndarray, what: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places and values, sorted by value, which no two voxels share."""
    order = np.argsort(what.ravel())
    return where[order], what.ravel()[order]
