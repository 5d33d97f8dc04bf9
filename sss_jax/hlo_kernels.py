"""What one kernel of a compiled program takes: operations and bytes of main memory."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from sss_jax.hlo_text import Instruction, arrays_of, dims_of, main_memory, nbytes

Computations = Mapping[str, Sequence[Instruction]]

_WINDOW = re.compile(r"window=\{([^}]*)\}")
_DIMS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)[}\]]')
_PRECISION = re.compile(r'operand_precision(?:=\{|":\[)([\w,"]+)[}\]]')
_RISING = ("default", "high", "highest")
_CUBLAS = re.compile(r'custom_call_target="__cublas\$')
# Convolutions as calls of cuDNN: which array plays which part in the convolution they belong to.
_CUDNN = re.compile(r'custom_call_target="__cudnn\$conv(\w+)"')
# Our attention on GPUs, by the kernel's name: products of D and of E channels for every logit.
_TRITON = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?\bname = "(\w+)"')
_ATTENTION = {
    "attention_forward": (1, 1),
    "attention_backward_queries": (2, 1),
    "attention_backward_keys": (2, 2),
}
# What a kernel of our own for TPUs says about itself; its body is not HLO.
_SAID = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')


def cost(
    instruction: Instruction, shapes: Mapping[str, str], computations: Computations
) -> tuple[int, int]:
    """Return operations and bytes of a kernel.

    Args:
        instruction: the kernel.
        shapes: types of what stands in the same computation, by name.
        computations: all computations of the program.
    """
    said = _SAID.search(instruction.rest)
    # A kernel of our own may read twice, which it says; it does not know of tiles.
    moved = max(int(said.group(2)) if said else 0, _bytes(instruction, shapes, computations))
    return flops(instruction, shapes, computations), moved


def precision(instruction: Instruction, shapes: Mapping[str, str]) -> tuple[str, str]:
    """Return the types that a product multiplies, such as `bf16 x bf16`, and its precision."""
    given = [shapes.get(name, "") for name in instruction.operands]
    if _SAID.search(instruction.rest):
        given = [shape for shape in given if _is_matrix(dims_of(shape))]
    arrays = [arrays_of(shape) for shape in given[:2]]
    types = " x ".join(found[0][0] if found else "?" for found in arrays)
    asked = _PRECISION.search(instruction.rest)
    names = asked.group(1).replace('"', "").lower().split(",") if asked else ["default"]
    return types, max(names, key=_RISING.index)


def _is_matrix(dims: Sequence[int]) -> bool:
    return len(dims) > 1 and min(dims[-2:]) > 1


def flops(instruction: Instruction, shapes: Mapping[str, str], computations: Computations) -> int:
    """Return operations of a kernel; arguments as for `cost`."""
    if said := _SAID.search(instruction.rest):
        return int(said.group(1))
    if instruction.opcode == "convolution" or _CUDNN.search(instruction.rest):
        return _of_convolution(instruction, shapes)
    if instruction.opcode == "dot" or _CUBLAS.search(instruction.rest):
        return _of_dot(instruction, shapes)
    if triton := _TRITON.search(instruction.rest):
        return _of_attention(triton.group(1), instruction, shapes)
    if instruction.opcode != "fusion":
        return 0
    total = 0
    for name in instruction.called:
        inner = computations.get(name, [])
        inside = {i.name: i.shape for i in inner}
        total += sum(flops(i, inside, computations) for i in inner)
    return total


def _bytes(instruction: Instruction, shapes: Mapping[str, str], computations: Computations) -> int:
    """Bytes read and written; of an array that is only sliced, or updated in place, the slice."""
    operands = [shapes.get(operand, "") for operand in instruction.operands]
    read = [main_memory(operand) for operand in operands]
    written = main_memory(instruction.shape)
    if _CUBLAS.search(instruction.rest) or _CUDNN.search(instruction.rest):
        kind, dims = arrays_of(instruction.shape)[0]  # beside it what the library works in
        written = nbytes(f"{kind}[{dims}]")
    if instruction.opcode == "dynamic-slice":
        return min(written, read[0]) + written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * min(read[1], written)
    if instruction.opcode == "fusion" and instruction.called:
        inner = computations.get(instruction.called[0], [])
        for number, part in _slices(inner).items():
            read[number] = min(read[number], part)
        written -= _not_written(inner, operands)
    return sum(read) + max(written, 0)


def _slices(inner: Sequence[Instruction]) -> dict[int, int]:
    """Bytes read of those parameters of a fusion that it does not read whole."""
    found = {}
    for parameter in inner:
        if parameter.opcode != "parameter" or parameter.number is None:
            continue
        users = _users(inner, parameter)
        if users and all(_takes_part_of(user, parameter, inner) for user in users):
            cuts = [user.shape for user in users if user.opcode == "dynamic-slice"]
            found[parameter.number] = sum(map(main_memory, cuts))
    return found


def _users(inner: Sequence[Instruction], made: Instruction) -> list[Instruction]:
    """Who uses a result, seen through changes of its type that move nothing."""
    users = [i for i in inner if made.name in i.operands]
    return [
        u for user in users for u in (_users(inner, user) if user.opcode == "bitcast" else [user])
    ]


def _takes_part_of(user: Instruction, parameter: Instruction, inner: Sequence[Instruction]) -> bool:
    sliced = user.opcode in ("dynamic-slice", "dynamic-update-slice")
    return sliced and _origin(inner, user.operands[0]) == parameter.name


def _origin(inner: Sequence[Instruction], name: str) -> str:
    """Name of what a chain of bitcasts begins with."""
    lines = {i.name: i for i in inner}
    while name in lines and lines[name].opcode == "bitcast":
        name = lines[name].operands[0]
    return name


def _not_written(inner: Sequence[Instruction], operands: Sequence[str]) -> int:
    """Bytes of results that a fusion leaves as they were: updates of its parameters in place."""
    lines = {i.name: i for i in inner}
    if not inner:
        return 0
    root = inner[-1]
    results = root.operands if root.opcode == "tuple" else [root.name]
    total = 0
    for name in results:
        update = lines.get(_origin(inner, name))
        if update is None or update.opcode != "dynamic-update-slice":
            continue
        whole = lines.get(_origin(inner, update.operands[0]))
        number = whole.number if whole and whole.opcode == "parameter" else None
        if number is not None and main_memory(operands[number]):
            part = lines.get(update.operands[1])
            total += main_memory(update.shape) - (main_memory(part.shape) if part else 0)
    return total


def _of_convolution(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """Each output sums over the window and the input channels of its group.

    Zeros that a dilated input inserts are left out: products in batches are written that way too.
    """
    labels, window = _DIMS.search(instruction.rest), _WINDOW.search(instruction.rest)
    if labels is None:
        return 0
    given, kernel, made = _roles(instruction, shapes)
    channels = kernel[labels.group(2).index("i")] if kernel else 0
    sizes = dict(pair.split("=") for pair in window.group(1).split()) if window else {}
    places = _places(given, made, labels)
    taps = math.prod(_taps(sizes, places))
    features = math.prod(made) // math.prod(out for _, out in places)
    return 2 * features * taps * channels


def _roles(
    instruction: Instruction, shapes: Mapping[str, str]
) -> tuple[list[int], list[int], list[int]]:
    """Dimensions of input, kernel and output; cuDNN's gradients are described as what they undo."""
    first, second = (dims_of(shapes.get(name, "")) for name in instruction.operands[:2])
    result, cudnn = dims_of(instruction.shape), _CUDNN.search(instruction.rest)
    if cudnn and cudnn.group(1) == "BackwardInput":
        return result, second, first
    if cudnn and cudnn.group(1) == "BackwardFilter":
        return first, result, second
    return first, second, result


def _places(given: list[int], made: list[int], labels: re.Match[str]) -> list[tuple[int, int]]:
    """Input and output size along every spatial axis, in the order of the window."""
    axes = sorted(letter for letter in labels.group(3) if letter.isdigit())
    return [(given[labels.group(1).index(a)], made[labels.group(3).index(a)]) for a in axes]


def _taps(sizes: dict[str, str], places: list[tuple[int, int]]) -> Iterator[int]:
    """Along every axis, how often an element of the window meets one of the input.

    What the window meets outside the input, or in the holes of a dilated one, is no operation:
    products in batches, and those of vectors, are written as convolutions that are mostly that.
    """
    count = len(places)

    def each(name: str, default: str) -> list[str]:
        return sizes[name].split("x") if name in sizes else [default] * count

    for i, (given, made) in enumerate(places):
        size, stride = int(each("size", "1")[i]), int(each("stride", "1")[i])
        hole, step = int(each("lhs_dilate", "1")[i]), int(each("rhs_dilate", "1")[i])
        before = int(each("pad", "0_0")[i].split("_")[0])
        reached = (given - 1) * hole
        total = 0
        for tap in range(size):
            first = max(0, -((tap * step - before) // stride))
            last = min(made - 1, (reached + before - tap * step) // stride)
            total += max(0, last - first + 1)
        yield total // hole


def _of_attention(name: str, instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """Operations of one of `attention_gpu_kernel`'s kernels, from queries, keys and values."""
    (g, n, d), (_, m, _), (_, _, e) = (dims_of(shapes[x]) for x in instruction.operands[:3])
    of_d, of_e = _ATTENTION[name]
    return 2 * g * n * m * (of_d * d + of_e * e)


def _of_dot(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    contracted = _CONTRACTED.search(instruction.rest)
    left = dims_of(shapes.get(instruction.operands[0], ""))
    if contracted is None or not left:
        return 0
    axes = [int(axis) for axis in re.findall(r"\d+", contracted.group(1))]
    return 2 * math.prod(dims_of(instruction.shape)) * math.prod(left[axis] for axis in axes)
