"""Thumbnails of the blocks that heads really computed, taken while a session runs."""

from __future__ import annotations

import base64
from io import BytesIO
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_sparse.eval.comparison import Mask
from dit_sparse.plan import Plan, blocks_of
from dit_sparse.schedule import Phase
from dit_sparse.watch import Watch

if TYPE_CHECKING:
    from dit_sparse.attach import Session
    from dit_sparse.method import Call

SIDE = 64
"""Pixels of a thumbnail at most."""
LAYERS = 12
"""Layers of a transformer that are looked at, evenly chosen where it has more."""


class PlanMasks(Watch):
    """Keeps the plans of one step, made small on their device, until :meth:`read`.

    The step is the middle one of those the layer is sparse in; without a known step, the first call. Of a
    call that a method computes in parts, the part over whole tokens counts, and of a batch the last item
    (with guidance in one batch: the conditional one).

    Args:
        enabled: False looks at nothing.
    """

    def __init__(self, session: Session, enabled: bool = True) -> None:
        self.session = session
        self.enabled = enabled
        self._steps: dict[tuple[str, int | None], int | None] = {}
        self._taken: dict[tuple[str, str], tuple[Call, tuple[int, int], Tensor, Tensor]] = {}
        self._layers = {f"{part.name}/{at.layer.name}": at for part in session.parts for at in part.layers}

    def __enter__(self) -> PlanMasks:
        if self.enabled:
            self.session.watches.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.session.watches.remove(self)

    def executed(self, plan: Plan, call: Call) -> None:
        key, place = (call.name, call.branch), (call.name, call.steps)
        assert call.order is not None
        stride = ceil(call.layers / LAYERS)
        whole = plan.keys == blocks_of(call.order.slots, plan.block[1])
        if key in self._taken or call.layer % stride or not whole:
            return
        if place not in self._steps:
            self._steps[place] = self._step(call)
        if call.step != self._steps[place]:
            return
        pairs, every = call.pairs(plan)
        small = _small(plan).expand(call.heads, -1, -1)
        self._taken[key] = call, plan.block, small, (pairs / every)[-1].expand(call.heads)

    def _step(self, call: Call) -> int | None:
        if call.step is None or call.steps is None:
            return call.step
        schedule = self._layers[call.name].schedule
        phases = {i: schedule.phase(i, call.steps, call.layer, call.layers) for i in range(call.steps)}
        sparse = [i for i, phase in phases.items() if phase is Phase.SPARSE]
        sparse = sparse or [i for i, phase in phases.items() if phase is Phase.REFRESH]
        return sparse[len(sparse) // 2]

    def read(self) -> list[Mask]:
        """The thumbnails, from the device: heads of a layer that computed the same share one."""
        masks: list[Mask] = []
        for call, block, small, density in self._taken.values():
            by_picture: dict[bytes, Mask] = {}
            for head, (picture, share) in enumerate(zip(small.cpu(), density.tolist(), strict=True)):
                pixels = picture.numpy().tobytes()
                if pixels in by_picture:
                    by_picture[pixels].heads.append(head)
                    continue
                model = call.name.partition("/")[0]
                by_picture[pixels] = Mask(
                    model, call.step, call.layer, call.branch, [head], block, round(share, 4), png_of(picture)
                )
            masks += by_picture.values()
        return masks


def _small(plan: Plan) -> Tensor:
    """uint8 [H, rows, columns] of at most SIDE a side, 0 where every block is kept and 255 where none is."""
    heads = []
    for head in range(
        plan.counts.shape[1]
    ):  # one at a time: a plan of (1, c) blocks has a row for each token
        one = Plan(plan.indices[-1:, head, None], plan.counts[-1:, head, None], plan.block, plan.keys)
        keep = one.to_blocks()[0].float()
        size = min(SIDE, keep.shape[1]), min(SIDE, keep.shape[2])
        heads.append(torch.nn.functional.adaptive_avg_pool2d(keep, size))
    return (255 * (1 - torch.cat(heads))).round().to(torch.uint8)


def png_of(picture: Tensor) -> str:
    """uint8 [rows, columns] as a data URI."""
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(picture.numpy()).save(stream, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
