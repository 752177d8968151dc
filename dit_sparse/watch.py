"""Looking on while a session works."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_sparse.method import Call
    from dit_sparse.plan import Plan


class Watch:
    """Is shown plans while it is in ``session.watches``. What is computed stays the same."""

    def planning(self, make: Callable[[], Plan]) -> Plan:
        """Around every choice of blocks; plans made within one (a wrapped method's) come nested."""
        return make()

    def executed(self, plan: Plan, call: Call) -> None:
        """For every plan that attention is computed by.

        Some methods compute a call in parts: each comes with its plan, which may be over pooled keys.
        """
