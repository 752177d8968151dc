"""How fast each kernel could be: operations, bytes and the bounds that data sheets of GPUs put on them.

python -m dit_sparse.kernels.roofline        write ROOFLINE.md: part of `make aot`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dit_sparse.kernels.bench import SHAPES, Shape
from dit_sparse.kernels.resources import FOLDER, table

NOTE = FOLDER / "ROOFLINE.md"
MODELS = ("wan2.1-14b-720p", "hunyuanvideo-720p")
SPARSE = 0.2
# Tokens of a query and of a key block, and of a tile of either.
BLOCK = 128


class Gpu(NamedTuple):
    """Dense tensor products in TFLOP/s, summed in float32 or int32; fp8 may be missing. Memory in GB/s."""

    name: str
    bf16: float
    int8: float
    fp8: float | None
    memory: float
    per_clock: int
    """bf16 operations of one multiprocessor in a clock."""
    source: str

    @property
    def exponentials(self) -> float:
        """In 10^12 a second: a multiprocessor makes 16 in a clock."""
        return 16 * self.bf16 / self.per_clock


GPUS = (
    Gpu("A100 SXM 80 GB", 312, 624, None, 2039, 2048, "A100 data sheet, A100 architecture paper"),
    Gpu("H100 SXM", 989.4, 1978.9, 1978.9, 3350, 4096, "H100 data sheet, H100 architecture paper"),
    Gpu("H200 SXM", 989.4, 1978.9, 1978.9, 4800, 4096, "H200 data sheet, H100 architecture paper"),
    Gpu("B200 (HGX)", 2250, 4500, 4500, 8000, 8192, "Blackwell architecture brief"),
    Gpu("RTX 4090", 165.2, 660.6, 330.3, 1008, 512, "Ada architecture paper"),
    Gpu("RTX 5090", 209.5, 838, 419, 1792, 512, "RTX Blackwell architecture paper"),
)


class Work(NamedTuple):
    """What one call takes at least.

    Attributes:
        products: Operations of tensor products, with their type.
        memory: Bytes to and from memory, each tensor once.
        l2: Bytes that tiles read.
    """

    name: str
    products: Sequence[tuple[str, float]]
    exponentials: float
    memory: float
    l2: float

    @property
    def operations(self) -> float:
        return sum(number for _, number in self.products)

    def bound(self, gpu: Gpu) -> str:
        """Milliseconds the busiest unit takes, and its name, or the names of all within one percent of it."""
        rates = {"bf16": gpu.bf16, "fp16": gpu.bf16, "int8": gpu.int8, "fp8": gpu.fp8}
        tensor = 0.0
        for kind, number in self.products:
            rate = rates[kind]
            if rate is None:
                return f"no {kind}"
            tensor += number / rate
        busy = {
            "tensor": tensor * 1e-9,
            "exp": self.exponentials / gpu.exponentials * 1e-9,
            "memory": self.memory / gpu.memory * 1e-6,
        }
        longest = max(busy.values())
        return f"{_three(longest)} {', '.join(unit for unit in busy if busy[unit] > 0.99 * longest)}"


def works(shape: Shape) -> list[Work]:
    """What the kernels take on one shape."""
    rows = shape.tokens * shape.heads
    elements = rows * shape.head_dim  # of each of q, k, v and out
    blocks = shape.tokens / BLOCK
    map_of_blocks = 4 * blocks**2 * shape.heads
    found = []
    for density in (SPARSE, 1.0):
        at = "dense" if density == 1 else f"density {density}"
        pairs = density * shape.tokens * rows
        product = 2 * pairs * shape.head_dim
        read = density * blocks * elements  # elements of k that the query tiles read
        small = 4 * rows + density * map_of_blocks  # lse and lists
        forward = [("bf16", 2 * product)]
        found.append(Work(f"forward, {at}", forward, pairs, 8 * elements + small, 4 * read))
        # Scores and their gradient are made twice: by the kernel of dq, and by that of dk and dv.
        backward = [("bf16", 7 * product)]
        found.append(Work(f"backward, {at}", backward, 2 * pairs, 16 * elements + 2 * small, 8 * read))
        for scores, values in (("int8", "fp16"), ("int8", "int8"), ("int8", "fp8"), ("fp8", "fp8")):
            size = 2 if values == "fp16" else 1
            name = f"quantised forward ({scores} scores, {values} values), {at}"
            mixed = [(scores, product), (values, product)]
            found.append(Work(name, mixed, pairs, (4 + size) * elements + small, (1 + size) * read))
    scores_only = [("bf16", 2 * shape.tokens * elements)]
    memory = 4 * elements + 4 * rows + map_of_blocks
    found.append(Work("block_mass", scores_only, shape.tokens * rows, memory, 2 * blocks * elements))
    states = 4 * elements * shape.head_dim
    found.append(Work("linear attention", [("bf16", states)], 2 * elements, 8 * elements, 8 * elements))
    # To subtract it, each row makes the sum over its listed blocks again, from stored features of keys.
    again = SPARSE * blocks
    outside = [("bf16", states * (1 + again / 2))]
    name = f"linear attention outside a plan, density {SPARSE}"
    memory = 12 * elements + SPARSE * map_of_blocks
    found.append(Work(name, outside, 2 * elements, memory, (12 + 4 * again) * elements))
    return found


INTRODUCTION = f"""\
# What the hardware allows

Written by `make aot` (`python -m dit_sparse.kernels.roofline`); do not edit. **These are bounds computed
from data sheets, not measurements**: kernels that work like ours cannot be faster at these clocks, and ours
are slower.

One call: one layer, one sample. Blocks and tiles: {BLOCK} x {BLOCK}. Features of linear attention: softmax.

* **TFLOP**: operations of tensor products, two for a multiplication and its addition. A pair of tokens
  takes two products of D numbers in the forward and seven in the two kernels of the backward, which both
  make its score. Rounding q, k and v to 8 bits beforehand is not counted.
* **exp**: exponentials, in 10^12: one for a pair, two in the backward.
* **memory**: bytes, each tensor and list read or written once. **L2**: what tiles read of it, each query
  tile all keys and values its row lists (in the backward also each key tile its queries and their
  gradients). Data sheets give no bandwidth of L2, so it sets no bound here.
* **FLOP per byte** of memory / of L2.
* For each GPU, the milliseconds that its busiest unit needs at its peak, and which that is: **tensor**
  products, **exp**onentials or **memory**. To reach this, a kernel has to overlap the three perfectly.
"""

PEAKS = """\
## Peaks

Dense tensor products in TFLOP/s, summed in float32 or int32 (data sheets often print twice that, with
sparsity), and memory. Exponentials: 16 in a clock of a multiprocessor ("Throughput of Native Arithmetic
Instructions" in the CUDA programming guide), at the clock of the tensor peak.
"""


def render() -> str:
    """The text of ROOFLINE.md."""
    peaks = [
        (
            g.name,
            str(g.bf16),
            str(g.int8),
            str(g.fp8 or "none"),
            str(g.memory),
            _three(g.exponentials),
            g.source,
        )
        for g in GPUS
    ]
    names = ("GPU", "bf16, fp16", "int8", "fp8", "GB/s", "exp, 10^12/s", "source (NVIDIA)")
    parts = [INTRODUCTION, PEAKS, table(names, peaks)]
    columns = ("kernel", "TFLOP", "exp", "memory", "L2", "FLOP per byte", *(gpu.name for gpu in GPUS))
    for model in MODELS:
        (shape,) = SHAPES[model]
        parts.append(f"## {model}\n\n{shape.tokens} tokens, {shape.heads} heads, D {shape.head_dim}.\n")
        lines = [
            (
                work.name,
                _three(work.operations * 1e-12),
                _three(work.exponentials * 1e-12),
                f"{_three(work.memory * 1e-9)} GB",
                f"{_three(work.l2 * 1e-9)} GB",
                f"{work.operations / work.memory:.0f} / {work.operations / work.l2:.0f}",
                *(work.bound(gpu) for gpu in GPUS),
            )
            for work in works(shape)
        ]
        parts.append(table(columns, lines))
    return "\n".join(parts)


def _three(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    NOTE.write_text(render())
