"""Every setting of the product, once: default, meaning, allowed values.

The dataclasses here are the only home of defaults. `configs/` nests them into an
`ml_collections.ConfigDict`, `sss_jax.config` checks values against the metadata, and the
pure functions take the dataclass itself. They are frozen and hashable, so they may be
static arguments of a jitted function.
"""

import dataclasses
from typing import Any


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Declare a setting: its default, its meaning and either its choices or its closed range."""
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


KEPT = ("nothing", "attention", "products")
"""What a recomputed part may keep: nothing, its attention, or the results of all its products."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The SAM-2 network."""

    preset: str = option(
        "tiny", "network size", choices=("nano", "tiny", "small", "base_plus", "large")
    )
    image_size: int = option(1024, "side of the square input, pixels", low=32, high=4096)
    num_classes: int = option(1, "foreground classes K; labels are 0..K", low=1, high=254)
    dtype: str = option("float32", "computation type", choices=("float32", "bfloat16"))
    remat: bool = option(
        False, "recompute the trunk's blocks and memory attention's layers in the backward pass"
    )
    remat_keeps: str = option(
        "nothing",
        "what a recomputed block keeps: nothing, its attention, or the results of all its products",
        choices=KEPT,
    )
    loop_blocks: bool = option(False, "equal layers as a loop, which compiles sooner")
    kernels: str = option(
        "auto",
        "kernels of our own: whole layers for TPUs, large attention for GPUs (A100 and later); "
        "auto: there, where mesh.context is 1",
        choices=("auto", "tpu", "gpu", "off"),
    )
    init: str = option("", "folder of converted SAM-2 weights to start from; empty: random")
    class_token_std: float = option(
        0.0, "initial spread of the class tokens; 0 leaves converted SAM-2 weights exact", low=0.0
    )


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """From NIfTI files to fixed-shape clips."""

    split: str = option("split.json", "split file inside the data folder")
    normalise: str = option(
        "percentile", "intensity scaling to [0, 1]", choices=("percentile", "min_max", "window")
    )
    percentile_low: float = option(0.5, "lower percentile clipped to 0", low=0.0, high=50.0)
    percentile_high: float = option(99.5, "upper percentile clipped to 1", low=50.0, high=100.0)
    window_low: float = option(-1000.0, "lower end of the CT window, HU")
    window_high: float = option(1000.0, "upper end of the CT window, HU")
    slice_axis: int = option(
        -1, "canonical (R, A, S) axis to cut along; -1: the coarsest", low=-1, high=2
    )
    fit: str = option(
        "letterbox",
        "slice to square: letterbox keeps the aspect ratio, stretch fills the square",
        choices=("letterbox", "stretch"),
    )
    canvas: int = option(
        0,
        "side of the square in which training slices travel, to be resized on the device, pixels; "
        "0: they are resized before",
        low=0,
        high=4096,
    )
    clip_slices: int = option(8, "slices S in a training clip", low=1, high=1024)
    max_stride: int = option(1, "largest step between a clip's slices, drawn per clip", low=1)
    foreground_share: float = option(
        0.75, "share of labelled clips centred on a labelled slice", low=0.0, high=1.0
    )
    cache_bytes: int = option(
        2**31, "memory for decoded volumes, bytes; least recently used ones go first", low=0
    )
    threads: int = option(2, "reading threads", low=0, high=256)
    max_voxels: int = option(2**29, "refuse volumes that declare more voxels", low=1)
    class_names: tuple[str, ...] = option((), "names of classes 1..K, for tables and reports")


@dataclasses.dataclass(frozen=True)
class WeakOptions:
    """Geometric augmentation, equal for every slice of a clip (UniMatch V2's medical recipe)."""

    rot90_flip: float = option(0.5, "probability of rot90 + flip, else rotation", low=0, high=1)
    rotate: float = option(0.5, "probability of a rotation otherwise", low=0, high=1)
    degrees: float = option(20.0, "largest rotation, degrees", low=0, high=180)
    scale_low: float = option(0.8, "smallest zoom", low=0.1, high=10)
    scale_high: float = option(1.25, "largest zoom", low=0.1, high=10)
    shift: float = option(0.0, "largest shift, share of the side", low=0, high=0.5)


@dataclasses.dataclass(frozen=True)
class StrongOptions:
    """Photometric augmentation and CutMix (UniMatch V2)."""

    labelled: float = option(
        0.0,
        "probability that a labelled clip is changed photometrically too; UniMatch V2: never",
        low=0,
        high=1,
    )
    jitter: float = option(0.8, "probability of brightness and contrast jitter", low=0, high=1)
    brightness: float = option(0.5, "largest relative change of brightness", low=0, high=1)
    contrast: float = option(0.5, "largest relative change of contrast", low=0, high=1)
    blur: float = option(0.5, "probability of Gaussian blur", low=0, high=1)
    sigma_low: float = option(0.1, "smallest blur sigma, pixels", low=0.01, high=20)
    sigma_high: float = option(2.0, "largest blur sigma, pixels", low=0.01, high=20)
    cutmix: float = option(0.5, "probability of CutMix", low=0, high=1)
    area_low: float = option(0.02, "smallest share of the image that is pasted", low=0, high=1)
    area_high: float = option(0.4, "largest share of the image that is pasted", low=0, high=1)
    aspect_low: float = option(0.3, "smallest aspect ratio of the pasted box", low=0.05, high=20)
    aspect_high: float = option(3.3, "largest aspect ratio of the pasted box", low=0.05, high=20)


@dataclasses.dataclass(frozen=True)
class PCSWOptions:
    """Prompt generator with physical constraints and a sliding window (SSS, PCSW)."""

    enabled: bool = option(True, "make prompts from pseudo-masks; false: class tokens alone")
    threshold: float = option(0.5, "probability above which a pixel is foreground", low=0, high=1)
    tau: float = option(0.8, "share of the largest component that accepts a window", low=0, high=1)
    connectivity: int = option(6, "neighbours of a voxel", choices=(6, 26))
    prompts: str = option(
        "best_slice",
        "best_slice: one prompt per class and volume; every_k: on every k-th slice of the object",
        choices=("best_slice", "every_k"),
    )
    every: int = option(2, "k of every_k", low=1)
    source: str = option("weak", "pseudo-masks that make the prompts", choices=("weak", "per_view"))


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """Memory between the slices of a volume (SAM 2; Medical SAM 2)."""

    kind: str = option(
        "fifo",
        "none: every slice by itself; fifo: from the prompt slice outwards, SAM-2's memory; "
        "self_sorting: images without order remember other images, Medical SAM 2's bank",
        choices=("none", "fifo", "self_sorting"),
    )
    truncate: int = option(
        0, "slices through which gradients of memories flow; 0: all of the clip", low=0
    )
    remat: bool = option(
        True, "recompute a slice's memory attention and decoder in the backward pass"
    )
    remat_keeps: str = option(
        "attention",
        "what a recomputed slice keeps: nothing, its attention, or the results of all its products",
        choices=KEPT,
    )
    unroll: str = option(
        "auto",
        "clips of up to 8 slices one step after the other instead of as a loop: half the work of "
        "looking at memories; auto: except on CPUs, where it compiles for longer",
        choices=("auto", "on", "off"),
    )
    capacity: int = option(16, "entries of the self-sorting bank, per class", low=2, high=1024)
    samples: int = option(7, "entries of that bank that an image looks at", low=1, high=1024)


@dataclasses.dataclass(frozen=True)
class DFEOptions:
    """Discriminative feature enhancement (SSS, DFE)."""

    enabled: bool = option(True, "use DFE")
    pair: str = option(
        "strong_strong",
        "views that are compared; the weak one tells the strong ones what they should find out",
        choices=("strong_strong", "weak_strong"),
    )
    merge: str = option(
        "residual", "residual: F_s + F_adj; replace: F_adj", choices=("residual", "replace")
    )
    enhance_weak: bool = option(False, "add the adjusted features to the weak side too")
    level_4: bool = option(
        False, "use the finest level (stride 4), as the paper does: a fifth of a step's operations"
    )
    level_8: bool = option(True, "use the middle level (stride 8)")
    level_16: bool = option(True, "use the coarsest level (stride 16)")
    remat: bool = option(True, "recompute the projections in the backward pass")


@dataclasses.dataclass(frozen=True)
class SemiOptions:
    """Weak-to-strong consistency (UniMatch V2; SSS, figure 2)."""

    enabled: bool = option(True, "learn from unlabelled images; false: labelled ones alone")
    views: int = option(2, "strong views", choices=(1, 2))
    teacher: str = option(
        "ema", "makes the pseudo-labels; student: the network itself", choices=("ema", "student")
    )
    ema_decay: float = option(0.996, "largest decay of the teacher", low=0, high=1)
    confidence: float = option(0.95, "tau_c: confidence a pseudo-label needs", low=0, high=1)
    weight: float = option(1.0, "lambda_u: weight of the unlabelled loss", low=0)
    ramp_steps: int = option(0, "steps over which lambda_u grows; 0: at once", low=0)
    ramp: str = option(
        "linear",
        "shape of that growth; gaussian: exp(-5 (1 - t)^2), next to nothing in the first third",
        choices=("linear", "gaussian"),
    )
    unlabelled_dice: bool = option(False, "add Dice on the confident pixels")
    dropout: bool = option(True, "complementary channel dropout between the two strong views")
    encoder_gradient: bool = option(
        True, "the unlabelled loss trains the image encoder too; false: only what follows it"
    )
    labelled_prompts: str = option(
        "mixed",
        "prompts of the labelled branch",
        choices=("mixed", "gt_box", "gt_mask", "pcsw", "none"),
    )
    box_jitter: float = option(0.1, "spread of ground-truth boxes, share of their side", low=0)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights of the supervised losses."""

    cross_entropy: float = option(1.0, "weight of the cross-entropy", low=0)
    dice: float = option(1.0, "weight of the soft Dice loss", low=0)
    coarse: float = option(0.4, "weight of both on the coarse head", low=0)
    iou: float = option(0.05, "weight of the L1 loss on the predicted IoU", low=0)
    presence: float = option(0.05, "weight of the object-score loss (class in this slice?)", low=0)
    smooth: float = option(1e-5, "smoothing of the Dice ratio", low=0)


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW."""

    rate: float = option(2e-4, "learning rate of decoder and new parts", low=0)
    encoder_rate: float = option(5e-6, "learning rate of the image encoder", low=0)
    schedule: str = option("poly", "decay of the rates", choices=("poly", "cosine", "constant"))
    power: float = option(0.9, "power of the poly schedule", low=0)
    warmup_steps: int = option(0, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.01, "decoupled weight decay of matrices and kernels", low=0)
    clip_norm: float = option(1.0, "largest global gradient norm; 0: no clipping", low=0)
    b2: float = option(0.999, "second-moment decay of Adam", low=0, high=1)
    factors: tuple[str, ...] = option(
        (), "PATH=FACTOR: scales the rate of parameters below a path; 0 freezes them"
    )


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """The run."""

    steps: int = option(10_000, "optimizer steps", low=1)
    labelled_batch: int = option(4, "labelled clips in a global batch", low=1)
    unlabelled_batch: int = option(4, "unlabelled clips in a global batch", low=1)
    accumulate: int = option(
        1, "micro-batches whose gradients are averaged; each is a batch of its own", low=1
    )
    seed: int = option(0, "seed of parameters, data order and augmentation", low=0)
    parallel: str = option("mesh", "driver of the step", choices=("mesh", "pmap"))
    log_every: int = option(10, "steps between log lines", low=1)
    eval_every: int = option(500, "steps between validations; 0: only at the end", low=0)
    save_every: int = option(500, "steps between checkpoints", low=1)
    all_labels: bool = option(
        False, "use the labels of the unlabelled cases too (the ceiling of a comparison)"
    )
    labelled_subjects: int = option(
        0, "keep the first n labelled subjects, the rest becomes unlabelled; 0: all", low=0
    )
    nonfinite_limit: int = option(1, "non-finite steps before the run stops", low=1)


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Axes of the device mesh; their product is the number of devices."""

    data: int = option(
        -1, "devices over which clips are spread; -1: what the other axes leave", low=-1
    )
    fsdp: int = option(
        1, "devices that share parameters, teacher and optimizer; clips are spread too", low=1
    )
    context: int = option(1, "devices that share the rows of every image", low=1)


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Prediction and metrics."""

    weights: str = option("ema", "parameters that predict", choices=("ema", "student"))
    slice_bucket: int = option(16, "volumes are padded to a multiple of this many slices", low=1)
    encode_batch: int = option(16, "slices that pass through the network at once", low=1)
    keep_bytes: int = option(
        2**30, "features of a volume are kept up to this size, else computed twice", low=0
    )
    flip_average: bool = option(False, "average the prediction over in-plane flips")
    nsd_tolerance: float = option(1.0, "tolerance of NSD, mm (or voxels)", low=0)


@dataclasses.dataclass(frozen=True)
class Options:
    """All groups; the tree of a configuration."""

    method: str = option(
        "sss",
        "name of the method, for logs",
        choices=("supervised", "fixmatch", "unimatch_v2", "sss", "sss_sketch"),
    )
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    weak: WeakOptions = dataclasses.field(default_factory=WeakOptions)
    strong: StrongOptions = dataclasses.field(default_factory=StrongOptions)
    pcsw: PCSWOptions = dataclasses.field(default_factory=PCSWOptions)
    memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)
    dfe: DFEOptions = dataclasses.field(default_factory=DFEOptions)
    semi: SemiOptions = dataclasses.field(default_factory=SemiOptions)
    loss: LossOptions = dataclasses.field(default_factory=LossOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    train: TrainOptions = dataclasses.field(default_factory=TrainOptions)
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
