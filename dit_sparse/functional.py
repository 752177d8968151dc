"""Sparse attention for people with their own model code: a function in the place of
``F.scaled_dot_product_attention``.

    out = dit_sparse.sdpa(q, k, v, grid=(21, 45, 80), method="radial")

A method that keeps something from step to step needs a :class:`Run`, which also counts what ran:

    run = dit_sparse.Run("adaspa", layers=30, schedule="dense 0-25%")
    out = dit_sparse.sdpa(q, k, v, grid=(21, 45, 80), method=run, layer=3, step=7, steps=50)
    print(run.report())
"""

from __future__ import annotations

from functools import lru_cache
from inspect import Signature
from typing import Any

from torch import Tensor, nn

from dit_sparse.clock import Tick
from dit_sparse.core import Attachment
from dit_sparse.layout import Layer, TokenLayout
from dit_sparse.method import SparseProcessor
from dit_sparse.pipelines import Family
from dit_sparse.processors import method_of
from dit_sparse.router import Forward, Part, Router
from dit_sparse.schedule import Schedule

_OWN = Family(
    name="own",
    transformers={},
    layers=lambda model: [],
    layout=lambda model, arguments: "told by the caller",
    pixels=lambda transformer, vae: (1, 1, 1),
    joint=True,
)


class Run(Router):
    """A method in one generation of a model that is not attached: what :func:`sdpa` remembers and reports.

    A step below the last one begins another generation.

    Args:
        method: A processor, or a name out of ``METHODS``.
        layers: Attention layers of the model, of which schedules speak.
        schedule: When the method runs. See ``Schedule.parse``.
        density: Ask for the method's setting nearest to this density of all pairs, at each token layout.
        backend, strict, seed, parameters: As of ``dit_sparse.apply``.

    Raises:
        ValueError: As of ``dit_sparse.apply``, and for methods with trainable parts, which need a model.
    """

    def __init__(
        self,
        method: SparseProcessor | str,
        *,
        layers: int = 1,
        schedule: Schedule | str = "always",
        density: float | None = None,
        backend: str = "auto",
        strict: bool = False,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        own = method_of(method, parameters)
        super().__init__(own, Schedule.parse(schedule), density, backend, strict, seed)
        self.layers = layers
        self._processor = own
        self._part = Part("own", nn.Module(), _OWN, Signature())
        self._attachments: dict[int, Attachment] = {}
        self._step: int | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        layer: int = 0,
        step: int | None = None,
        steps: int | None = None,
        branch: str = "cond",
    ) -> Tensor:
        """:func:`sdpa` with a whole layout; the text of the layout is completed from the sequence."""
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be in 0..{self.layers - 1}, as the run was told, got {layer}")
        if step is not None and self._step is not None and step < self._step:
            self.forget()
        elif step is None:
            self._memory.clear()  # without a step nothing tells one generation from the next
        self._step = step
        self._part.forward = Forward(layout, Tick(step, steps, branch, False), 0)
        out = self.route(self._at(layer, q), q, k, v, attn_mask, scale, False)
        if out is not None:
            return out
        shared = q.shape[1] != k.shape[1]
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=shared
        )

    def forget(self) -> None:
        """Begin another generation: drop what was remembered and counted. Static plans are kept."""
        self._memory.clear()
        self._records.clear()
        self._step = None

    def _at(self, index: int, q: Tensor) -> Attachment:
        if index not in self._attachments:
            heads, width = q.shape[1], q.shape[3]
            layer = Layer(index, f"layer {index}", self.layers, heads, width, heads * width)
            if self._processor.module(layer) is not None:
                raise ValueError(f"{self._processor!r} has trainable parts: attach it to a model with apply")
            self._attachments[index] = Attachment(
                self, self._part, layer, self._part.model, self._processor, self.schedule, None
            )
        return self._attachments[index]


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int, int],
    method: SparseProcessor | str | Run,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    text_first: bool = False,
    prefix: int = 0,
    suffix: int = 0,
    layer: int = 0,
    step: int | None = None,
    steps: int | None = None,
    branch: str = "cond",
) -> Tensor:
    """Sparse attention over a token grid, and whatever text shares its sequence.

    Args:
        q, k, v: [B, H, S, D]; k and v may have fewer heads (GQA).
        grid: (frames, height, width) in tokens; images have one frame. The other S - N tokens are text.
        method: A processor, a name out of ``METHODS``, or a :class:`Run`, without which nothing is remembered
            from call to call: a method that reuses what it measured would then measure every time.
        attn_mask: Key padding, bool [B, 1, 1, S]; with another mask the call stays dense.
        scale: Of the scores; default 1 / sqrt(D).
        text_first, prefix, suffix: Where the other tokens stand. See ``TokenLayout``.
        layer, step, steps, branch: Where the call stands in the generation. See ``Call``.

    Returns:
        [B, H, S, D].

    Raises:
        ValueError: Shapes that do not fit each other or the grid; what :class:`Run` refuses.
    """
    layout = TokenLayout(grid, text_first=text_first, prefix=prefix, suffix=suffix)
    shapes = [tuple(x.shape) for x in (q, k, v)]
    fits = all(len(s) == 4 for s in shapes) and len({(s[0], s[2]) for s in shapes}) == 1
    if not fits or shapes[0][1] % shapes[1][1] or shapes[1][:3] != shapes[2][:3]:
        raise ValueError(f"q, k and v must be [B, H, S, D] of one sequence, got {shapes}")
    if shapes[0][2] < layout.sequence:
        raise ValueError(f"{shapes[0][2]} tokens are fewer than those of {layout}")
    run = method if isinstance(method, Run) else _nameless(method)
    try:
        return run.attend(
            q,
            k,
            v,
            layout,
            attn_mask=attn_mask,
            scale=scale,
            layer=layer,
            step=step,
            steps=steps,
            branch=branch,
        )
    finally:
        if run is not method:
            run.forget()


@lru_cache(maxsize=16)
def _nameless(method: SparseProcessor | str) -> Run:
    """The run of calls that bring none: it keeps static plans."""
    return Run(method, layers=1_000_000)
