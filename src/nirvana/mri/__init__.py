"""MRI on a frozen language model: reconstruction of undersampled k-space, and reports.

    from nirvana.mri import read_scan, reconstruct, report

    scan = read_scan("scan.h5")
    images = reconstruct(scan)          # float32 [slices, H, W]
    print(report(scan).text)            # research software, not for diagnosis

The functions are imported when they are first used, so that the import stays quick.

K-space is complex, `[slices, coils, H, W]`: H is the readout direction, W the phase-encoding
direction, whose columns are measured or left out as a whole. Its origin lies at
`[H // 2, W // 2]`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nirvana.mri.adapt.config import ScanAdaptConfig
    from nirvana.mri.io import read_scan
    from nirvana.mri.model.checkpoint import load_codec
    from nirvana.mri.pipeline import reconstruct
    from nirvana.mri.reports.reporter import load_reporter
    from nirvana.mri.reports.scan_report import report

__all__ = ["ScanAdaptConfig", "load_codec", "load_reporter", "read_scan", "reconstruct", "report"]

_HOMES = {
    "ScanAdaptConfig": "nirvana.mri.adapt.config",
    "load_codec": "nirvana.mri.model.checkpoint",
    "load_reporter": "nirvana.mri.reports.reporter",
    "read_scan": "nirvana.mri.io",
    "reconstruct": "nirvana.mri.pipeline",
    "report": "nirvana.mri.reports.scan_report",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nirvana.mri' has no attribute {name!r}")
