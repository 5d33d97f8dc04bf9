"""The one table of names: official checkpoints, transformers, and our parameter paths.

Every row is a module. Our path follows from the official name (`a.b.0` is `a/b_0`) and from the
kind of module: a linear layer's `weight` is our `kernel`, transposed, and so on. A name that no
row or two rows describe is an error, so each way is a one-to-one map.

Source: the state dicts of SAM 2 (Ravi et al. 2024) and of transformers' `Sam2VideoModel`.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sss_jax.conversion.official import BUFFER
from sss_jax.conversion.tensors import Refused, Spec, Tensors, lazy, listed
from sss_jax.models.presets import POINT_KINDS


class Leaf(NamedTuple):
    """Our name of one array of a module, and the order of axes that makes it ours.

    Attributes:
        ours: last component of our path; "" where the module's own name is the array's.
        axes: our axes as positions of the official ones; None: any rank, unchanged.
    """

    ours: str
    axes: tuple[int, ...] | None


Kind = dict[str, Leaf]
"""Arrays of a module, by the last component of their official names."""

Row = tuple[str, str, Kind]
"""Official module, transformers' module, kind."""

_BIAS = Leaf("bias", (0,))
LINEAR: Kind = {"weight": Leaf("kernel", (1, 0)), "bias": _BIAS}
CONV: Kind = {"weight": Leaf("kernel", (2, 3, 1, 0)), "bias": _BIAS}  # also depthwise
DECONV: Kind = {"weight": Leaf("kernel", (2, 3, 0, 1)), "bias": _BIAS}
NORM: Kind = {"weight": Leaf("scale", (0,)), "bias": _BIAS}
TABLE: Kind = {"weight": Leaf("embedding", (0, 1))}
MAP: Kind = {"": Leaf("", (0, 2, 3, 1))}
BARE: Kind = {"": Leaf("", None)}

_PLACEHOLDERS = {
    "i": r"0|[1-9]\d*",
    "n": r"\d",
    "qkv": "q|k|v",
    "way": "cross_attn_token_to_image|cross_attn_image_to_token",
    "head": r"iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d",
}

_TRUNK, _THEIR_TRUNK = "image_encoder.trunk", "vision_encoder.backbone"
_BLOCK, _THEIR_BLOCK = f"{_TRUNK}.blocks.{{i}}", f"{_THEIR_TRUNK}.blocks.{{i}}"
_MASK, _THEIR_MASK = "sam_prompt_encoder.mask_downscaling", "prompt_encoder.mask_embed"
_TWO_WAY, _THEIR_TWO_WAY = "sam_mask_decoder.transformer", "mask_decoder.transformer"
_STEP, _THEIR_STEP = f"{_TWO_WAY}.layers.{{i}}", f"{_THEIR_TWO_WAY}.layers.{{i}}"
_DOWN, _THEIR_DOWN = "memory_encoder.mask_downsampler", "memory_encoder.mask_downsampler"
_FUSER, _THEIR_FUSER = "memory_encoder.fuser.layers.{i}", "memory_encoder.memory_fuser.layers.{i}"
_LAYER = "memory_attention.layers.{i}"
_POINTS = "sam_prompt_encoder.point_embeddings.{i}"
_THEIR_POINTS = "prompt_encoder.point_embed"
_FREQUENCIES = "prompt_encoder.shared_embedding.positional_embedding"
_FREQUENCIES_AGAIN = "shared_image_embedding.positional_embedding"

ROWS: tuple[Row, ...] = (
    ("maskmem_tpos_enc", "memory_temporal_positional_encoding", BARE),
    ("no_mem_embed", "no_memory_embedding", BARE),
    ("no_mem_pos_enc", "no_memory_positional_encoding", BARE),
    ("no_obj_ptr", "no_object_pointer", BARE),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter", BARE),
    # Image encoder.
    (f"{_TRUNK}.pos_embed", f"{_THEIR_TRUNK}.pos_embed", MAP),
    (f"{_TRUNK}.pos_embed_window", f"{_THEIR_TRUNK}.pos_embed_window", MAP),
    (f"{_TRUNK}.patch_embed.proj", f"{_THEIR_TRUNK}.patch_embed.projection", CONV),
    (f"{_BLOCK}.norm{{n}}", f"{_THEIR_BLOCK}.layer_norm{{n}}", NORM),
    (f"{_BLOCK}.attn.qkv", f"{_THEIR_BLOCK}.attn.qkv", LINEAR),
    (f"{_BLOCK}.attn.proj", f"{_THEIR_BLOCK}.attn.proj", LINEAR),
    (f"{_BLOCK}.mlp.layers.0", f"{_THEIR_BLOCK}.mlp.proj_in", LINEAR),
    (f"{_BLOCK}.mlp.layers.1", f"{_THEIR_BLOCK}.mlp.proj_out", LINEAR),
    (f"{_BLOCK}.proj", f"{_THEIR_BLOCK}.proj", LINEAR),
    ("image_encoder.neck.convs.{i}.conv", "vision_encoder.neck.convs.{i}", CONV),
    # Prompt encoder.
    (BUFFER, _FREQUENCIES, BARE),
    (_POINTS, f"{_THEIR_POINTS}.{{i}}", TABLE),  # there one table; see `from_hugging_face`
    ("sam_prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed", TABLE),
    ("sam_prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed", TABLE),
    (f"{_MASK}.0", f"{_THEIR_MASK}.conv1", CONV),
    (f"{_MASK}.1", f"{_THEIR_MASK}.layer_norm1", NORM),
    (f"{_MASK}.3", f"{_THEIR_MASK}.conv2", CONV),
    (f"{_MASK}.4", f"{_THEIR_MASK}.layer_norm2", NORM),
    (f"{_MASK}.6", f"{_THEIR_MASK}.conv3", CONV),
    # Mask decoder.
    ("sam_mask_decoder.iou_token", "mask_decoder.iou_token", TABLE),
    ("sam_mask_decoder.mask_tokens", "mask_decoder.mask_tokens", TABLE),
    ("sam_mask_decoder.obj_score_token", "mask_decoder.obj_score_token", TABLE),
    ("sam_mask_decoder.conv_s0", "mask_decoder.conv_s0", CONV),
    ("sam_mask_decoder.conv_s1", "mask_decoder.conv_s1", CONV),
    ("sam_mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1", DECONV),
    ("sam_mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm", NORM),
    ("sam_mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2", DECONV),
    ("sam_mask_decoder.{head}.layers.0", "mask_decoder.{head}.proj_in", LINEAR),
    ("sam_mask_decoder.{head}.layers.1", "mask_decoder.{head}.layers.0", LINEAR),
    ("sam_mask_decoder.{head}.layers.2", "mask_decoder.{head}.proj_out", LINEAR),
    *(
        (f"{_TWO_WAY}.{place}.{ours}_proj", f"{_THEIR_TWO_WAY}.{place}.{theirs}_proj", LINEAR)
        for place in ("layers.{i}.self_attn", "layers.{i}.{way}", "final_attn_token_to_image")
        for ours, theirs in (("{qkv}", "{qkv}"), ("out", "o"))
    ),
    (f"{_STEP}.mlp.layers.0", f"{_THEIR_STEP}.mlp.proj_in", LINEAR),
    (
        f"{_STEP}.mlp.layers.1",
        f"{_THEIR_STEP}.mlp.proj_out",
        LINEAR,
    ),
    (f"{_STEP}.norm{{n}}", f"{_THEIR_STEP}.layer_norm{{n}}", NORM),
    (f"{_TWO_WAY}.norm_final_attn", f"{_THEIR_TWO_WAY}.layer_norm_final_attn", NORM),
    # Memory attention.
    *(
        (f"{_LAYER}.{place}.{ours}_proj", f"{_LAYER}.{place}.{theirs}_proj", LINEAR)
        for place in ("self_attn", "cross_attn_image")
        for ours, theirs in (("{qkv}", "{qkv}"), ("out", "o"))
    ),
    (f"{_LAYER}.linear{{n}}", f"{_LAYER}.linear{{n}}", LINEAR),
    (f"{_LAYER}.norm{{n}}", f"{_LAYER}.layer_norm{{n}}", NORM),
    ("memory_attention.norm", "memory_attention.layer_norm", NORM),
    # Memory encoder.
    *(
        row
        for i in range(4)
        for row in (
            (f"{_DOWN}.encoder.{3 * i}", f"{_THEIR_DOWN}.layers.{i}.conv", CONV),
            (f"{_DOWN}.encoder.{3 * i + 1}", f"{_THEIR_DOWN}.layers.{i}.layer_norm", NORM),
        )
    ),
    (f"{_DOWN}.encoder.12", f"{_THEIR_DOWN}.final_conv", CONV),
    ("memory_encoder.pix_feat_proj", "memory_encoder.feature_projection", CONV),
    (f"{_FUSER}.gamma", f"{_THEIR_FUSER}.scale", BARE),
    (f"{_FUSER}.dwconv", f"{_THEIR_FUSER}.depthwise_conv", CONV),
    (f"{_FUSER}.norm", f"{_THEIR_FUSER}.layer_norm", NORM),
    (f"{_FUSER}.pwconv{{n}}", f"{_THEIR_FUSER}.pointwise_conv{{n}}", LINEAR),
    ("memory_encoder.out_proj", "memory_encoder.projection", CONV),
    # Object pointers.
    ("obj_ptr_proj.layers.0", "object_pointer_proj.proj_in", LINEAR),
    ("obj_ptr_proj.layers.1", "object_pointer_proj.layers.0", LINEAR),
    ("obj_ptr_proj.layers.2", "object_pointer_proj.proj_out", LINEAR),
    ("obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer", LINEAR),
    ("mask_downsample", "mask_downsample", CONV),
)

META, HUGGING_FACE = 0, 1
NAMINGS = ("meta", "hugging face")
MAX_TENSORS = 10_000


class _Match(NamedTuple):
    """Where a name stands in the table: its row, what its placeholders say, and its array."""

    row: Row
    groups: dict[str, str]
    leaf: str

    def name(self, column: int) -> str:
        """The name in a column of the table."""
        module = _template(self.row, column).format(**self.groups)
        return f"{module}.{self.leaf}" if self.leaf else module


def naming(names: Iterable[str]) -> str:
    """Which of `NAMINGS` a checkpoint follows: the one that knows more of its names.

    Raises:
        CheckpointError: neither knows any.
    """
    names = list(names)
    if len(names) > MAX_TENSORS:
        raise Refused(f"it holds {len(names):,} tensors, far more than any SAM-2")
    known = [sum(bool(_matches(name, column)) for name in names) for column in (0, 1)]
    if not any(known):
        raise Refused(f"none of its {len(names)} names is one of SAM-2's: {listed(names)}")
    return NAMINGS[known.index(max(known))]


def to_ours(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested parameters of `models.sam2.Sam2` from tensors with official names.

    Raises:
        CheckpointError: a name is not in the table, or an array has another number of axes.
    """
    return nest(ours(lazy(tensors)))


def ours(tensors: Tensors) -> Tensors:
    """Tensors with official names under our paths "a/b/c" and in our layouts."""
    places, specs = {}, {}
    for name, match in _resolve(tensors, META).items():
        path, axes = _our_path(match)
        places[path] = name, axes
        specs[path] = _permuted(name, tensors.specs[name], axes)

    def read(path: str) -> np.ndarray:
        name, axes = places[path]
        return _transposed(tensors[name], axes)

    return Tensors(specs, read)


def to_meta(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors with official names and layouts from nested parameters; undoes `to_ours`.

    Raises:
        CheckpointError: a path is not in the table, or an array has another number of axes.
    """
    return dict(meta(lazy(flatten(params))))


def meta(tensors: Tensors) -> Tensors:
    """Tensors under our paths "a/b/c" with official names and layouts."""
    guesses = {_guess_name(path): path for path in tensors}
    places, specs = {}, {}
    for name, match in _resolve(guesses, META).items():
        path, axes = _our_path(match)
        if path != guesses[name]:
            raise Refused(f"{listed([guesses[name]])} is no path of SAM-2's parameters")
        back = None if axes is None else tuple(int(i) for i in np.argsort(axes))
        places[name] = path, back
        specs[name] = _permuted(path, tensors.specs[path], back)

    def read(name: str) -> np.ndarray:
        path, axes = places[name]
        return _transposed(tensors[path], axes)

    return Tensors(specs, read)


def from_hugging_face(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors with official names from those of transformers' `Sam2VideoModel`.

    There, the point embeddings are one table and the fixed frequencies are stored twice; either
    copy may be absent, and both must agree.

    Raises:
        CheckpointError: a name is not in the table, or the two copies differ.
    """
    table = lazy(tensors)
    rows: dict[str, tuple[str, int | None]] = {}
    for name in _without_copy(table):
        source = name
        if name == f"{_THEIR_POINTS}.weight" and table.specs[name].shape[:1] == (POINT_KINDS,):
            rows |= {f"{_THEIR_POINTS}.{i}.weight": (name, i) for i in range(POINT_KINDS)}
            continue
        rows[_FREQUENCIES if name == _FREQUENCIES_AGAIN else name] = source, None
    places = {match.name(META): rows[name] for name, match in _resolve(rows, HUGGING_FACE).items()}
    specs = {name: _row_spec(table.specs[source], row) for name, (source, row) in places.items()}

    def read(name: str) -> np.ndarray:
        source, row = places[name]
        return table[source] if row is None else table[source][row : row + 1]

    return Tensors(specs, read)


def _without_copy(table: Tensors) -> list[str]:
    """Names without the second copy of the frequencies, which must equal the first."""
    if not {_FREQUENCIES, _FREQUENCIES_AGAIN} <= table.specs.keys():
        return list(table)
    if not np.array_equal(table[_FREQUENCIES], table[_FREQUENCIES_AGAIN]):
        raise Refused(f"{_FREQUENCIES} and {_FREQUENCIES_AGAIN} should be equal, but differ")
    return [name for name in table if name != _FREQUENCIES_AGAIN]


def _row_spec(spec: Spec, row: int | None) -> Spec:
    return spec if row is None else Spec((1, *spec.shape[1:]), spec.dtype)


def to_hugging_face(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of transformers' `Sam2VideoModel` from those with official names.

    Raises:
        CheckpointError: a name is not in the table.
    """
    found, points = {}, {}
    for name, match in _resolve(tensors, META).items():
        if match.row[META] == _POINTS:
            points[int(match.groups["i"])] = tensors[name]
        else:
            found[match.name(HUGGING_FACE)] = tensors[name]
    if points:
        found[f"{_THEIR_POINTS}.weight"] = np.concatenate([points[i] for i in sorted(points)])
    if _FREQUENCIES in found:
        found[_FREQUENCIES_AGAIN] = found[_FREQUENCIES]
    return found


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays of nested dicts by "/"-joined path."""
    flat: dict[str, np.ndarray] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = np.asarray(value)
    return flat


def nest(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts from arrays by "/"-joined path; undoes `flatten`."""
    root: dict[str, Any] = {}
    for path, array in tensors.items():
        *folders, leaf = path.split("/")
        node = root
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return root


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    """Both names of every row as expressions that capture its placeholders."""
    return [(_compile(row[0], row[2]), _compile(row[1], row[2])) for row in ROWS]


def _template(row: Row, column: int) -> str:
    return row[1] if column == HUGGING_FACE else row[0]


def _compile(template: str, kind: Kind) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    pieces[::2] = map(re.escape, pieces[::2])
    pieces[1::2] = (f"(?P<{name}>{_PLACEHOLDERS[name]})" for name in pieces[1::2])
    leaves = "|".join(kind)
    return re.compile("".join(pieces) + (rf"\.(?P<leaf>{leaves})" if leaves else ""))


def _matches(name: str, column: int) -> list[_Match]:
    found = []
    for row, patterns in zip(ROWS, _patterns(), strict=True):
        if match := patterns[column].fullmatch(name):
            groups = match.groupdict()
            found.append(_Match(row, groups, groups.pop("leaf", "")))
    return found


def _resolve(names: Iterable[str], column: int) -> dict[str, _Match]:
    """The place of every name; one without any, or with two, is an error."""
    found = {name: _matches(name, column) for name in names}
    none = [name for name, matches in found.items() if not matches]
    several = [name for name, matches in found.items() if len(matches) > 1]
    if none or several:
        problem = "are not SAM-2's" if none else "stand twice in the table of names"
        raise Refused(f"{len(none or several)} names {problem}: {listed(none or several)}")
    return {name: matches[0] for name, matches in found.items()}


def _our_path(match: _Match) -> tuple[str, tuple[int, ...] | None]:
    """Our path of an official tensor, and the order of axes that makes it ours."""
    leaf = match.row[2][match.leaf]
    module = match.row[0].format(**match.groups)
    module = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", module).replace(".", "/")
    return (f"{module}/{leaf.ours}" if leaf.ours else module), leaf.axes


def _guess_name(path: str) -> str:
    """The only official name that can have this path of ours."""
    *modules, leaf = path.split("/")
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", module) for module in modules), leaf])


def _permuted(name: str, spec: Spec, axes: tuple[int, ...] | None) -> Spec:
    if axes is None:
        return spec
    if len(axes) != len(spec.shape):
        raise Refused(f"{listed([name])} has {len(spec.shape)} axes instead of {len(axes)}")
    return Spec(tuple(spec.shape[axis] for axis in axes), spec.dtype)


def _transposed(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return array if axes is None else np.ascontiguousarray(array.transpose(axes))
