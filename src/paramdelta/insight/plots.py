"""The plots of an analysis, and how they become files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from paramdelta.checkpoint.wording import printable
from paramdelta.errors import OutputError, RecipeError
from paramdelta.insight.files import replace_file
from paramdelta.insight.heat_maps import cosines, pairs
from paramdelta.insight.histograms import changes
from paramdelta.insight.layer_plots import norms, relative

if TYPE_CHECKING:
    from paramdelta.insight.plot import Analysis, Plot

KINDS: Final = (".svg", ".png")


def plots(analysis: Analysis) -> list[Plot]:
    """Return all plots of an analysis: first that of all deltas together, then each delta's."""
    deltas = analysis["deltas"]
    found = [pairs(analysis)] if analysis["pairs"] else []
    for place, delta in enumerate(deltas):
        suffix = f"-{place + 1}" if len(deltas) > 1 else ""
        found += [plot for make in (relative, norms, cosines, changes) if (plot := make(delta, place, suffix))]
    return found


def export_plots(analysis: Analysis, target: str | Path, kind: str = ".svg") -> list[Path]:
    """Write each plot to a file of its own, for a paper or a slide, and return the files.

    Args:
        analysis: what is shown.
        target: a directory, made if it is not there, for files that are called after what they show; or a name that
            ends in .svg or .png and begins theirs: ``model.png`` makes ``model-norms.png`` and so on.
        kind: .svg or .png, for a directory.

    Raises:
        OutputError: a file cannot be written, or matplotlib is not there.
        RecipeError: there is no such kind of plot.
    """
    directory, prefix = Path(target), ""
    if directory.suffix in KINDS and not directory.is_dir():
        directory, prefix, kind = directory.parent, f"{directory.stem}-", directory.suffix
    if kind not in KINDS:
        raise RecipeError(f"plots: {kind!r} is not a kind of plot", remedy="Use .svg or .png.")
    written = []
    for plot in plots(analysis):
        path = directory / f"{prefix}{plot.name}{kind}"
        content = plot.png() if kind == ".png" else plot.svg().encode()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be made: {error.strerror}", file=printable(str(directory))) from error
        replace_file(path, content)
        written.append(path)
    return written
