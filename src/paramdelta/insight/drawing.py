"""How plots look: the same bytes from the same numbers, in the colours of a light page, which a page may replace.

Everything that knows matplotlib, an optional dependency, is imported here, and only when something is drawn.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree

from paramdelta.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LIGHT: Final = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "quiet": "#57606b",
    "attention": "#0b62a4",
    "mlp": "#b35900",
    "norm": "#7a3fa3",
    "embedding": "#1d7a3e",
    "head": "#b4234b",
    "other": "#6a6f00",
    "positive": "#0a5c9e",
    "negative": "#b54708",
}
DARK: Final = {
    "paper": "#14171b",
    "ink": "#e6e9ed",
    "quiet": "#a3adb8",
    "attention": "#6bb1f2",
    "mlp": "#f0a050",
    "norm": "#c9a0e6",
    "embedding": "#6cc489",
    "head": "#f28aa5",
    "other": "#c8cc52",
    "positive": "#6fb4f4",
    "negative": "#f2a65a",
}
"""What stands for the same names where the page is dark."""

_STYLE: Final = {
    "axes.edgecolor": LIGHT["quiet"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["ink"],
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it: the same layout everywhere
    "font.size": 8.5,
    "grid.alpha": 0.3,
    "grid.color": LIGHT["quiet"],
    "grid.linewidth": 0.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text, not outlines: smaller, and it can be found and read aloud
    "svg.hashsalt": "paramdelta",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["quiet"],
    "xtick.labelcolor": LIGHT["ink"],
    "xtick.major.width": 0.6,
    "ytick.color": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["ink"],
    "ytick.major.width": 0.6,
}
_TIP: Final = "tip:"
_BETWEEN_TIPS: Final = "¦"
_NUMBER: Final = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_REFERENCE: Final = re.compile(r"#(\w+)")


def require_matplotlib() -> None:
    """See that plots can be drawn.

    Raises:
        OutputError: matplotlib is not there, or cannot be imported.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OutputError(
            f"plots need matplotlib, which cannot be imported: {error}",
            remedy="Install it: pip install 'paramdelta[plots]'",
        ) from error


@contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Give a figure to draw on, in inches.

    Raises:
        OutputError: matplotlib is not there.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def tip(artist: Any, *texts: str) -> None:
    """Say what an artist stands for, or each of its points: a pointer that rests on it shows the text."""
    artist.set_gid(_TIP + _BETWEEN_TIPS.join(texts))


def as_png(figure: Any) -> bytes:
    """Return the figure as PNG, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor=LIGHT["paper"], metadata={"Software": None})
    return buffer.getvalue()


def as_svg(figure: Any, name: str, title: str) -> str:
    """Return the figure as SVG of presentation attributes alone, which need no permission to style.

    Args:
        figure: what was drawn.
        name: begins every id in it, so that several can be on one page.
        title: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    _plain(root)
    _name(root, name)
    root.attrib |= {
        "xmlns": "http://www.w3.org/2000/svg",
        "role": "img",
        "aria-label": title,
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def themed(svg: str) -> str:
    """Return SVG with its colours as CSS variables, as `variables` defines them."""
    names = {colour: name for name, colour in LIGHT.items()}
    return re.sub(r'(?<=")#[0-9a-f]{6}(?=")', lambda found: f"var(--{names[found[0]]})", svg)


def variables(colours: Mapping[str, str]) -> str:
    """Return colours as CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _plain(root: ElementTree.Element) -> None:
    """Drop namespaces, style sheets and needless digits, all through the tree."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text = element.text if element.tag == "text" else None
        element.tail = None
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        style = dict(rule.split(": ", 1) for rule in given.pop("style", "").split("; ") if rule)
        style.pop("font-family", None)
        if font := style.pop("font", None):  # until matplotlib 3.10: size and families in one
            style["font-size"] = font.split()[0]
        if given.get("transform", "").startswith("rotate(-0 "):
            del given["transform"]
        for key in given.keys() & {"d", "x", "y", "width", "height", "transform", "points"}:
            given[key] = " ".join(_NUMBER.sub(_rounded, given[key]).split())
        element.attrib.clear()
        element.attrib |= given | style


def _rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):z.2f}".rstrip("0").rstrip(".")


def _name(root: ElementTree.Element, name: str) -> None:
    """Turn ids that are tips into titles, prefix those that something refers to, and drop the rest."""
    used = {
        found
        for element in root.iter()
        for key, value in element.attrib.items()
        if key in ("href", "clip-path")
        for found in _REFERENCE.findall(value)
    }
    for element in list(root.iter()):
        given = element.attrib.pop("id", "")
        if given.startswith(_TIP):
            texts = given.removeprefix(_TIP).split(_BETWEEN_TIPS)
            for target, text in zip(list(element.iter("use")) or [element], texts, strict=True):
                ElementTree.SubElement(target, "title").text = text
        elif given in used:
            element.set("id", f"{name}-{given}")
        for key in element.attrib.keys() & {"href", "clip-path"}:
            element.set(key, element.attrib[key].replace("#", f"#{name}-"))
