"""The errors of a quantized model's weights as an SVG plot: one dot a weight, by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 50, 50  # around the axes
MOST_LABELS = 16
# P. Tol, Colour schemes, SRON/EPS/TN/09-002: told apart by colour-blind people, too
COLOURS = (
    "#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255",
    "#aa4499",
)  # fmt: skip
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def plot(title: str, errors: Mapping[str, float]) -> str:
    """The whole file.

    Args:
        title: above the plot.
        errors: relative errors by the Hugging Face names of weights.
    """
    points = [(*_place(name), error) for name, error in errors.items() if math.isfinite(error)]
    last = max((layer for layer, *_ in points if layer is not None), default=0)
    step = _step(max((error for *_, error in points), default=0.0))
    top = step * max(1, math.ceil(max((error for *_, error in points), default=0.0) / step))
    kinds = list(dict.fromkeys(kind for _, kind, _ in points))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}

    def x(layer: int | None, kind: str) -> float:
        column = layer + 1 if layer is not None else 0 if "embed" in kind else last + 2
        return LEFT + (column + 0.5) / (last + 3) * (WIDTH - LEFT - RIGHT)

    def y(error: float) -> float:
        return HEIGHT - BOTTOM - error / top * (HEIGHT - TOP - BOTTOM)

    every = -(-(last + 1) // MOST_LABELS)
    ticks = takewhile(lambda tick: tick < top + step / 2, (step * i for i in count()))
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 25, f"{title}: relative error of each weight", size=15),
        *(part for tick in ticks for part in _grid_line(y(tick), f"{tick:.3g}")),
        *(_text(x(i, ""), HEIGHT - BOTTOM + 18, str(i), "middle")
          for i in range(0, last + 1, every)),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "layer", "middle"),
        f'<g transform="rotate(-90 18 {HEIGHT / 2})">'
        f'{_text(18, HEIGHT / 2, "root mean square error / weight", "middle")}</g>',
        *(_dot(x(layer, kind), y(error), colours[kind]) for layer, kind, error in points),
        *_legend(colours.items()),
        "</svg>\n",
    ))  # fmt: skip


def _place(name: str) -> tuple[int | None, str]:
    """The layer and the kind of a weight; tables and heads are of no layer."""
    if found := _LAYER.fullmatch(name):
        return int(found[1]), found[2].rpartition(".")[2]
    return None, name.removesuffix(".weight").removeprefix("model.")


def _step(largest: float) -> float:
    """A round distance between about five lines."""
    if largest <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(largest / 5))
    return float(next(power * digit for digit in (1, 2, 5, 10) if power * digit * 5 >= largest))


def _grid_line(y: float, label: str) -> tuple[str, str]:
    line = f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
    return line, _text(LEFT - 8, y + 4, label, "end")


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}" fill-opacity="0.85"/>'


def _legend(colours: Iterable[tuple[str, str]]) -> Iterable[str]:
    for i, (kind, colour) in enumerate(colours):
        yield _dot(WIDTH - RIGHT + 25, TOP + 20 * i, colour)
        yield _text(WIDTH - RIGHT + 35, TOP + 20 * i + 4, kind)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    text = escape("".join(filter(str.isprintable, text)))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{text}</text>'
