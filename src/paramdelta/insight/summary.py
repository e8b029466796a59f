"""What the deltas of a run come to, as plain data: in each tensor, in each module of each layer, and altogether."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from paramdelta.engine.progress import NonFinite
from paramdelta.engine.sums import is_measured
from paramdelta.insight.norms import cosine_of, describe, mean_of, total
from paramdelta.insight.roles import MODULES, Role, role_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from paramdelta.engine.progress import Outcome
    from paramdelta.engine.sums import Measured
    from paramdelta.planning.parts import Operation
    from paramdelta.planning.plan import Plan

Row = dict[str, Any]


class Tensor(NamedTuple):
    """What the deltas of one tensor come to.

    Attributes:
        elements: those that are measured: rows that a post or a base lacks are not.
        nonfinite: new infinities and NaNs in the output.
    """

    operation: Operation
    role: Role
    elements: int
    measured: Measured
    nonfinite: NonFinite


def tensors_of(plan: Plan, measured: Mapping[str, Measured], nonfinite: Mapping[str, NonFinite]) -> list[Tensor]:
    """Return the tensors of a plan that have deltas, in its order.

    Args:
        measured: by name of tensor, and ``nonfinite`` too.
    """
    found = []
    for operation in plan.operations:
        if operation.name in measured:
            elements = sum(part.elements for part in operation.parts if is_measured(plan, part))
            counts = nonfinite.get(operation.name, NonFinite(0, 0))
            found.append(Tensor(operation, role_of(operation.name), elements, measured[operation.name], counts))
    return found


def statistics_of(plan: Plan, outcome: Outcome) -> Row:
    """Return what a receipt says of the deltas.

    ``total`` and ``groups`` have an entry for each delta, ``tensors`` a list of such entries for each tensor.
    """
    tensors = tensors_of(plan, outcome.measured, outcome.nonfinite)
    deltas = range(len(plan.recipe.deltas) if tensors else 0)
    return {
        "total": [summed_up(tensors, k) for k in deltas],
        "groups": [grouped(tensors, k) for k in deltas],
        "tensors": _Rows(tensors, deltas),
    }


class _Rows(Mapping[str, list[Row]]):
    """What each delta comes to in each tensor, by name: told when asked for: there may be 100,000 of them."""

    def __init__(self, tensors: Sequence[Tensor], deltas: range) -> None:
        self._tensors, self._deltas = {tensor.operation.name: tensor for tensor in tensors}, deltas

    def __getitem__(self, name: str) -> list[Row]:
        return [described(self._tensors[name], k) for k in self._deltas]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def described(tensor: Tensor, k: int) -> Row:
    """Return what delta ``k`` comes to in a tensor."""
    return _row(tensor.elements, describe(tensor.measured.deltas[k], tensor.elements), tensor.nonfinite)


def summed_up(tensors: Sequence[Tensor], k: int) -> Row:
    """Return what delta ``k`` comes to in several tensors: as one long vector, and as the mean of tensors."""
    elements = sum(tensor.elements for tensor in tensors)
    together = describe(total(tensor.measured.deltas[k] for tensor in tensors), elements)
    counts = NonFinite(
        sum(tensor.nonfinite.infinities for tensor in tensors), sum(tensor.nonfinite.nans for tensor in tensors)
    )
    means = mean_of(describe(tensor.measured.deltas[k], tensor.elements) for tensor in tensors)
    return {"tensors": len(tensors), **_row(elements, together, counts), "mean": means}


def grouped(tensors: Iterable[Tensor], k: int) -> list[Row]:
    """Return what delta ``k`` comes to in each kind of module of each layer; what is in no layer comes last."""
    groups: dict[Role, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.role, []).append(tensor)
    return [{**role._asdict(), **summed_up(groups[role], k)} for role in sorted(groups, key=_order)]


def pairs(tensors: Sequence[Tensor], deltas: int) -> list[Row]:
    """Return the cosines of the angles between each two deltas, altogether and in each layer."""
    layers: dict[int | None, list[Tensor]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.role.layer, []).append(tensor)
    ordered = sorted(layers, key=lambda layer: math.inf if layer is None else layer)
    return [
        {
            "first": first,
            "second": second,
            "cosine": _cosine_between(tensors, first, second),
            "layers": [{"layer": layer, "cosine": _cosine_between(layers[layer], first, second)} for layer in ordered],
        }
        for first, second in _each_two(deltas)
    ]


def _cosine_between(tensors: Sequence[Tensor], first: int, second: int) -> float | None:
    place = second * (second - 1) // 2 + first
    product = sum(tensor.measured.products[place] for tensor in tensors)
    one, other = (total(tensor.measured.deltas[k] for tensor in tensors).squares for k in (first, second))
    return cosine_of(product, math.sqrt(one), math.sqrt(other))


def _each_two(deltas: int) -> Iterator[tuple[int, int]]:
    return ((first, second) for second in range(deltas) for first in range(second))


def _order(role: Role) -> tuple[float, int]:
    return math.inf if role.layer is None else role.layer, MODULES.index(role.module)


def _row(elements: int, numbers: Row, counts: NonFinite) -> Row:
    return {"elements": elements, **numbers, "infinities": counts.infinities, "nans": counts.nans}
