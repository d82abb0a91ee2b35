"""Writes ISMRMRD files, record by record, by the format's definition."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

INDEX = [
    (name, "<u2")
    for name in (
        *("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast"),
        *("phase", "repetition", "set", "segment"),
    )
] + [("user", "<u2", (8,))]
HEAD = [
    ("version", "<u2"),
    ("flags", "<u8"),
    ("measurement_uid", "<u4"),
    ("scan_counter", "<u4"),
    ("acquisition_time_stamp", "<u4"),
    ("physiology_time_stamp", "<u4", (3,)),
    ("number_of_samples", "<u2"),
    ("available_channels", "<u2"),
    ("active_channels", "<u2"),
    ("channel_mask", "<u8", (16,)),
    ("discard_pre", "<u2"),
    ("discard_post", "<u2"),
    ("center_sample", "<u2"),
    ("encoding_space_ref", "<u2"),
    ("trajectory_dimensions", "<u2"),
    ("sample_time_us", "<f4"),
    ("position", "<f4", (3,)),
    ("read_dir", "<f4", (3,)),
    ("phase_dir", "<f4", (3,)),
    ("slice_dir", "<f4", (3,)),
    ("patient_table_position", "<f4", (3,)),
    ("idx", INDEX),
    ("user_int", "<i4", (8,)),
    ("user_float", "<f4", (8,)),
]
NOISE, CALIBRATION, REVERSED = 1 << 18, 1 << 19, 1 << 21
CALIBRATION_AND_IMAGING, PHASE_CORRECTION = 1 << 20, 1 << 23
SLICES, COILS, H, W = 3, 2, 32, 20
STEP = 4.0  # mm between slices
READ, PHASE, NORMAL = np.array([0, 1, 0.0]), np.array([0.6, 0, 0.8]), np.array([0.8, 0, -0.6])


def header(**changes: Any) -> str:
    """A header of one encoding; `before` and `after` it stand further elements."""
    values = {"before": "", "after": "", **changes}
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ismrmrdHeader '
        'xmlns="http://www.ismrm.org/ISMRMRD">{before}{encoding}{after}</ismrmrdHeader>'
    ).format(encoding=encoding(**changes), **values)


def encoding(**changes: Any) -> str:
    """An encoding; `mode` is that of its calibration."""
    values = {"trajectory": "cartesian", "x": H, "y": W, "z": 1, "fov": 64.0, "recon": 64.0}
    values |= {"width": 60, "center": 10, "mode": "", **changes}
    if values["mode"]:
        values["mode"] = (
            "<parallelImaging><accelerationFactor><kspace_encoding_step_1>2"
            "</kspace_encoding_step_1><kspace_encoding_step_2>1</kspace_encoding_step_2>"
            f"</accelerationFactor><calibrationMode>{values['mode']}</calibrationMode>"
            "</parallelImaging>"
        )
    return (
        "<encoding><encodedSpace><matrixSize><x>{x}</x>"
        "<y>{y}</y><z>{z}</z></matrixSize><fieldOfView_mm><x>{fov}</x><y>{width}</y><z>3</z>"
        "</fieldOfView_mm></encodedSpace><reconSpace><matrixSize><x>16</x><y>20</y><z>1</z>"
        "</matrixSize><fieldOfView_mm><x>{recon}</x><y>{width}</y><z>3</z></fieldOfView_mm>"
        "</reconSpace><trajectory>{trajectory}</trajectory><encodingLimits>"
        "<kspace_encoding_step_1><minimum>0</minimum><maximum>19</maximum>"
        "<center>{center}</center></kspace_encoding_step_1></encodingLimits>{mode}</encoding>"
    ).format(**values)


def record(line: np.ndarray, column: int, number: int, **changes: Any) -> tuple[Any, np.ndarray]:
    """One acquisition, `[coils, samples]`, of slice `number`."""
    head = np.zeros((), HEAD)
    head["number_of_samples"], head["active_channels"] = line.shape[1], line.shape[0]
    head["center_sample"] = line.shape[1] // 2
    head["idx"]["kspace_encode_step_1"], head["idx"]["slice"] = column, number
    head["position"] = np.array([10, 20, 30]) + number * STEP * NORMAL
    head["read_dir"], head["phase_dir"], head["slice_dir"] = READ, PHASE, NORMAL
    for name, value in changes.items():
        (head["idx"] if name in head["idx"].dtype.names else head)[name] = value
    return head, np.ascontiguousarray(line, np.complex64).view(np.float32).ravel()


def write(
    path: Path,
    records: list[tuple[Any, np.ndarray]],
    xml: str | None = None,
    name: str = "dataset",
) -> Path:
    """Adds a measurement to a file."""
    floats = h5py.vlen_dtype(np.dtype("<f4"))
    data = np.empty(len(records), np.dtype([("head", HEAD), ("traj", floats), ("data", floats)]))
    for i, (head, values) in enumerate(records):
        data[i] = (head, np.zeros(0, np.float32), values)
    with h5py.File(path, "a") as file:
        group = file.create_group(name)
        group["data"] = data
        group.create_dataset(
            "xml", data=[header() if xml is None else xml], dtype=h5py.string_dtype()
        )
    return path


def records(
    kspace: np.ndarray, columns: Any = range(W), **changes: Any
) -> list[tuple[Any, np.ndarray]]:
    return [
        record(kspace[number, :, :, column], column, number, **changes)
        for column in columns
        for number in range(len(kspace))
    ]
