from __future__ import annotations

import importlib
import inspect
import pkgutil

import paramdelta
from paramdelta import errors
from paramdelta.errors import ParamDeltaError


def test_every_public_name_can_be_imported() -> None:
    for name in paramdelta.__all__:
        assert getattr(paramdelta, name) is not None
        assert name in dir(paramdelta)


def test_every_error_is_public_documented_and_in_the_tree_that_opens_its_module() -> None:
    for name, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, ParamDeltaError):
            assert name in paramdelta.__all__
            assert error.__doc__
            assert errors.__doc__ is not None
            assert name in errors.__doc__


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {
        error.__name__: error.exit_code
        for error in vars(errors).values()
        if inspect.isclass(error) and issubclass(error, ParamDeltaError)
    }
    assert codes == {
        "ParamDeltaError": 1,
        "RecipeError": 2,
        "CheckpointError": 3,
        "FetchError": 3,
        "HeaderError": 3,
        "UnsupportedCheckpointError": 3,
        "MismatchError": 4,
        "OutputError": 5,
        "InputChangedError": 6,
        "VerificationError": 7,
        "NonFiniteError": 8,
        "BudgetError": 9,
        "CancelledError": 130,
    }


def test_data_goes_one_way_through_the_packages() -> None:
    """Each layer imports only the ones below it."""
    layers = [
        "version",
        "errors",
        "storage",
        "checkpoint",
        "planning",
        "engine",
        "insight",
        "results",
        "network",
        "merging",
        "sharing",
        "api",
        "cluster",
        "demo",
        "benchmark",
        "cli",
        "__main__",
    ]
    for module in pkgutil.walk_packages(paramdelta.__path__, "paramdelta."):
        if module.name == "paramdelta.__main__":
            continue
        layer = module.name.split(".")[1]
        source = inspect.getsource(importlib.import_module(module.name))
        for other in layers[layers.index(layer) + 1 :]:
            assert f"paramdelta.{other}" not in source.replace("``paramdelta", ""), (
                f"{module.name} reaches up to {other}"
            )
