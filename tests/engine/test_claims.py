"""What a receipt claims: a bit flipped in it or in what it lists is named, and what makes no sense is damage."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import paramdelta
from paramdelta.engine.receipt import MOST_BYTES, RECEIPT, SEAL, sealed
from paramdelta.errors import CheckpointError
from tests.make import normal, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest output that has all kinds of files."""
    root = tmp_path_factory.mktemp("small")
    for seed, role in enumerate(("post", "base", "new")):
        tensors = {name: normal((2,), seed=seed) for name in "ab"}
        write_checkpoint(root / role, tensors, shards=2, config={"model_type": "llama"})
    paramdelta.merge(root / "post", root / "base", root / "new", root / "out")
    return root / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "out")


def receipt_in(output: Path) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads((output / RECEIPT).read_text())
    return receipt


def failing_files(output: Path) -> set[str]:
    return {failure.file for failure in paramdelta.verify(output, workers=1).failures}


@pytest.mark.parametrize("name", [RECEIPT, INDEX, "recipe.yaml", "README.md", "config.json"])
def test_a_bit_flipped_in_any_byte_is_found_and_named(output: Path, name: str) -> None:
    good = (output / name).read_bytes()
    for place in range(len(good)):
        raw = bytearray(good)
        raw[place] ^= 1 << (5 * place + place // 8) % 8
        (output / name).write_bytes(raw)
        try:
            named = name in failing_files(output)
        except CheckpointError as error:  # it is no receipt any more
            named = name == RECEIPT and RECEIPT in str(error)
        assert named, (place, raw)


def test_receipts_without_a_seal_are_read_as_ever(output: Path) -> None:
    receipt = receipt_in(output)
    del receipt[SEAL], receipt["statistics"]
    (output / RECEIPT).write_text(json.dumps(receipt, indent=1))
    assert paramdelta.verify(output).ok
    (output / RECEIPT).write_text(json.dumps(receipt | {"sha257": "0"}))
    assert failing_files(output) == {RECEIPT}


def claim(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Return what changes the claim about the first shard; None removes."""

    def change(receipt: dict[str, Any]) -> None:
        for key, value in changes.items():
            receipt["files"][0].pop(key)
            if value is not None:
                receipt["files"][0][key] = value

    return change


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda receipt: receipt.update({key: value})


NO_FILES: list[Any] = [None, [], {}, [{}], [None], [{"name": "a", "bytes": 1, "sha256": "0" * 64}]]
SENSELESS: list[Callable[[dict[str, Any]], None]] = [
    claim(regions=None),
    claim(regions=5),
    claim(regions=["0" * 16]),
    *(claim(regions=value) for value in ("0" * 15, "-" + "0" * 15, "0" * 32, "g" * 16, "A" * 16)),
    *(claim(xxh3=value) for value in (5, None, "0" * 31, "+" + "0" * 31, "\x1b" * 32)),
    *(claim(bytes=value) for value in (1 << 70, -1, None, "1", 1.5, True)),
    *(claim(name=value) for value in ("../x", None, INDEX, 5)),
    *(put("files", value) for value in NO_FILES),
    *(put("region_bytes", value) for value in (None, 1 << 21, "4194304")),
    lambda receipt: receipt["files"][-1].update(sha256="0" * 63),
]


@pytest.mark.parametrize("change", SENSELESS, ids=range(len(SENSELESS)))
@pytest.mark.parametrize("recompute", [False, True])
def test_a_receipt_whose_claims_make_no_sense_is_damaged(
    output: Path, change: Callable[[dict[str, Any]], None], recompute: bool
) -> None:
    receipt = receipt_in(output)
    change(receipt)
    (output / RECEIPT).write_text(json.dumps(receipt))
    result = paramdelta.verify(output, recompute=recompute)
    assert (result.ok, result.failures[0].file, result.bytes_read) == (False, RECEIPT, 0)
    (output / RECEIPT).write_bytes(b"".join(sealed(receipt)))
    with pytest.raises(CheckpointError, match="by another version") as caught:
        paramdelta.verify(output)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", '{"fingerprint": 5, "files": []}', "[" * 100_000, "9" * 10_000])
def test_without_a_receipt_there_is_nothing_to_verify_against(output: Path, text: str) -> None:
    (output / RECEIPT).write_text(text)
    with pytest.raises(CheckpointError, match=RECEIPT) as caught:
        paramdelta.verify(output)
    assert caught.value.exit_code == 3


def test_a_receipt_that_is_gone_gigantic_or_no_file_is_none(output: Path) -> None:
    with (output / RECEIPT).open("ab") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than such a file can honestly have"):
        paramdelta.verify(output)
    (output / RECEIPT).unlink()
    with pytest.raises(CheckpointError, match="not an output of paramdelta"):
        paramdelta.verify(output)
    (output / RECEIPT).mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        paramdelta.verify(output)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_receipt_is_not_waited_for(output: Path) -> None:
    (output / RECEIPT).unlink()
    os.mkfifo(output / RECEIPT)
    with pytest.raises(CheckpointError, match="not a regular file"):
        paramdelta.verify(output)
