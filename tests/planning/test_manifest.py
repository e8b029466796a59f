from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from paramdelta.checkpoint.checkpoint import Checkpoint, open_checkpoint
from paramdelta.checkpoint.embeddings import embeddings_of
from paramdelta.checkpoint.scaling import scaling_of
from paramdelta.errors import MismatchError
from paramdelta.planning.manifest import Member
from paramdelta.planning.manifest import build_manifest as build
from paramdelta.planning.policies import Policies
from paramdelta.planning.recipe import Delta
from tests.make import Tensors, at_odd_offsets, normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paramdelta.planning.parts import Operand, Operation

ROLES = ("new base", "post", "base")
TENSORS: Tensors = {
    "embed": normal((6, 4)),
    "norm": normal((4,), "F32"),
    "scale": normal((), "F16"),
    "nothing": ("BF16", (0, 3), b""),
    "positions": ("I64", (2,), bytes(16)),
    "mask": ("BOOL", (3,), b"\1\0\1"),
}


def members(*checkpoints: Checkpoint, roles: Sequence[str] = ROLES) -> list[Member]:
    first = 0
    found = []
    for role, checkpoint in zip(roles, checkpoints, strict=True):
        found.append(Member(role, checkpoint, first, embeddings_of(checkpoint), scaling_of(checkpoint)))
        first += len(checkpoint.shards)
    return found


def build_manifest(found: Sequence[Member], alphas: Sequence[float], dtype: str | None = None) -> tuple[Operation, ...]:
    deltas = [Delta("post", "base", alpha) for alpha in alphas]
    return build(found, deltas, Policies(), dtype).operations


def write(root: Path, tensors: Tensors, shards: int | Sequence[Sequence[str]] = 1) -> Checkpoint:
    return open_checkpoint(write_checkpoint(root, tensors, shards=shards))


def bytes_at(operand: Operand, operation: Operation, checkpoints: Sequence[Checkpoint]) -> bytes:
    """Return what an operand of `operation` points to, found without the code under test."""
    files = [shard.path for checkpoint in checkpoints for shard in checkpoint.shards]
    widths = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1, "U8": 1}
    raw = Path(files[operand.file]).read_bytes()
    return raw[operand.offset : operand.offset + operation.elements * widths[operand.dtype]]


def test_every_operand_points_to_its_tensor_however_the_checkpoints_are_split(tmp_path: Path) -> None:
    post_tensors = {name: (t, s, bytes(b ^ 1 for b in d)) for name, (t, s, d) in reversed(list(TENSORS.items()))}
    base_tensors = {name: (t, s, bytes(b ^ 3 for b in d)) for name, (t, s, d) in TENSORS.items()}
    checkpoints = (
        write(tmp_path / "new", TENSORS, [["mask", "embed"], ["scale"], ["positions", "nothing", "norm"]]),
        write(tmp_path / "post", post_tensors),
        write(tmp_path / "base", at_odd_offsets(base_tensors), 4),
    )
    # The padding of the misaligned checkpoint is no part of the model.
    extra = {name: ref for name, ref in checkpoints[2].tensors.items() if name != "odd.padding"}
    object.__setattr__(checkpoints[2], "tensors", extra)
    operations = build_manifest(members(*checkpoints), [1.0])
    assert len(operations) == len(TENSORS)
    for operation in operations:
        sources = (TENSORS, post_tensors, base_tensors)[: len(operation.parts[0].operands)]
        found = [bytes_at(operand, operation, checkpoints) for operand in operation.parts[0].operands]
        assert found == [tensors[operation.name][2] for tensors in sources], operation.name


def test_operations_are_in_the_new_bases_order(tmp_path: Path) -> None:
    new = write(tmp_path / "new", TENSORS, [["mask", "embed"], ["scale"], ["positions", "nothing", "norm"]])
    other = write(tmp_path / "other", dict(sorted(TENSORS.items())))
    operations = build_manifest(members(new, other, other), [1.0])
    assert [operation.name for operation in operations] == list(new.tensors)
    assert [operation.name for operation in operations] == ["mask", "embed", "scale", "positions", "nothing", "norm"]


def test_floats_are_merged_and_everything_else_is_copied_from_the_new_base(tmp_path: Path) -> None:
    new, post, base = (write(tmp_path / role, TENSORS) for role in ROLES)
    by_name = {made.name: made for made in build_manifest(members(new, post, base), [0.5])}
    for name in ("embed", "norm", "scale", "nothing"):
        assert by_name[name].op == "delta"
        assert by_name[name].parts[0].alphas == (0.5,)
        assert [operand.file for operand in by_name[name].parts[0].operands] == [0, 1, 2]
    for name in ("positions", "mask"):
        assert by_name[name].op == "copy"
        assert by_name[name].parts[0].alphas == ()
        assert [operand.file for operand in by_name[name].parts[0].operands] == [0]


def test_integers_and_bools_may_differ_between_the_checkpoints(tmp_path: Path) -> None:
    new = write(tmp_path / "new", {"mask": ("BOOL", (2,), b"\1\1"), "ids": ("U8", (1,), b"\7")})
    post = write(tmp_path / "post", {"mask": ("BOOL", (2,), b"\0\1"), "ids": ("U8", (1,), b"\5")})
    assert {operation.op for operation in build_manifest(members(new, post, post), [1.0])} == {"copy"}


def test_the_output_has_the_new_bases_dtype_whatever_the_others_have(tmp_path: Path) -> None:
    new = write(tmp_path / "new", {"w": normal((3,), "F16")})
    post = write(tmp_path / "post", {"w": normal((3,), "F32")})
    base = write(tmp_path / "base", {"w": normal((3,), "BF16")})
    (operation,) = build_manifest(members(new, post, base), [1.0])
    assert operation.dtype == "F16"
    assert [operand.dtype for operand in operation.parts[0].operands] == ["F16", "F32", "BF16"]
    assert operation.nbytes == 6
    assert operation.bytes_read == 3 * (2 + 4 + 2)


def test_a_dtype_that_is_asked_for_is_given_to_floats_alone(tmp_path: Path) -> None:
    checkpoints = [write(tmp_path / role, TENSORS) for role in ROLES]
    by_name = {made.name: made for made in build_manifest(members(*checkpoints), [1.0], "F64")}
    assert {name: operation.dtype for name, operation in by_name.items()} == {
        "embed": "F64",
        "norm": "F64",
        "scale": "F64",
        "nothing": "F64",
        "positions": "I64",
        "mask": "BOOL",
    }
    assert by_name["embed"].nbytes == 6 * 4 * 8


def test_counts_of_bytes_are_exact(tmp_path: Path) -> None:
    checkpoints = [write(tmp_path / role, TENSORS) for role in ROLES]
    by_name = {made.name: made for made in build_manifest(members(*checkpoints), [1.0])}
    assert {name: (o.elements, o.itemsize, o.nbytes, o.bytes_read) for name, o in by_name.items()} == {
        "embed": (24, 2, 48, 144),
        "norm": (4, 4, 16, 48),
        "scale": (1, 2, 2, 6),
        "nothing": (0, 2, 0, 0),
        "positions": (2, 8, 16, 16),
        "mask": (3, 1, 3, 3),
    }


def test_several_deltas_follow_each_other_in_recipe_order(tmp_path: Path) -> None:
    tensors = {"w": normal((3,)), "ids": ("I32", (1,), bytes(4))}
    roles = ("new base", "post 1", "base 1", "post 2", "base 2")
    checkpoints = [write(tmp_path / role, tensors) for role in roles]
    delta, copy = build_manifest(members(*checkpoints, roles=roles), [0.25, -2.0])
    assert [operand.file for operand in delta.parts[0].operands] == [0, 1, 2, 3, 4]
    assert delta.parts[0].alphas == (0.25, -2.0)
    assert delta.bytes_read == 5 * 6
    assert [operand.file for operand in copy.parts[0].operands] == [0]


def test_all_differences_are_listed_at_once_and_by_role(tmp_path: Path) -> None:
    new = write(
        tmp_path / "new",
        {
            "fine": normal((2,)),
            "only.new": normal((1,)),
            "shape": normal((2, 3)),
            "kind": normal((4,)),
            "small": ("F8_E4M3FNUZ", (2,), bytes(2)),
            "zero": ("BF16", (0,), b""),
        },
    )
    post = write(
        tmp_path / "post",
        {
            "fine": normal((2,)),
            "only.post": normal((1,)),
            "shape": normal((2, 3)),
            "kind": ("I16", (4,), bytes(8)),
            "small": ("F8_E4M3FNUZ", (2,), bytes(2)),
            "zero": ("BF16", (1,), bytes(2)),
        },
    )
    base = write(
        tmp_path / "base",
        {
            "fine": normal((2,)),
            "shape": normal((3, 2)),
            "kind": normal((4,)),
            "small": ("F8_E4M3FNUZ", (2,), bytes(2)),
            "zero": ("BF16", (0,), b""),
        },
    )
    with pytest.raises(MismatchError) as caught:
        build_manifest(members(new, post, base), [1.0])
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert "6 tensors differ" in text
    for line in (
        "missing from post, base (1):\n    only.new",
        "missing from new base, base (1):\n    only.post",
        "shape: new base [2, 3], post [2, 3], base [3, 2]",
        "zero: new base [0], post [1], base [0]",
        "kind: new base BF16, post I16, base BF16",
        "small: F8_E4M3FNUZ in all",
    ):
        assert line in text
    assert "fine" not in text


def test_integers_of_different_dtypes_do_not_fit(tmp_path: Path) -> None:
    new = write(tmp_path / "new", {"ids": ("I32", (1,), bytes(4))})
    post = write(tmp_path / "post", {"ids": ("I64", (1,), bytes(8))})
    with pytest.raises(MismatchError, match="ids: new base I32, post I64, base I32"):
        build_manifest(members(new, post, new), [1.0])


def test_shapes_differ_even_where_the_number_of_elements_does_not(tmp_path: Path) -> None:
    new = write(tmp_path / "new", {"w": normal((4, 1))})
    post = write(tmp_path / "post", {"w": normal((4,))})
    with pytest.raises(MismatchError, match=r"w: new base \[4, 1\], post \[4\], base \[4\]"):
        build_manifest(members(new, post, post), [1.0])
