"""A small sound file of every format, ways to damage it, and what a reader may make of it."""

import gzip
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import scipy.io

from helpers import synthetic_ismrmrd, synthetic_twix
from nirvana.errors import InputError
from nirvana.mri.io import is_volume, read_affine, read_scan, read_volume, selections_of

SHAPE = (2, 2, 12, 16)
MEMORY = 64 * 2**20


def kspace(dtype: Any = np.complex64, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    generator = np.random.default_rng(0)
    parts = generator.standard_normal((2, *shape))
    return (parts[0] + 1j * parts[1]).astype(dtype)


def fastmri(path: Path, values: np.ndarray | None = None, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=kspace() if values is None else values, **options)
        file["reconstruction_rss"] = np.ones((2, 12, 16), np.float32)
        file["mask"] = np.ones(16)
        file["ismrmrd_header"] = "<ismrmrdHeader/>"
        file.attrs["spacing_mm"] = (3.0, 1.0, 1.0)
    return path


def ismrmrd(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return synthetic_ismrmrd.write(path, synthetic_ismrmrd.records(kspace(shape=(2, 2, 32, 20))))


def bart(path: Path) -> Path:
    path.with_suffix(".hdr").write_text("# Dimensions\n12 16 1 2 1 1 1 1 1 1 1 1 1 2 1 1\n")
    path.write_bytes(kspace().tobytes())
    return path


def nifti(path: Path) -> Path:
    image = nibabel.Nifti1Image(np.abs(kspace()[0]).astype(np.float32).repeat(4, 0), np.eye(4))
    nibabel.save(image, path)
    return path


def npy_volume(path: Path) -> Path:
    np.save(path, np.abs(kspace()[0]))
    return path


def npy_kspace(path: Path) -> Path:
    np.save(path, kspace())
    return path


def npz(path: Path) -> Path:
    np.savez_compressed(path, kspace=kspace(), mask=np.ones(16))
    return path


def matlab(path: Path) -> Path:
    scipy.io.savemat(path, {"data": kspace().transpose(2, 3, 1, 0), "mask": np.ones((12, 16))})
    return path


def matlab_compressed(path: Path) -> Path:
    scipy.io.savemat(path, {"data": kspace().transpose(2, 3, 1, 0)}, do_compression=True)
    return path


def matlab_hdf5(path: Path) -> Path:
    parts = np.dtype([("real", "<f4"), ("imag", "<f4")])
    with h5py.File(path, "w", userblock_size=512) as file:
        file["data"] = kspace().view(parts)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")
    return path


def twix(version: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        values = kspace(shape=(2, 2, 24, 16))
        blocks = [
            synthetic_twix.block(values[n, :, :, c], Lin=c, Sli=n, center_line=8)
            for n in range(2)
            for c in range(16)
        ]
        content = synthetic_twix.measurement(blocks, synthetic_twix.protocol(12, 16), version)
        return synthetic_twix.write(path, [content], version)

    return make


def compressed(path: Path) -> Path:
    plain = fastmri(path.with_suffix(""))
    path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "fastmri.h5": fastmri,
    "ismrmrd.h5": ismrmrd,
    "bart.cfl": bart,
    "volume.nii": nifti,
    "volume.nii.gz": nifti,
    "volume.npy": npy_volume,
    "kspace.npy": npy_kspace,
    "kspace.npz": npz,
    "matlab.mat": matlab,
    "compressed.mat": matlab_compressed,
    "hdf5.mat": matlab_hdf5,
    "vd.dat": twix("VD"),
    "vb.dat": twix("VB"),
    "packed.h5.gz": compressed,
}
"""Name of a file -> function that writes it."""


def read(path: Path) -> np.ndarray:
    """The numbers of a file of any format."""
    if is_volume(path):
        read_affine(path)
        return read_volume(path)
    selections_of(path)
    return read_scan(path).kspace


def read_or_refuse(path: Path) -> bool:
    """Whether a file is read. What comes is sound, or a refusal in one line that names the file,
    and no more memory is taken than the file can hold."""
    refusal, values = None, np.ones(1)
    tracemalloc.start()
    try:
        values = read(path)
    except InputError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MEMORY, f"{path}: {peak / 2**20:.0f} MiB were taken"
    assert np.isfinite(values).all()
    assert values.any()
    assert refusal is None or str(path).rsplit(".", path.name.count("."))[0] in refusal
    return refusal is None


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content of a file cut, with bytes changed, a number of its header replaced, a part
    removed, doubled or filled with one byte."""
    result = bytearray(content)
    # Headers lie at the start: most damage goes there.
    end = min(len(result), generator.choice([64, 400, 3000, len(result)]))
    start = generator.randrange(end)
    length = generator.choice([1, 2, 4, 8, 64, 512])
    part = slice(start, start + length)
    kind = generator.choice(["cut", "bytes", "bits", "number", "remove", "double", "fill"])
    if kind == "cut":
        del result[generator.randrange(len(result)) :]
    elif kind == "bytes":
        for _ in range(generator.randint(1, 8)):
            result[generator.randrange(end)] = generator.randrange(256)
    elif kind == "bits":
        for _ in range(generator.randint(1, 4)):
            result[generator.randrange(end)] ^= 1 << generator.randrange(8)
    elif kind == "number":
        size = generator.choice([2, 4, 8])
        values = [0, 1, 2, 255, 2 ** (8 * size - 1) - 1, 2 ** (8 * size) - 1]
        result[start : start + size] = generator.choice(values).to_bytes(size, "little")
    elif kind == "remove":
        del result[part]
    elif kind == "double":
        result[start:start] = result[part]
    else:
        result[part] = bytes([generator.choice([0, 255])]) * len(result[part])
    return bytes(result)
