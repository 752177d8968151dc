"""Schedule: when a method runs, by denoising step and by layer."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor


class Phase(enum.Enum):
    """What happens to one attention call."""

    DENSE = "dense"
    """The model is left alone."""
    REFRESH = "refresh"
    """The method runs and renews its cache."""
    SPARSE = "sparse"
    """The method runs and uses its cache; with an empty cache it acts as REFRESH."""


@dataclass(frozen=True)
class Span:
    """``a-b%`` of a run (``share``), or the indices a to b, both included; negative ones from the end.

    With ``every`` only the multiples of it: ``every 5`` is 0, 5, 10, ...
    """

    start: Fraction
    end: Fraction
    share: bool
    every: int = 1

    def has_step(self, i: int, n: int) -> bool:
        """Step i of n lies in a-b % when [i/n, (i+1)/n) meets [a, b); the point p % lies in one step."""
        if not self.share:
            return self._has_index(i, n)
        if self.start == self.end:
            return i == min(floor(self.start * n), n - 1)
        return i < self.end * n and i + 1 > self.start * n

    def has_layer(self, i: int, n: int) -> bool:
        """Fractions of layers round up: the first ceil(b n), or those from floor(a n) on, at least one."""
        if not self.share:
            return self._has_index(i, n)
        return floor(self.start * n) <= i < ceil(self.end * n)

    def _has_index(self, i: int, n: int) -> bool:
        first, last = (int(v) + n if v < 0 else int(v) for v in (self.start, self.end))
        return first <= i <= last and i % self.every == 0

    def __str__(self) -> str:
        if (self.start, self.end, self.share) == (0, -1, False):
            return f"every {self.every}"
        first, last = (_decimal(v * 100) if self.share else str(v) for v in (self.start, self.end))
        return (first if first == last else f"{first}-{last}") + "%" * self.share


@dataclass(frozen=True)
class Schedule:
    """When a method runs. The default is always: every step and every layer sparse.

    Args:
        dense: Steps that stay dense.
        layers: Layers that stay dense at every step.
        refresh: Steps at which a method renews its cache: indices, or fractions of the run.
    """

    dense: tuple[Span, ...] = ()
    layers: tuple[Span, ...] = ()
    refresh: tuple[Span, ...] = ()

    def phase(self, step: int | None, steps: int | None, layer: int, layers: int) -> Phase:
        """The phase of one call.

        Args:
            step: 0-based index of the denoising step, of ``steps``; None when the run is not known, and then
                only the rules on layers apply.
            layer: 0-based index of the layer, of ``layers``.
        """
        if any(span.has_layer(layer, layers) for span in self.layers):
            return Phase.DENSE
        if step is None or steps is None:
            return Phase.SPARSE
        if any(span.has_step(step, steps) for span in self.dense):
            return Phase.DENSE
        if any(span.has_step(step, steps) for span in self.refresh):
            return Phase.REFRESH
        return Phase.SPARSE

    @property
    def needs_steps(self) -> bool:
        """Whether any rule depends on the step."""
        return bool(self.dense or self.refresh)

    def with_refresh(self, refresh: str) -> Schedule:
        """This schedule with a method's refresh steps, such as ``"20%, 60%"``, unless it names its own."""
        if self.refresh or not refresh:
            return self
        return replace(self, refresh=self.parse(f"refresh {refresh}").refresh)

    def __str__(self) -> str:
        clauses = [f"{k} {', '.join(map(str, v))}" for k, v in self._clauses() if v]
        return "; ".join(clauses) or "always"

    def _clauses(self) -> tuple[tuple[str, tuple[Span, ...]], ...]:
        return ("dense", self.dense), ("layers", self.layers), ("refresh", self.refresh)

    @classmethod
    def parse(cls, text: str | Schedule | None) -> Schedule:
        """Read ``"dense 0-25%, 96-100%; layers 0,-1; refresh 10,30"``.

        Grammar::

            schedule := "always" | clause (";" clause)*
            clause   := ("dense" | "layers" | "refresh") item ("," item)*
            item     := INDEX | INDEX "-" INDEX | NUMBER "%" | NUMBER ["%"] "-" NUMBER "%" | "every" COUNT

        An INDEX is a 0-based integer, negative from the end; ``a-b`` includes both. ``dense`` names steps,
        ``layers`` names layers that stay dense, ``refresh`` names steps. A lone ``p%`` means the first p % of
        the steps or layers (``dense``, ``layers``), or the step at p % of the run (``refresh``). ``every N``
        names the indices 0, N, 2 N, ...

        Raises:
            ValueError: With the text, the place of the mistake and what was expected there.
        """
        if isinstance(text, Schedule):
            return text
        if text is None or text.strip() in ("", "always"):
            return cls()
        found: dict[str, tuple[Span, ...]] = {}
        at = 0
        for clause in text.split(";"):
            word = re.match(r"\s*(\w*)", clause)
            assert word is not None
            name, place = word[1], at + word.start(1)
            if name not in ("dense", "layers", "refresh"):
                raise _error(text, place, f"expected 'dense', 'layers' or 'refresh', got {name or clause!r}")
            if name in found:
                raise _error(text, place, f"a second {name!r} clause; list all of them in one, with commas")
            spans, inner = [], at + word.end()
            for item in clause[word.end() :].split(","):
                span = _span(text, item, inner, name)
                spans += [] if span is None else [span]
                inner += len(item) + 1
            found[name] = tuple(spans)
            at += len(clause) + 1
        return cls(**found)


_ITEM = re.compile(r"(-?\d+(?:\.\d+)?)\s*(%?)(?:\s*-\s*(-?\d+(?:\.\d+)?)\s*(%?))?")


def _span(text: str, item: str, at: int, clause: str) -> Span | None:
    """One item of a clause; None for the first 0 % of something."""
    place = at + len(item) - len(item.lstrip())
    if multiple := re.fullmatch(r"every\s+(\d+)", item.strip()):
        if int(multiple[1]) < 1:
            raise _error(text, place, "expected a count of at least 1 after 'every'")
        return Span(Fraction(0), Fraction(-1), share=False, every=int(multiple[1]))
    match = _ITEM.fullmatch(item.strip())
    if match is None:
        bad = _ITEM.match(item.strip())
        place += bad.end() if bad else 0
        raise _error(text, place, "expected an index, 'a-b', 'p%', 'a-b%' or 'every N'")
    first, sign, second, last_sign = match.groups()
    share = bool(sign or last_sign)
    if second is not None and sign and not last_sign:
        raise _error(text, place + match.end(), f"expected '%' after {second}")
    a, b = Fraction(first), Fraction(second if second is not None else first)
    if not share:
        if a.denominator != 1 or b.denominator != 1:
            raise _error(text, place, "an index is a whole number; write a share of the run with '%'")
        if a > b and (a < 0) == (b < 0):
            raise _error(text, place, f"the range {a}-{b} is empty")
        return Span(a, b, share=False)
    if not 0 <= a <= 100 or not 0 <= b <= 100:
        raise _error(text, place, "a share lies between 0% and 100%")
    if second is None and clause != "refresh":
        if not b:
            return None
        a = Fraction(0)
    elif second is not None and a >= b:
        raise _error(text, place, f"the range {item.strip()} is empty")
    return Span(a / 100, b / 100, share=True)


def _decimal(value: Fraction) -> str:
    return f"{(Decimal(value.numerator) / Decimal(value.denominator)).normalize():f}"


def _error(text: str, place: int, what: str) -> ValueError:
    return ValueError(f"schedule: {what}\n  {text}\n  {' ' * place}^")
