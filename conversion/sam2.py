"""Convert SAM-2 checkpoints to a folder of ours, load it, and write it back for torch.

The folder holds `params.safetensors`, every parameter as float32 under its path in
`models.sam2.Sam2` ("a/b/c"), and `sam2.json`, which says what it is and where it came from.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sss_jax import __version__, atomic
from sss_jax.conversion import keymap, official, recognise, safetensors_file, torch_zip
from sss_jax.conversion.new_folder import folder_beside
from sss_jax.conversion.safetensors_file import read_safetensors
from sss_jax.conversion.tensors import Refused, Tensors, listed, open_file, reading, writing
from sss_jax.conversion.torch_zip import read_torch
from sss_jax.errors import CheckpointError, ConfigError

FORMAT = 1
PARAMS = "params.safetensors"
ABOUT = "sam2.json"
_MAX_ABOUT = 2**16


@dataclasses.dataclass(frozen=True)
class Info:
    """What a folder of converted weights is.

    Attributes:
        format: version of the folder's layout.
        variant: size of the network, a preset.
        version: "2.0" or "2.1".
        naming: names of the source, one of `keymap.NAMINGS`.
        source: file name of the source.
        source_sha256: its hash.
        source_dtypes: types of its tensors; other than float32 were widened, which is exact.
        tensors: number of arrays.
        parameters: trained numbers, without the fixed frequencies.
        params_sha256: hash of the file of parameters.
        product: version of this package that wrote the folder.
    """

    format: int
    variant: str
    version: str
    naming: str
    source: str
    source_sha256: str
    source_dtypes: list[str]
    tensors: int
    parameters: int
    params_sha256: str
    product: str


@dataclasses.dataclass(frozen=True)
class Converted:
    """A folder of converted weights."""

    folder: Path
    info: Info


def run(
    source: Path,
    target: Path,
    *,
    to_torch: bool = False,
    verify: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Convert in either direction; what the command line calls.

    Args:
        source: checkpoint of torch or safetensors; with `to_torch`, a folder of ours.
        target: the folder to make; with `to_torch`, the file.
        to_torch: write torch's file from our folder.
        verify: compare our network with an independent one on the converted weights.
        report: receives lines for the reader.

    Returns:
        JSON values: where the result is, what it is, and the comparison if there was one.

    Raises:
        CheckpointError: the source is no such checkpoint, or the target exists and differs.
        ConfigError: the arguments contradict each other, or packages for `verify` are missing.
    """
    source, target = Path(source), Path(target)
    if to_torch != source.is_dir():
        wanted = "a folder of converted weights" if to_torch else "the file of a checkpoint"
        raise ConfigError(f"{source}: the source must be {wanted}" + _other_way(source))
    if verify:
        from sss_jax.conversion import verify as comparison

        comparison.require_packages()
    info = write_back(source, target) if to_torch else convert(source, target).info
    report(f"{target}: SAM {info.version} {info.variant}, {info.parameters:,} parameters")
    result: dict[str, Any] = {"target": str(target), **dataclasses.asdict(info)}
    if verify:
        result["parity"] = comparison.verify(source if to_torch else target, report)
    return result


def _other_way(source: Path) -> str:
    if (source / ABOUT).is_file():
        return "; it is converted already, and --to-torch goes back"
    return ""


def convert(source: Path, target: Path) -> Converted:
    """Convert a checkpoint with official or transformers' names to a folder of ours.

    The folder appears whole or not at all.

    Args:
        source: torch's zip layout or safetensors, told apart by content.
        target: folder to make, with the folders above it. One that exists is only accepted if it
            is what would be written.

    Raises:
        CheckpointError: the source is damaged, is no published SAM-2, or has values that are not
            finite; the target exists and differs; the disk refuses.
    """
    _check_target(target)
    with open_checkpoint(source) as tensors, reading(source):
        naming = keymap.naming(tensors)
        named = tensors if naming == keymap.NAMINGS[0] else keymap.from_hugging_face(tensors)
        model = recognise.identify(named.specs)
        not_finite: list[str] = []
        converted = keymap.ours(recognise.widened(named, not_finite))
        info = Info(
            format=FORMAT,
            variant=model.variant,
            version=model.version,
            naming=naming,
            source=source.name,
            source_sha256=_sha256(source),
            source_dtypes=sorted({spec.dtype.name for spec in named.specs.values()}),
            tensors=len(named),
            parameters=count_parameters(named),
            params_sha256="",
            product=__version__,
        )
        with _new_folder(target) as folder:
            with atomic.replacing(folder / PARAMS) as path:
                safetensors_file.write_file(path, converted)
            if not_finite:
                raise Refused(
                    f"{len(not_finite)} tensors hold NaN or infinity: {listed(not_finite)}; "
                    "nothing was written. Use a checkpoint from before the run diverged"
                )
            info = dataclasses.replace(info, params_sha256=_sha256(folder / PARAMS))
            atomic.write_json(folder / ABOUT, dataclasses.asdict(info))
    return Converted(target, info)


def open_checkpoint(source: Path) -> Tensors:
    """Open a checkpoint of either container.

    Raises:
        CheckpointError: it is neither, or it is damaged.
    """
    with reading(source), open_file(source) as stream:
        start = stream.read(9)
    is_safetensors = start[8:9] == b"{" and not start.startswith(b"PK")
    return read_safetensors(source) if is_safetensors else read_torch(source)


def count_parameters(tensors: Tensors) -> int:
    """Trained numbers of tensors with official names."""
    specs = tensors.specs.items()
    return sum(math.prod(spec.shape) for name, spec in specs if name != official.BUFFER)


def load(folder: Path) -> tuple[Info, dict[str, Any]]:
    """Load converted weights.

    Returns:
        What they are, and nested parameters of `models.sam2.Sam2`, float32.

    Raises:
        CheckpointError: the folder is missing or damaged.
    """
    info, tensors = open_folder(folder)
    with tensors:
        return info, keymap.nest(tensors)


def open_folder(folder: Path) -> tuple[Info, Tensors]:
    """Check a folder of converted weights and open its parameters, by path "a/b/c".

    Raises:
        CheckpointError: the folder is missing or damaged.
    """
    info = _read_info(folder / ABOUT)
    path = folder / PARAMS
    with reading(path), contextlib.ExitStack() as undo:
        if _sha256(path) != info.params_sha256:
            raise Refused("its bytes do not match their checksum; convert the checkpoint again")
        tensors = undo.enter_context(read_safetensors(path))
        found = recognise.identify(keymap.meta(tensors).specs)
        if found != official.Model(info.variant, info.version):
            raise Refused(f"it holds {found}, but {ABOUT} says otherwise")
        undo.pop_all()
    return info, tensors


def _read_info(path: Path) -> Info:
    with reading(path), open_file(path) as stream:
        text = stream.read(_MAX_ABOUT + 1)
        try:
            info = Info(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise Refused("it is damaged; convert the checkpoint again") from None
        if info.format != FORMAT:
            raise Refused(f"it has format {info.format}, this version reads format {FORMAT}")
    return info


def write_back(folder: Path, destination: Path) -> Info:
    """Write converted weights as the official file `{"model": tensors}`, which torch loads.

    Args:
        folder: converted weights.
        destination: file to make. One that exists is only accepted if it is the same.

    Raises:
        CheckpointError: the folder is damaged, the file exists and differs, the disk refuses.
    """
    info, tensors = open_folder(folder)
    with tensors, writing(destination), atomic.replacing(destination) as temporary:
        torch_zip.write_file(temporary, _in_official_order(keymap.meta(tensors), info))
        if destination.exists() and not _same_bytes(temporary, destination):
            raise _exists(destination)
    return info


def _in_official_order(tensors: Tensors, info: Info) -> Tensors:
    order = official.shapes(official.Model(info.variant, info.version))
    return Tensors({name: tensors.specs[name] for name in order}, tensors.__getitem__)


def _check_target(target: Path) -> None:
    """Refuse a target that cannot be made, before any work is done for it."""
    if target.exists() and not (target / ABOUT).is_file():
        raise _exists(target)


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(
        f"{target} exists and holds something else; choose another target or remove it"
    )


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes `target` when the block ends without an error."""
    final = Path(os.path.abspath(target))  # "." has no name
    new_parents = [parent for parent in final.parents if not parent.exists()]
    with writing(target):
        try:
            with folder_beside(final, (PARAMS, ABOUT)) as temporary:
                yield temporary
                _settle(temporary, final)
        finally:
            for parent in new_parents:  # goes only where nothing came of it
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _settle(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; an equal one that is there already stays."""
    if target.exists():
        names = [PARAMS, ABOUT]
        if all(_same_bytes(temporary / n, target / n) for n in names):
            return
        raise _exists(target)
    os.rename(temporary, target)
    atomic.flush(target.parent)


def _same_bytes(first: Path, second: Path) -> bool:
    if not second.is_file() or first.stat().st_size != second.stat().st_size:
        return False
    return _sha256(first) == _sha256(second)


def _sha256(path: Path) -> str:
    with open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
