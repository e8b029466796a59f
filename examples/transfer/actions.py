"""What stages do. Merges are made by the command, as anybody would; what its receipt says of the deltas is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import yaml

from examples.transfer.evaluate import agreement, evaluate
from examples.transfer.models import export_base
from examples.transfer.train import Course, post_train, update

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Settings = Mapping[str, Any]
    Inputs = Mapping[str, Path]

MODEL = "model"  # in the directory of a stage that makes a checkpoint
RESULT = "result.json"
GEOMETRY = "geometry.json"
LOSSES = "losses.json"


def base(_settings: Settings, _inputs: Inputs, directory: Path) -> None:
    """Write the model that all begins with."""
    export_base(directory / MODEL)


def update_base(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Go on with pre-training."""
    write(directory / LOSSES, update(inputs["start"] / MODEL, _course(settings), directory / MODEL))


def teach(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Post-train."""
    losses = post_train(inputs["start"] / MODEL, settings["skills"], _course(settings), directory / MODEL)
    write(directory / LOSSES, losses)


def merge(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Merge one delta."""
    options = [part for role, path in inputs.items() for part in (f"--{role.replace('_', '-')}", path / MODEL)]
    _paramdelta("merge", *options, "--alpha", settings["alpha"], "-o", directory / MODEL)
    _keep_geometry(directory)


def merge_two(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Merge two deltas, as a recipe says."""
    recipe = {
        "new_base": str(inputs["new_base"] / MODEL),
        "deltas": [
            {"post": str(inputs[role] / MODEL), "base": str(inputs["base"] / MODEL), "alpha": alpha}
            for role, alpha in zip(("first", "second"), settings["alphas"], strict=True)
        ],
        "output": MODEL,
    }
    (directory / "two.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    _paramdelta("run", directory / "two.yaml")
    [pair] = _paramdelta("analyze", directory / "two.yaml")["pairs"]
    write(directory / GEOMETRY, _keep_geometry(directory) | {"between": pair["cosine"]})


def score(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Score a checkpoint; the scores of a merged one come with the geometry of its merge."""
    found = evaluate(inputs["checkpoint"] / MODEL, settings["skills"], settings["items"], settings["blocks"])
    geometry = inputs["checkpoint"] / GEOMETRY
    if geometry.exists():
        found["geometry"] = json.loads(geometry.read_text(encoding="utf-8"))
    write(directory / RESULT, found)


def decode(settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Check that scores are those of decoded answers."""
    write(directory / RESULT, agreement(inputs["checkpoint"] / MODEL, settings["skills"], settings["items"]))


def angle(_settings: Settings, inputs: Inputs, directory: Path) -> None:
    """Compare two ways from one checkpoint: a merge's receipt has the angle, whatever its inputs are called."""
    roles = {"--post": "one", "--base": "start", "--new-base": "other"}
    options = [part for option, role in roles.items() for part in (option, inputs[role] / MODEL)]
    _paramdelta("merge", *options, "-o", directory / MODEL)
    geometry = _keep_geometry(directory)
    for path in (directory / MODEL).iterdir():
        path.unlink()
    write(directory / RESULT, {"geometry": geometry})


ACTIONS = {
    "base": base,
    "update": update_base,
    "post-train": teach,
    "merge": merge,
    "merge-two": merge_two,
    "score": score,
    "decode": decode,
    "angle": angle,
}


def write(path: Path, found: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


def _course(settings: Settings) -> Course:
    return Course(**{each.name: settings[each.name] for each in fields(Course)})


def _paramdelta(*arguments: object) -> Any:
    command = [sys.executable, "-m", "paramdelta", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"paramdelta exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _keep_geometry(directory: Path) -> dict[str, Any]:
    """Take norms and angles from the receipt: of all weights together, and of each layer."""
    statistics = json.loads((directory / MODEL / "paramdelta.json").read_text(encoding="utf-8"))["statistics"]
    geometry = {"total": statistics["total"], "layers": _by_layer(statistics["tensors"])}
    write(directory / GEOMETRY, geometry)
    return geometry


def _by_layer(tensors: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Add the first delta's tensors up by layer: norms squared, and products from cosines."""
    sums: dict[str, list[float]] = {}
    for name, (found, *_) in tensors.items():
        parts = name.split(".")
        layer = parts[2] if parts[1] == "layers" else "embeddings" if "embed" in name else "norm"
        product = (found["cosine"] or 0.0) * found["delta_norm"] * found["base_shift_norm"]
        squares = (found["delta_norm"] ** 2, found["base_shift_norm"] ** 2, product)
        sums[layer] = [one + other for one, other in zip(sums.get(layer, [0.0] * 3), squares, strict=True)]
    return {
        layer: {
            "delta_norm": round(delta**0.5, 5),
            "base_shift_norm": round(shift**0.5, 5),
            "cosine": round(product / (delta * shift) ** 0.5, 5) if delta * shift else 0.0,
        }
        for layer, (delta, shift, product) in sums.items()
    }
