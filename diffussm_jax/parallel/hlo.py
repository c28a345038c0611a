"""Parses the collectives of a compiled program: kind, size, number of devices, number of executions.

`jax.stages.Compiled.as_text()` prints the program of one device. A collective in a loop is printed once, and counted
once per iteration. XLA annotates the number of iterations (known_trip_count), or it is derived from the loop counter's
start, step and bound. The bytes sent by a device assume ring algorithms (Patarasuk and Yuan, 2009), with n devices in a
group and R bytes of result on each:

    all-reduce          2 (n - 1) / n R
    all-gather            (n - 1) / n R
    reduce-scatter        (n - 1) R        R is the part of one device
    all-to-all            (n - 1) / n R
    collective-permute    R
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|\w+_computation|branch_computations)=(?:%([\w.\-]+)|\{([^}]*)\})"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective of the program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      result_bytes: size of the result on a device, for one execution.
      group_size: devices per group.
      count: executions per run of the program.
      is_count_known: whether the trip counts of all its loops are known; an unknown one counts as 1.
      op_name: its source in the JAX program, or "".
    """

    kind: str
    result_bytes: int
    group_size: int
    count: int
    is_count_known: bool
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in a run of the program, with ring algorithms."""
        return self.count * self.result_bytes * _SENT[self.kind](self.group_size)


class _Instruction(NamedTuple):
    type: str  # "f32[8,4]{1,0}", or a tuple of them
    opcode: str
    arguments: str  # between the parentheses
    attributes: str  # after them

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    root: str


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Lists the reachable collectives of a compiled program, in the order of its text.

    The collectives of all branches of a conditional are counted.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: the text is not a compiled program, or the groups of a collective cannot be parsed.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, num_devices, count=1, is_count_known=True))


def _walk(computations, name: str, num_devices: int, *, count: int, is_count_known: bool) -> Iterator[Collective]:
    computation = computations[name]
    for instruction in computation.instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in _SENT:
            is_scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")  # fused with a slice
            group_size = _group_size(instruction, num_devices)
            result_bytes = _result_bytes(instruction)
            yield Collective(
                kind="reduce-scatter" if is_scattered else kind,
                result_bytes=result_bytes // group_size if is_scattered else result_bytes,
                group_size=group_size,
                count=count,
                is_count_known=is_count_known,
                op_name=next(iter(re.findall(r'op_name="([^"]*)"', instruction.attributes)), ""),
            )
            continue
        trips = _trip_count(computations, computation, instruction) if instruction.opcode == "while" else 1
        inside = {"count": count * (trips or 1), "is_count_known": is_count_known and trips is not None}
        for one, several in _CALLS.findall(instruction.attributes):
            for called in [one] if one else re.findall(r"[\w.\-]+", several):
                if called in computations:
                    yield from _walk(computations, called, num_devices, **inside)


# Parsing.


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that matches the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"not an instruction of an HLO program: {text[:200]!r}")


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the entry computation."""
    computations, entry = {}, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, instructions, root = header[2], {}, ""
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = _Computation(instructions, root)
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            of_type = match.end()
            end = _closing(line, of_type) + 1 if line[of_type] == "(" else line.index(" ", of_type)
            opening = line.index("(", end + 1)
            closing = _closing(line, opening)
            instructions[match[2]] = _Instruction(
                line[of_type:end], line[end + 1 : opening], line[opening + 1 : closing], line[closing + 1 :]
            )
            root = match[2] if match[1] else root
    if entry is None:
        raise ValueError(f"not the text of a compiled program: it has no ENTRY; it begins {text[:200]!r}")
    return computations, entry


def _result_bytes(instruction: _Instruction) -> int:
    result = instruction.type
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        result = _elements(result)[1]  # of (operands, results, ...)
    total = 0
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _elements(tuple_type: str) -> list[str]:
    """Splits the type of a tuple into its elements. Commas inside brackets do not split."""
    elements, depth = [""], 0
    for character in tuple_type[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return elements


def _group_size(instruction: _Instruction, num_devices: int) -> int:
    attributes = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return len(re.findall(r"\{", pairs[1]))
    if re.search(r"replica_groups=\{\}", attributes):
        return num_devices
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):  # {{0,1},{2,3}}
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):  # [2,4]<=[8]
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):  # mesh['a'=4,'b'=2] {'a'}
        sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        parts = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(1)2 is a part of an axis
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    raise ValueError(f"the groups of a collective cannot be read: {attributes[:300]!r}")


# Trip counts of loops.


def _trip_count(computations, computation: _Computation, loop: _Instruction) -> int | None:
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    condition, body = (
        computations[re.search(rf"\b{which}=%([\w.\-]+)", loop.attributes)[1]] for which in ("condition", "body")
    )
    test = condition.instructions[condition.root]
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter, bound = test.operands
    index = _state_index(condition, counter)
    initial = computation.instructions[loop.operands[0]]
    if index is None or initial.opcode != "tuple":
        return None
    start = _scalar(computation, initial.operands[index], {})
    end = _scalar(condition, bound, {i: _scalar(computation, name, {}) for i, name in enumerate(initial.operands)})
    step = _scalar(body, body.instructions[body.root].operands[index], {index: 0})
    if start is None or end is None or not step:
        return None
    return max(0, math.ceil((end - start) / step))


def _state_index(computation: _Computation, name: str) -> int | None:
    """The index of the loop state's element that an instruction reads."""
    instruction = computation.instructions[name]
    if instruction.opcode == "copy":
        return _state_index(computation, instruction.operands[0])
    index = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(index[1]) if instruction.opcode == "get-tuple-element" and index else None


def _scalar(computation: _Computation, name: str, state: dict[int, int | None]) -> int | None:
    """Evaluates an integer from constants and known elements of the state; None if that is not possible."""
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    if instruction.opcode == "get-tuple-element":
        return state.get(_state_index(computation, name))
    if instruction.opcode not in ("copy", "bitcast", "add", "subtract"):
        return None
    values = [_scalar(computation, operand, state) for operand in instruction.operands]
    if None in values:
        return None
    return sum(values) if instruction.opcode != "subtract" else values[0] - values[1]
