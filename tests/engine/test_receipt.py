"""The receipt: any bit of it that is flipped is noticed; the largest ones are far from what is too large to read."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta
from paramdelta.engine.receipt import MOST_BYTES, RECEIPT, SEAL, parse_receipt, read_receipt, seal_flaw, sealed
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    for seed, role in enumerate(("post", "base", "new")):
        write_checkpoint(root / role, {name: normal((2,), seed=seed) for name in "ab"}, shards=2)
    paramdelta.merge(root / "post", root / "base", root / "new", root / "out")
    return root / "out"


def receipt_in(output: Path) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads((output / RECEIPT).read_text())
    return receipt


def test_every_bit_of_a_receipt_counts(output: Path) -> None:
    good = (output / RECEIPT).read_bytes()
    receipt = receipt_in(output)
    assert seal_flaw(good, receipt) is None
    for place in range(len(good)):
        for bit in range(8):
            raw = bytearray(good)
            raw[place] ^= 1 << bit
            damaged = parse_receipt(bytes(raw))
            assert damaged is None or seal_flaw(bytes(raw), damaged) is not None


def test_the_seal_is_the_digest_of_the_file_with_zeros_in_its_place(output: Path) -> None:
    receipt = receipt_in(output)
    assert list(receipt)[-1] == SEAL
    blank = (output / RECEIPT).read_bytes().replace(receipt[SEAL].encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == receipt[SEAL]
    assert b"".join(sealed(receipt)) == (output / RECEIPT).read_bytes()


def test_the_receipt_of_the_largest_models_is_well_below_what_is_read(output: Path, tmp_path: Path) -> None:
    receipt = receipt_in(output)
    names = [f"model.layers.{n % 61}.mlp.experts.{n // 61}.gate_proj.weight_scale_inv" for n in range(91_000)]
    receipt["nonfinite"] = {name: {"infinities": 10**9, "nans": 10**9} for name in names}
    size = 1_400_000_000_000 // 163
    shard = {"bytes": size, "xxh3": "0" * 32, "regions": "f" * 16 * -(-size // (4 << 20))}
    receipt["files"] += [{"name": f"model-{n:05}-of-00163.safetensors"} | shard for n in range(163)]
    raw = b"".join(sealed(receipt))
    assert len(raw) < MOST_BYTES // 2
    (tmp_path / RECEIPT).write_bytes(raw)
    assert read_receipt(tmp_path) is not None
