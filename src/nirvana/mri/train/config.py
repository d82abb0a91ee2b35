"""The configuration of a codec's training."""

from dataclasses import dataclass, field
from typing import Literal

from nirvana.config import require
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.report_tokens import PROMPT
from nirvana.mri.physics.masks import MaskKind, Sampling
from nirvana.mri.physics.point_masks import POINT_KINDS, PointSampling
from nirvana.train.config import OptimConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class MriDataSection:
    """[data]: volumes, and how they are scanned. A batch draws one size and one number of coils,
    and a mask for every slice."""

    # magnitude volumes (NIfTI, npy), or fully sampled scans (fastMRI .h5) of the numbers of coils
    # below; patterns with * are expanded
    train: list[str]
    valid: list[str] = field(default_factory=list)  # the same, or both, scored during the training
    reports: str = ""  # JSON lines of {"volume", "slice", "report"}, the texts of stage 1
    batch_size: int = 8  # slices in a micro batch
    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(128, 96), (192, 160)])  # H, W
    coils: list[int] = field(default_factory=lambda: [4, 8, 12])  # number of receive coils
    masks: list[MaskKind] = field(default_factory=lambda: ["equispaced", "random"])
    accelerations: list[float] = field(default_factory=lambda: [4.0, 8.0])
    center_fractions: list[float] = field(default_factory=lambda: [0.08, 0.04])  # one for each
    # share of the batches with masks of points instead, as of scans with two phase encodings, of
    # every kind in `physics.point_masks` and of the same accelerations
    points: float = 0.0
    # measured sensitivities of coils, complex .npy [coils, H, W], for half of the simulated scans
    coil_maps: list[str] = field(default_factory=list)
    valid_slices: int = 8  # evenly spaced slices of every validation volume

    def __post_init__(self) -> None:
        for name in ("train", "sizes", "coils", "masks", "accelerations"):
            require(bool(getattr(self, name)), f"data.{name}", getattr(self, name), "not empty")
        require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        require(self.valid_slices >= 1, "data.valid_slices", self.valid_slices, "at least 1")
        require(
            len(self.center_fractions) == len(self.accelerations),
            "data.center_fractions",
            self.center_fractions,
            f"{len(self.accelerations)} numbers, one for each acceleration",
        )
        sides = [side for size in self.sizes for side in size]
        require(min(sides) >= 8, "data.sizes", self.sizes, "sides of at least 8 pixels")
        right = "from 1 to 256 each"
        require(all(1 <= n <= 256 for n in self.coils), "data.coils", self.coils, right)
        require(0 <= self.points <= 1, "data.points", self.points, "a share, 0 to 1")
        for size in self.sizes:  # these raise where there is no such mask
            for sampling in self.samplings:
                sampling.mask(size[1], 0)
            for sampling in self.point_samplings if self.points else ():
                sampling.mask(size, 0)

    @property
    def samplings(self) -> list[Sampling]:
        """Every kind of mask with every acceleration."""
        pairs = list(zip(self.accelerations, self.center_fractions, strict=True))
        return [Sampling(kind, *pair) for kind in self.masks for pair in pairs]

    @property
    def point_samplings(self) -> list[PointSampling]:
        """Every kind of masks of points with every acceleration."""
        return [PointSampling(kind, each) for kind in POINT_KINDS for each in self.accelerations]


@dataclass(frozen=True)
class StageSection:
    """[stage]: what is trained, and on what."""

    # "1": the encoder, on reports; "2": the decoder and the cascades after it, on images, with the
    # encoder frozen; "joint": everything at once
    name: Literal["1", "2", "joint"] = "joint"
    prompt: str = PROMPT  # what the backbone reads between image and report; a blank follows it
    report_tokens: int = 128  # to which longer reports are cut
    text_weight: float = 0.1  # of the reports' cross-entropy in the joint loss, with data.reports
    # "image": the weighted errors below against the fully sampled image; "ssdu": self-supervised,
    # some of the measured samples are held back from the input and predicted (arXiv 1912.07669)
    loss: Literal["image", "ssdu"] = "image"
    held_share: float = 0.4  # of the samples outside of the central block, with "ssdu"
    ssim_weight: float = 1.0  # of 1 - SSIM in the loss
    l1_weight: float = 1.0  # of the mean absolute error in the loss
    l2_weight: float = 0.0  # of the slices' root mean square error in the loss

    def __post_init__(self) -> None:
        require(self.report_tokens >= 1, "stage.report_tokens", self.report_tokens, "at least 1")
        require(0 < self.held_share < 1, "stage.held_share", self.held_share, "between 0 and 1")
        for name in ("text_weight", "ssim_weight", "l1_weight", "l2_weight"):
            require(getattr(self, name) >= 0, f"stage.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class MriConfig:
    """All of a codec's training."""

    data: MriDataSection
    run: RunConfig
    codec: CodecConfig = field(default_factory=CodecConfig)
    stage: StageSection = field(default_factory=StageSection)
    simulation: Simulation = field(default_factory=Simulation)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        recompute, right = self.parallel.recompute, "0: no block of a codec is recomputed"
        require(recompute == 0, "parallel.recompute", recompute, right)
        if self.stage.name == "2":
            right = "the codec that stage 1 made, as the folder of its model"
            require(bool(self.run.initial), "run.initial", self.run.initial, right)
        if self.stage.name == "1":
            right = "a file of reports, which stage 1 is trained on"
            require(bool(self.data.reports), "data.reports", self.data.reports, right)
        if self.stage.loss == "ssdu":
            right = "empty with stage.loss = 'ssdu', which trains on images alone"
            require(not self.data.reports, "data.reports", self.data.reports, right)
        if self.data.reports:
            right = "a language model, which reads reports"
            require(self.codec.backbone != "none", "codec.backbone", self.codec.backbone, right)
