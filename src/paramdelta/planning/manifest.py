"""Every tensor name across the checkpoints, each with the one operation that makes its output; nothing left over."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from paramdelta.checkpoint.dtypes import ADDABLE, INTEGERS, WHOLE_FLOATS
from paramdelta.checkpoint.embeddings import HEADS
from paramdelta.checkpoint.scaling import SCALE_SUFFIX, scale_shape
from paramdelta.checkpoint.sidecar_names import CONFIG_FILE
from paramdelta.checkpoint.wording import listed, printable, quoted
from paramdelta.errors import MismatchError
from paramdelta.planning.differences import VOCABULARIES, Difference, refuse, summarise
from paramdelta.planning.parts import Operand, Operation, Part, Scale, Source
from paramdelta.planning.policies import Selection
from paramdelta.planning.rows import parts_by_rows, rows_of_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramdelta.checkpoint.checkpoint import Checkpoint
    from paramdelta.checkpoint.embeddings import Embeddings
    from paramdelta.checkpoint.scaling import Scaling
    from paramdelta.planning.policies import Policies
    from paramdelta.planning.recipe import Delta


class Member(NamedTuple):
    """One checkpoint in its role: ``post``, ``base`` or ``new base`` (numbered where there are several deltas)."""

    role: str
    checkpoint: Checkpoint
    first_file: int  # place of its first shard among the plan's input files
    embeddings: Embeddings
    scaling: Scaling


class Decision(NamedTuple):
    """What a policy of the user decided: the policy, and a line on each group of tensors."""

    policy: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All operations, in output order: the new base's, then those of tensors that it does not store.

    Attributes:
        shards: for each operation the new base's shard that it belongs to: that of its tensor, or the last.
        untied: whether the output has a head of its own beside its embeddings; None where that is no question.
        with_rows: names of the output's embeddings and head, as far as it has them.
        rows: rows of the output's embeddings, and ``rows_of_new_base`` of the new base's; None where there are none.
        adds_rows: whether rows of embeddings or head are added, not only taken.
    """

    operations: tuple[Operation, ...]
    shards: tuple[int, ...]
    untied: bool | None
    with_rows: tuple[str, ...]
    rows: int | None
    rows_of_new_base: int | None
    adds_rows: bool
    decisions: tuple[Decision, ...]

    @property
    def is_quantised(self) -> bool:
        """Whether the output has block-scaled weights."""
        return any(operation.blocks is not None for operation in self.operations)


def build_manifest(
    members: Sequence[Member], deltas: Sequence[Delta], policies: Policies, dtype: str | None = None
) -> Manifest:
    """Return one operation for every tensor of the output.

    Args:
        members: the new base, then post and base of each delta.
        deltas: coefficients, in the same order.
        policies: what to do where the checkpoints do not fit each other.
        dtype: safetensors dtype of float outputs, or None for the new base's own.

    Raises:
        MismatchError: the checkpoints differ in names, shapes or kinds of dtype and no policy says what to do; lists
            all differences at once. Or a pattern matches no tensor.
    """
    builder = _Builder(members, deltas, policies, dtype)
    made = {name: builder.operations(name) for name in builder.names()}
    builder.raise_if_refused()
    builder.drop_second_copy(made)
    placed = [(operation, builder.shard(name)) for name, operations in made.items() for operation in operations]
    operations = tuple(operation for operation, _ in placed)
    with_rows = [operation for operation in operations if operation.name in builder.pair.names]
    _require_as_many_rows(with_rows)
    return Manifest(
        operations=operations,
        shards=tuple(shard for _, shard in placed),
        untied=None if builder.pair.untied is None or not with_rows else len(with_rows) > 1,
        with_rows=tuple(operation.name for operation in with_rows),
        rows=with_rows[0].shape[0] if with_rows else None,
        rows_of_new_base=builder.rows_of_new_base(with_rows[0].name) if with_rows else None,
        adds_rows=any(part.alphas for operation in with_rows for part in operation.parts),
        decisions=builder.decisions(),
    )


def _require_as_many_rows(with_rows: Sequence[Operation]) -> None:
    """Raise MismatchError where embeddings and head would have rows for different numbers of tokens."""
    if len({operation.shape[0] for operation in with_rows}) > 1:
        told = ", ".join(f"{quoted(each.name)} {each.shape[0]:,}" for each in with_rows)
        raise MismatchError(
            f"embeddings and head would have different numbers of rows: {told}",
            tensor=with_rows[0].name,
            remedy="Include both or exclude both: they have a row for each token of one vocabulary.",
        )


class _Pair(NamedTuple):
    """The names of embeddings and head over all checkpoints, and whether the output stores both of them.

    ``untied`` is None where that is no question: a model without a head, or weights that lack one.
    """

    names: tuple[str, ...]
    untied: bool | None

    @classmethod
    def of(cls, members: Sequence[Member]) -> _Pair:
        both = [member.embeddings for member in members]
        found = [*(e.embedding for e in both), *(e.head for e in both)]
        names = [name for name in found if name is not None]
        untied = True if any(e.embedding and e.head for e in both) else False if all(e.tied for e in both) else None
        return cls(tuple(dict.fromkeys(names)), untied)


class _Builder:
    """Makes operations name by name, and collects what does not fit."""

    def __init__(
        self, members: Sequence[Member], deltas: Sequence[Delta], policies: Policies, dtype: str | None
    ) -> None:
        self.pair = _Pair.of(members)
        self._members = members
        self._policies = policies
        self._dtype = dtype
        self._selection = Selection(policies)
        self._alphas = [delta.coefficients() for delta in deltas]
        self._refused: list[Difference] = []
        self._decided: dict[str, list[Difference]] = defaultdict(list)

    def names(self) -> Iterator[str]:
        """Yield every name that the output may have: the new base's first."""
        new_base = self._members[0].checkpoint.tensors
        stays_tied = self.pair.untied is False and any(name in new_base for name in self.pair.names)
        tied_away = self.pair.names if stays_tied else ()
        everything = dict.fromkeys(name for member in self._members for name in member.checkpoint.tensors)
        scales = {scale for member in self._members for scale in member.scaling.scales.values()}
        yield from (n for n in everything if n not in scales and (n in new_base or n not in tied_away))

    def shard(self, name: str) -> int:
        """Return the new base's shard that a tensor belongs to."""
        new_base = self._members[0].checkpoint
        return new_base.tensors[name].shard if name in new_base.tensors else len(new_base.shards) - 1

    def operations(self, name: str) -> tuple[Operation, ...]:
        """Return how a tensor is made, and its scales; nothing where the output lacks it, or that is to be refused."""
        made = self._operation(name)
        if made is None:
            return ()
        if made.blocks is None:
            return (made,)
        shape = scale_shape(made.shape, made.blocks)
        part = Part(math.prod(shape), (), ())
        return made, Operation(name + SCALE_SUFFIX, "scales", self._scale_dtype(name), shape, (part,))

    def _scale_dtype(self, name: str) -> str:
        """Return the dtype of scales as the new base has them: this tensor's, or that of others."""
        new_base = self._members[0]
        scale = new_base.scaling.scales.get(name) or next(iter(new_base.scaling.scales.values()))
        return new_base.checkpoint.tensors[scale].dtype

    def _operation(self, name: str) -> Operation | None:
        sources = [self._source(member, name) for member in self._members]
        if not self._selection.has(name):
            return self._taken(name, sources[0])
        present = [source for source in sources if source is not None]
        if len(present) < len(sources):
            return self._missing(name, sources)
        new = present[0]
        if any(source.shape != new.shape for source in present):
            return self._reshaped(name, present)
        if all(source.dtype in ADDABLE for source in present):
            return self._merged(name, present)
        if new.dtype in INTEGERS and all(source.dtype == new.dtype for source in present):
            return self._taken(name, new)
        dtypes = {source.dtype for source in present}
        values = self._by_role([s.dtype for s in present]) if len(dtypes) > 1 else f"{new.dtype} in all"
        return self._mismatched(Difference("dtypes that cannot be added", name, values), present)

    def drop_second_copy(self, made: dict[str, tuple[Operation, ...]]) -> None:
        """Leave out a head, or embeddings, taken from a tied new base where it would be there twice."""
        stored = self._members[0].embeddings.stored()
        if stored is None:
            return
        for name in [name for name in self.pair.names if name != stored and made.get(name)]:
            if made.get(stored) and made[name][0].parts == made[stored][0].parts and made[name][0].op == "copy":
                del made[name]

    def _source(self, member: Member, name: str) -> Source | None:
        """Return what a checkpoint has under a name; where head and embeddings are tied, one for the other."""
        tensors = member.checkpoint.tensors
        ref = tensors.get(name)
        stored = member.embeddings.stored()
        if ref is None and stored is not None and name in self.pair.names:
            name, ref = stored, tensors[stored]
        if ref is None:
            return None
        return Source(member.first_file + ref.shard, ref.offset, ref.dtype, ref.shape, self._scale(member, name))

    def _scale(self, member: Member, name: str) -> Scale | None:
        blocks, scale = member.scaling.blocks, member.scaling.scales.get(name)
        if blocks is None or scale is None:
            return None
        ref = member.checkpoint.tensors[scale]
        rows, columns = ref.shape
        file = member.first_file + ref.shard
        return Scale(file, ref.offset, ref.dtype, rows, columns, blocks.rows, blocks.columns)

    def _float_dtype(self, sources: Sequence[Source]) -> str:
        """Return the dtype of a float output: the one asked for, or that of the first source that is not scaled."""
        plain = (source.dtype for source in sources if source.scale is None and source.dtype in ADDABLE)
        return self._dtype or next(plain, "BF16")

    def rows_of_new_base(self, name: str) -> int | None:
        """Return how many rows the new base has of embeddings or head, stored or tied."""
        source = self._source(self._members[0], name)
        return None if source is None else source.shape[0]

    def _merged(self, name: str, sources: Sequence[Source]) -> Operation:
        part = Part(math.prod(sources[0].shape), tuple(map(Operand.of, sources)), self._alphas_of(name))
        op = "delta" if name in self._members[0].checkpoint.tensors else "untie"
        return self._made(name, op, sources[0].shape, part, sources[:1])

    def _alphas_of(self, name: str) -> tuple[float, ...]:
        return tuple(alpha_of(name) for alpha_of in self._alphas)

    def _taken(self, name: str, source: Source | None, like: Source | None = None) -> Operation | None:
        """Return the operation that takes one checkpoint's tensor, in the form of ``like`` or else in its own."""
        if source is None:
            return None
        part = Part(math.prod(source.shape), (Operand.of(source),), ())
        if source.dtype not in ADDABLE:
            return Operation(name, "copy", source.dtype, source.shape, (part,))
        return self._made(name, "copy", source.shape, part, [source] if like is None else [like, source])

    def _made(self, name: str, op: str, shape: tuple[int, ...], part: Part, like: Sequence[Source]) -> Operation:
        """Return the operation that writes floats as the first of ``like`` has them, or as the user asks."""
        blocks = self._members[0].scaling.blocks
        if self._policies.fp8 == "requantise" and blocks is not None and like[0].scale is not None and len(shape) == 2:
            return Operation(name, op, "F8_E4M3", shape, (part,), blocks)
        return Operation(name, op, self._float_dtype(like), shape, (part,))

    def _missing(self, name: str, sources: Sequence[Source | None]) -> Operation | None:
        absent = ", ".join(m.role for m, source in zip(self._members, sources, strict=True) if source is None)
        difference = Difference(f"missing from {absent}", name, self._said_of_ties(name, sources))
        policy = self._policies.on_missing
        if policy == "error":
            self._refused.append(difference)
            return None
        chosen = {"new-base": sources[0], "post": sources[1] or sources[0], "skip": None}[policy]
        whose = "left out" if chosen is None else "the new base's" if chosen is sources[0] else "post's"
        self._decided["on-missing"].append(difference._replace(values=whose))
        return self._taken(name, chosen, sources[0])

    def _said_of_ties(self, name: str, sources: Sequence[Source | None]) -> str:
        """Return what explains that a head or embeddings are missing: a config.json that unties what is not stored."""
        both = zip(self._members, sources, strict=True)
        absent = [m for m, source in both if source is None and m.embeddings.explicit and not m.embeddings.says_tied]
        if name not in self.pair.names or not absent:
            return ""
        files = listed([str(member.checkpoint.root / CONFIG_FILE) for member in absent])
        return f"tie_word_embeddings is false in {printable(files)}; were it true, the embeddings would be the head"

    def _reshaped(self, name: str, sources: Sequence[Source]) -> Operation | None:
        values = self._by_role([list(source.shape) for source in sources])
        whole = all(source.dtype in WHOLE_FLOATS for source in sources)  # rows of blocks do not come apart
        if not whole or not self._has_rows(name) or len({source.shape[1:] for source in sources}) > 1:
            return self._mismatched(Difference("shapes differ", name, values), sources)
        difference = Difference(VOCABULARIES, name, values)
        if self._policies.vocab == "error":
            self._refused.append(difference)
            return None
        new = sources[0]
        rows = rows_of_output(self._policies.vocab, sources)
        self._decided["vocab"].append(difference._replace(values=f"{values}; {rows:,} rows in the output"))
        op = "pad" if rows > new.shape[0] else "truncate" if rows < new.shape[0] else "delta"
        if name not in self._members[0].checkpoint.tensors:
            op = "untie"
        parts = parts_by_rows(rows, sources, self._alphas_of(name))
        return Operation(name, op, self._dtype or new.dtype, (rows, *new.shape[1:]), parts)

    def _has_rows(self, name: str) -> bool:
        """Return whether a tensor has a row for each token: embeddings, head, and the head's bias."""
        return name in self.pair.names or f"{name.removesuffix('.bias')}.weight" in self.pair.names

    def _mismatched(self, difference: Difference, sources: Sequence[Source]) -> Operation | None:
        policy = self._policies.on_mismatch
        if policy == "error":
            self._refused.append(difference)
            return None
        chosen = sources[0] if policy == "new-base" else sources[1]
        whose = "the new base's" if policy == "new-base" else "post's"
        self._decided["on-mismatch"].append(difference._replace(values=f"{difference.values}; {whose}"))
        return self._taken(difference.tensor, chosen, sources[0])

    def _by_role(self, values: Sequence[object]) -> str:
        return ", ".join(f"{member.role} {value}" for member, value in zip(self._members, values, strict=True))

    def raise_if_refused(self) -> None:
        """Raise the error that lists all differences, or patterns that mean nothing."""
        if self._refused:
            raise refuse(self._refused, [(m.role, str(m.checkpoint.path)) for m in self._members])
        if self._policies.fp8 == "requantise" and not self._members[0].scaling.scales:
            raise MismatchError(
                "fp8: the new base has no block-scaled FP8 weights, whose form requantised ones would take",
                file=printable(str(self._members[0].checkpoint.path)),
                remedy="Leave --fp8 requantise out: the output then has the dtypes of the new base.",
            )
        unused = [*self._selection.unused(), *(text for alphas in self._alphas for text in alphas.unused())]
        if unused:
            raise MismatchError(
                f"no tensor has a name that these patterns match: {', '.join(map(repr, unused))}",
                remedy="Patterns mean whole names: try '*' at their ends. `paramdelta inspect` lists the names."
                + self._hint_of_ties(unused),
            )

    def _hint_of_ties(self, unused: Sequence[str]) -> str:
        """Return what explains that a pattern which means the head matches nothing."""
        stored = self._members[0].embeddings.stored()
        if stored is None or not any(fnmatchcase(h, text) for h in HEADS for text in unused):
            return ""
        return f" The head is not stored here: it is tied to {quoted(stored)}."

    def decisions(self) -> tuple[Decision, ...]:
        """Return what the user's policies decided."""
        return tuple(Decision(policy, tuple(summarise(found))) for policy, found in self._decided.items())
