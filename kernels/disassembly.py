"""Reads disassembled kernels: which instructions the inner loop is made of.

Control flow is rebuilt from the text. The lines between a label and a branch back to it would not do:
compilers move waits behind the end of the kernel, from where a branch returns into the middle of the loop.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Of a warp (HMMA and its kin), of a warp group (HGMMA: wgmma), on tensor memory (UTCHMMA: tcgen05); AMD's.
TENSOR_CORE = re.compile(r"[BDHIOQ]MMA|[BHIQ]GMMA|UTC[A-Z]+MMA|v_s?mfma\w+")
# Shorter loops wait on a barrier or for an allocation; they do not go over data.
SHORTEST = 10

LABEL = re.compile(r"([.$\w]+):")
INSTRUCTION = re.compile(
    r"\s+(?:/\*[0-9a-f]+\*/\s+)?(?P<predicate>@\S+\s+)?(?P<name>[A-Za-z]\w*)(?P<rest>[^;]*)"
)
JUMPS = re.compile(r"BRA|BRX|JMP|JMX|CALL|s_branch|s_cbranch_\w+")
# A branch is conditional by its predicate or, uniform, by an operand before its target: BRA.U !UP0, `(.L_x_3)
ENDS = re.compile(r"EXIT|RET|BRX|JMX|s_branch|s_endpgm|s_setpc_b64")
ALWAYS = re.compile(r"(BRA|JMP|CALL)[.\w]*\s+`\(\.L\w+\)\s*")


class Loop(NamedTuple):
    """Instructions in the text of a loop: those of the tensor cores, and all, the former included."""

    tensor: int
    all: int


def inner_loop(text: str) -> Loop:
    """Count the instructions of a kernel's inner loop.

    A loop is the target of a branch back (to an instruction on the path that leads to the branch) and every
    instruction that reaches this branch without passing the target. Code run seldom counts in full.
    Inner are the loops around tensor-core instructions with no other such loop inside; where no loop has a
    tensor-core instruction, those with no loop inside. Of several the first in the text counts: in kernels
    that finish whole blocks before partial ones, the loop without masks. Without loops the kernel counts.

    Args:
        text: One kernel, from ``nvdisasm -c`` or as AMD assembly.
    """
    names, successors = _parse(text)
    reached, loops = _loops(successors)

    def count(instructions: set[int]) -> Loop:
        tensor = sum(TENSOR_CORE.fullmatch(names[i]) is not None for i in instructions)
        return Loop(tensor, len(instructions))

    loops = [loop for loop in loops if len(loop) >= SHORTEST]
    loops = [loop for loop in loops if count(loop).tensor] or loops
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    return count(min(inner, key=min, default=reached))


def _parse(text: str) -> tuple[list[str], list[list[int]]]:
    """Names of the instructions, and for each those that may come next."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    successors: list[list[int]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.match(line):
            at, name = len(names), found["name"]
            names.append(name)
            if JUMPS.fullmatch(name):
                jumps += [(at, target) for target in re.findall(r"\.L\w+", found["rest"])]
            ends = found["predicate"] is None and (
                ENDS.fullmatch(name) or ALWAYS.fullmatch(name + found["rest"])
            )
            successors.append([] if ends else [at + 1])
    for at, target in jumps:
        successors[at].append(labels[target])
    last = len(names)
    return names, [[i for i in after if i < last] for after in successors]


def _loops(successors: list[list[int]]) -> tuple[set[int], list[set[int]]]:
    """What is reached from the entry, and the natural loops; those with one head are one loop."""
    predecessors: list[list[int]] = [[] for _ in successors]
    back: dict[int, list[int]] = {}
    on_path, reached = {0}, {0}
    path = [(0, iter(successors[0]))]
    while path:
        at, rest = path[-1]
        after = next(rest, None)
        if after is None:
            on_path.remove(at)
            path.pop()
            continue
        predecessors[after].append(at)
        if after in on_path:
            back.setdefault(after, []).append(at)
        elif after not in reached:
            reached.add(after)
            on_path.add(after)
            path.append((after, iter(successors[after])))
    loops = []
    for head, tails in back.items():
        loop, waiting = {head}, list(tails)
        while waiting:
            at = waiting.pop()
            if at not in loop:
                loop.add(at)
                waiting += predecessors[at]
        loops.append(loop)
    return reached, loops
