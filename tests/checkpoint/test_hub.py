from __future__ import annotations

import json
from pathlib import Path

import pytest

import paramdelta
from paramdelta.checkpoint.checkpoint import open_checkpoint
from paramdelta.checkpoint.hub import HubModel, cache, locate, model_of
from paramdelta.errors import CheckpointError
from tests.make import normal, write_checkpoint

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of org/name, as the Hub's client lays them out."""
    root = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    folder = root / "models--org--name"
    for commit in (COMMIT, OTHER):
        blob = write_checkpoint(tmp_path / commit[0], {"w": normal((4,), seed=len(commit[0]))}) / "model.safetensors"
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        blob.rename(folder / "blobs" / commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(f"../../blobs/{commit}")
    (folder / "refs/pr").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "refs/v1").write_text(OTHER + "\n")
    (folder / "refs/pr/1").write_text(OTHER)
    return root


@pytest.mark.parametrize(
    ("text", "commit"),
    [
        ("org/name", COMMIT),
        ("hf://org/name", COMMIT),
        ("org/name@main", COMMIT),
        ("org/name@v1", OTHER),
        ("org/name@pr/1", OTHER),
        (f"org/name@{OTHER}", OTHER),
    ],
)
def test_a_model_and_revision_is_the_snapshot_in_the_cache(hub: Path, text: str, commit: str) -> None:
    snapshot = hub / "models--org--name" / "snapshots" / commit
    assert locate(text) == snapshot
    assert open_checkpoint(text).path == snapshot
    assert model_of(locate(text)) == HubModel("org/name", commit)


def test_models_in_the_cache_are_merged_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are links into read-only blobs; the receipt knows names, commits and blobs."""
    root = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    monkeypatch.chdir(tmp_path)
    for seed, role in enumerate(("post", "base", "new")):
        made = write_checkpoint(tmp_path / "plain" / role, {"w": normal((40, 50), seed=seed)}, config={"of": role})
        folder = root / f"models--org--{role}"
        snapshot = folder / "snapshots" / COMMIT
        (folder / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, file in enumerate(sorted(made.iterdir())):
            blob = folder / "blobs" / f"{seed}{number}".ljust(64, "f")
            blob.write_bytes(file.read_bytes())
            blob.chmod(0o444)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    post, base, new = (tmp_path / "plain" / role for role in ("post", "base", "new"))
    paramdelta.merge("org/post", "hf://org/base", f"org/new@{COMMIT}", tmp_path / "out")
    paramdelta.merge(post, base, new, tmp_path / "wanted")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    inputs = json.loads((tmp_path / "out" / "paramdelta.json").read_text())["inputs"]
    assert [source["name"] for source in inputs] == [f"org/{role}@{COMMIT}" for role in ("new", "post", "base")]
    assert len({source["fingerprint"] for source in inputs}) == 3
    again = paramdelta.merge_recipe(paramdelta.read_recipes(tmp_path / "out" / "recipe.yaml")[0].recipe, tmp_path / "b")
    assert again.tensors == 1
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert paramdelta.verify(tmp_path / "out", recompute=True).ok


@pytest.mark.usefixtures("hub")
def test_a_path_that_exists_wins(tmp_path: Path) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    assert locate("org/name") == Path("org/name")
    assert "snapshots" in str(locate("hf://org/name"))


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("org/missing", "hf download org/missing"),
        ("hf://org/missing", "hf download org/missing"),
        ("org/name@v2", "hf download org/name --revision v2"),
        ("org/missing@v2", "hf download org/missing --revision v2"),
    ],
)
def test_what_is_not_in_the_cache_is_an_error_that_says_how_to_get_it(
    text: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a core install, which reads nothing that is not on this machine."""
    monkeypatch.setattr("paramdelta.checkpoint.hub._client_is_installed", lambda: False)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(text)
    assert remedy in str(caught.value)
    assert "paramdelta[remote]" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("revision", ["../../../../etc", "a/../../b", ".."])
@pytest.mark.usefixtures("hub")
def test_a_revision_never_leads_out_of_the_cache(revision: str) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(f"org/name@{revision}")


def test_a_ref_that_holds_no_commit_is_an_error(hub: Path) -> None:
    (hub / "models--org--name/refs/main").write_text("../../../../../etc")
    with pytest.raises(CheckpointError, match="does not hold a commit"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    "text", ["org/name/deep", "./org/name", "name", "C:\\\\org\\\\name", "org\\\\name", "/org/name"]
)
@pytest.mark.usefixtures("hub")
def test_other_texts_are_paths(text: str) -> None:
    assert locate(text) == Path(text)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/h"}, "/h/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"),
    ],
)
def test_the_cache_is_where_its_client_looks(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache() == Path(expected).expanduser()


def test_paths_outside_a_cache_show_no_model() -> None:
    assert model_of(Path("/models/Llama-3-8B")) is None
