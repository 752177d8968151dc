"""Schedule: the percent rules against exact fractions, the grammar, and errors that point at the mistake."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.schedule import Phase, Schedule

PERCENT = st.one_of(st.integers(0, 100), st.integers(0, 1000).map(lambda n: Fraction(n, 10)))


def steps_of(text: str, steps: int, phase: Phase = Phase.DENSE) -> list[int]:
    schedule = Schedule.parse(text)
    return [i for i in range(steps) if schedule.phase(i, steps, 0, 1) is phase]


def layers_of(text: str, layers: int) -> list[int]:
    schedule = Schedule.parse(text)
    return [i for i in range(layers) if schedule.phase(None, None, i, layers) is Phase.DENSE]


@given(PERCENT, PERCENT, st.integers(1, 60))
def test_a_step_is_dense_when_its_interval_meets_the_share(a, b, n):
    if a == b:
        return
    a, b = sorted((a, b))
    found = steps_of(f"dense {float(a):g}-{float(b):g}%", n)
    # [i/n, (i+1)/n) and [a, b) meet when the greater start lies before the smaller end.
    low, high = Fraction(a) / 100, Fraction(b) / 100
    expected = [i for i in range(n) if max(Fraction(i, n), low) < min(Fraction(i + 1, n), high)]
    assert found == expected


@given(st.integers(1, 100), st.integers(1, 60))
def test_a_lone_share_is_the_first_of_them(p, n):
    assert steps_of(f"dense {p}%", n) == steps_of(f"dense 0-{p}%", n)
    assert layers_of(f"layers {p}%", n) == list(range(-(-p * n // 100)))


def test_no_share_of_the_steps_is_nothing():
    assert steps_of("dense 0%", 10) == []


@pytest.mark.parametrize(
    ("text", "steps", "dense"),
    [
        ("dense 0-10%", 4, [0]),
        ("dense 0-25%", 4, [0]),
        ("dense 0-26%", 4, [0, 1]),
        ("dense 0-25%, 96-100%", 50, [*range(13), 48, 49]),
        ("dense 0-25%, 96-100%", 4, [0, 3]),
        ("dense 0, 2-3, -1", 8, [0, 2, 3, 7]),
        ("dense 5--2", 9, [5, 6, 7]),
        ("dense 20", 8, []),
    ],
)
def test_steps(text, steps, dense):
    assert steps_of(text, steps) == dense


@pytest.mark.parametrize(
    ("text", "layers", "dense"),
    [
        ("layers 3%", 30, [0]),
        ("layers 0.01%", 30, [0]),
        ("layers 10%", 40, [0, 1, 2, 3]),
        ("layers 90-100%", 30, [27, 28, 29]),
        ("layers 95-100%", 30, [28, 29]),
        ("layers 0,-1", 30, [0, 29]),
        ("layers 100%", 3, [0, 1, 2]),
        ("layers 0%", 3, []),
    ],
)
def test_layers(text, layers, dense):
    assert layers_of(text, layers) == dense


@pytest.mark.parametrize(
    ("text", "steps", "refresh"),
    [
        ("refresh 10,30", 50, [10, 30]),
        ("refresh 20%", 50, [10]),
        ("refresh 50%", 5, [2]),
        ("refresh 0%, 100%", 5, [0, 4]),
        ("refresh 20-40%", 10, [2, 3]),
        ("dense 0-25%; refresh 0, 3", 8, [3]),
    ],
)
def test_refresh(text, steps, refresh):
    assert steps_of(text, steps, Phase.REFRESH) == refresh


def test_layers_hold_at_every_step_and_before_steps():
    schedule = Schedule.parse("dense 0; layers 1; refresh 2")
    assert schedule.phase(5, 9, 1, 4) is Phase.DENSE
    assert schedule.phase(2, 9, 1, 4) is Phase.DENSE
    assert schedule.phase(2, 9, 0, 4) is Phase.REFRESH
    assert schedule.phase(0, 9, 0, 4) is Phase.DENSE


def test_an_unknown_run_turns_step_rules_off():
    schedule = Schedule.parse("dense 0-100%; layers 0; refresh 1")
    assert schedule.needs_steps
    assert [schedule.phase(None, None, i, 3) for i in range(3)] == [Phase.DENSE, Phase.SPARSE, Phase.SPARSE]
    assert not Schedule.parse("layers 0").needs_steps


INDEX = st.integers(-40, 40).map(str)
ITEM = st.one_of(
    INDEX,
    st.tuples(st.integers(0, 20), st.integers(20, 40)).map(lambda p: f"{p[0]}-{p[1]}"),
    st.tuples(st.integers(-40, -20), st.integers(-20, -1)).map(lambda p: f"{p[0]}-{p[1]}"),
    st.integers(1, 100).map(lambda p: f"{p}%"),
    st.tuples(st.integers(0, 49), st.integers(50, 100)).map(lambda p: f"{p[0]} - {p[1]}%"),
    st.tuples(st.integers(0, 499), st.integers(500, 1000)).map(lambda p: f"{p[0] / 10}%-{p[1] / 10}%"),
)
TEXT = st.dictionaries(
    st.sampled_from(["dense", "layers", "refresh"]), st.lists(ITEM, min_size=1, max_size=3), min_size=1
).map(lambda clauses: " ; ".join(f"{name} {', '.join(items)}" for name, items in clauses.items()))


@given(TEXT)
def test_text_comes_back(text):
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(schedule) is schedule


@pytest.mark.parametrize("share", ["33.33333", "0.0000125", "99.999999"])
def test_long_decimals_come_back(share):
    schedule = Schedule.parse(f"dense {share}%; refresh {share}%")
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("text", [None, "", "  ", "always", " always "])
def test_always(text):
    assert Schedule.parse(text) == Schedule()
    assert str(Schedule()) == "always"
    assert Schedule().phase(0, 4, 0, 4) is Phase.SPARSE


@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("sparse 0-25%", 0, "expected 'dense', 'layers' or 'refresh', got 'sparse'"),
        ("dense 0-25%;  layer 0", 14, "got 'layer'"),
        ("dense 0-25%;", 12, "expected 'dense'"),
        ("dense 0; dense 1", 9, "a second 'dense' clause"),
        ("dense", 5, "expected an index"),
        ("dense 1,", 8, "expected an index"),
        ("dense 1, x", 9, "expected an index"),
        ("dense 0-25%, 96-100!", 19, "expected an index"),
        ("dense 10%-20", 12, "expected '%' after 20"),
        ("layers 1.5", 7, "an index is a whole number"),
        ("layers 0, 5-3", 10, "the range 5-3 is empty"),
        ("dense 30-20%", 6, "the range 30-20% is empty"),
        ("dense 20-20%", 6, "is empty"),
        ("dense 0-120%", 6, "between 0% and 100%"),
        ("layers -5%", 7, "between 0% and 100%"),
    ],
)
def test_errors_point_at_the_mistake(text, caret, message):
    with pytest.raises(ValueError, match=r"^schedule: ") as caught:
        Schedule.parse(text)
    first, second, third = str(caught.value).split("\n")
    assert message in first
    assert second == f"  {text}"
    assert third == " " * (caret + 2) + "^"


def test_every_names_the_multiples() -> None:
    schedule = Schedule.parse("dense 0-2; refresh every 5")
    refreshed = [i for i in range(12) if schedule.phase(i, 12, 0, 1) is Phase.REFRESH]
    assert refreshed == [5, 10]
    assert Schedule.parse(str(schedule)) == schedule
    with pytest.raises(ValueError, match="at least 1"):
        Schedule.parse("refresh every 0")


def test_a_methods_refresh_steps_give_way_to_those_of_the_schedule() -> None:
    assert str(Schedule.parse("dense 0-25%").with_refresh("20%, 60%")) == "dense 0-25%; refresh 20%, 60%"
    own = Schedule.parse("refresh 3")
    assert own.with_refresh("every 5") == own
    assert own.with_refresh("") == own
