"""What a compiled program moves between devices, and what it holds on each: read from the compiler's own text (HLO).

    program = jax.jit(step).lower(state, batch).compile()
    for c in collectives(program):
        print(c.kind, c.times, c.bytes)

Counted is what one device sends, as rings and direct exchanges of n devices do with an operand of s bytes: all-gather
(n - 1) s, reduce-scatter and all-to-all (n - 1) s / n, all-reduce twice that, permute s. A ragged all-to-all counts as
if its buffers were full: what is in them is known when it runs. Loops count as often as the compiler knows that they
turn. What stands in a branch, or in a loop of unknown length, counts once and is marked as not certain. Not counted:
what a kernel of its own sends (a custom call), and transfers between host and device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SENT = {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: n - 1, "collective-permute": lambda n: 1}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: its name, the type of its result, its operation, and all that follows."""

    name: str
    type: str
    op: str
    rest: str

    @property
    def names(self) -> list[str]:
        """The operands' names, and after them those of computations that it runs."""
        return re.findall(r"%([\w.\-]+)", self.rest)


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: of `KINDS`. operand: bytes. bytes: what each device sends, all times together. times: how often it runs.
    certain: it does run so often. devices: how many take part. where: the operation of the model that it stems from."""

    kind: str
    operand: int
    bytes: float
    times: int
    certain: bool
    devices: int
    where: str


def collectives(program) -> list[Collective]:
    """Every collective of a compiled program (or its text), in the order of the program."""
    computations, entry = computations_of(program)
    return list(_walk(computations, entry, 1, True))


def memory(program) -> int:
    """Bytes that a compiled program holds on each device: arguments, results and temporaries, what is aliased once."""
    held = program.memory_analysis()
    return (held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
            - held.alias_size_in_bytes)


def computations_of(program) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {instruction: it}} of a compiled program (or its text), and the name of the one that begins."""
    text = program if isinstance(program, str) else program.as_text()
    computations, entry, current = {}, "", {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := INSTRUCTION.match(line):
            current[found[1]] = Instruction(*found.groups())
    return computations, entry


def _walk(computations, name: str, times: int, certain: bool) -> Iterator[Collective]:
    here = computations[name]
    for line in here.values():
        kind = line.op.removesuffix("-start")
        if kind in KINDS:
            operands = [here[name].type for name in line.names if name in here]
            size = sum(map(_bytes, operands[:1] if kind.startswith("ragged") else operands))
            devices = _group(line.rest)
            sent = SENT.get(kind, lambda n: (n - 1) / n)(devices) * size * times
            where = re.search(r'op_name="([^"]*)"', line.rest)
            yield Collective(kind, size, sent, times, certain, devices, where[1] if where else "")
            continue
        trips = TRIPS.search(line.rest)
        turns = int(trips[1]) if trips else 1
        sure = certain and line.op != "conditional" and (line.op != "while" or trips is not None)
        if not line.op.endswith(("-done", "-update")):  # what they wait for has been counted where it began
            for inner in dict.fromkeys(name for name in line.names if name in computations and name not in here):
                yield from _walk(computations, inner, times * turns, sure)


def _bytes(type: str) -> int:
    """Of an array or a tuple: "f32[8,16]{1,0}" has 512."""
    bits = lambda dtype: 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    shapes = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\]", type)
    return sum(bits(dtype) * math.prod(map(int, filter(None, sizes.split(",")))) for dtype, sizes in shapes) // 8


def _group(rest: str) -> int:
    """How many devices take part together, from any of the ways to say it: {{0,1},{2,3}}, [2,4]<=[8], mesh['a'=2]
    {'a'}. Permutes speak of pairs."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'a':(1)2 is a part of an axis, of size 2
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 2
