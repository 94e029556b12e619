"""Figures of an evaluation, with what they were counted over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from models.measures.wilson import wilson

# 'name', 'value', 'n'; 'low' and 'high' of an interval of 95 %, or the 'spread' of what the value is a mean of;
# 'chance'; 'unit'
Number = dict[str, Any]


def number(name: str, value: float, n: int, **more: Any) -> Number:
    return {"name": name, "value": value, "n": n, **more}


def share(name: str, right: Sequence[bool | float], trials: int | None = None, **more: Any) -> Number:
    """A share of items, with Wilson's interval.

    Args:
        trials: things that are independent of each other (videos, where several questions are of one); none: all are.
    """
    value = sum(map(float, right)) / len(right)
    low, high = wilson(value, trials or len(right))
    return number(name, value, len(right), low=low, high=high, **more)


def table(numbers: Iterable[Number]) -> str:
    """For a person."""
    numbers = list(numbers)
    if not numbers:
        return "Nothing was found that could be measured."
    lines = [f"{'':32} {'value':>9}  {'95 %':^17} {'n':>7}"]
    for row in numbers:
        percent = "low" in row
        value = f"{row['value']:.1%}" if percent else f"{row['value']:.4g}"
        between = f"{row['low']:6.1%} to {row['high']:6.1%}" if percent else ""
        between = f"± {row['spread']:.3g}" if "spread" in row else between
        chance = f"  chance {row['chance']:.1%}" if "chance" in row else ""
        lines.append(f"{row['name']:32} {value:>9}  {between:17} {row['n']:7,}{chance}")
    return "\n".join(lines)
