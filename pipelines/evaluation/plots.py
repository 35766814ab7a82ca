"""Line charts with intervals, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

# x, y, and the interval of y.
Point = tuple[float, float, float, float]

# Told apart by most colour-blind readers (Okabe and Ito, 2008).
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
WIDTH, HEIGHT = 860, 460
LEFT, TOP, RIGHT, BOTTOM = 70, 52, 200, 50


def line_chart(
    lines: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    reverse: bool = False,
) -> Image.Image:
    """Draw a line a name through its points, each with a bar for its interval; y begins at 0 or below.

    Args:
        x_names: what stands under x = 0, 1, 2 ... in place of the numbers; points are not joined then.
        reverse: put the largest x at the left.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font, heading = ImageDraw.Draw(sheet), ImageFont.load_default(12), ImageFont.load_default(15)
    points = [point for line in lines.values() for point in line]
    x_low, x_high = min(point[0] for point in points), max(point[0] for point in points)
    y_low, y_high = min(0.0, *(point[2] for point in points)), max(point[3] for point in points) or 1.0
    ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, ticks[0]), max(y_high, ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        along = 1 - along if reverse else along
        up = (y - y_low) / (y_high - y_low)
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 4), title, fill="black", font=heading)
    draw.text((LEFT, HEIGHT - 20), x_label, fill="black", font=font)
    draw.text((6, 27), y_label, fill="black", font=font)
    for tick in ticks:
        _, y = place(x_low, tick)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill="#dddddd")
        draw.text((LEFT - 6, y), f"{tick:g}", fill="black", font=font, anchor="rm")
    xs = sorted({point[0] for point in points})
    for x in xs[:: max(1, len(xs) // 10)]:
        label = x_names[int(x)] if x_names else f"{x:g}"
        draw.text((place(x, y_low)[0], HEIGHT - BOTTOM + 6), label, fill="black", font=font, anchor="ma")
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        # Beside each other, so that bars of near values can be told apart.
        shift = (number - (len(lines) - 1) / 2) * 2
        path = []
        for x, y, low, high in sorted(line):
            (left, middle), (_, top), (_, bottom) = place(x, y), place(x, high), place(x, low)
            path.append((left + shift, middle))
            draw.line([(left + shift, top), (left + shift, bottom)], fill=colour)
            draw.ellipse([left + shift - 3, middle - 3, left + shift + 3, middle + 3], fill=colour)
        # Nothing lies between one name and the next.
        if len(path) > 1 and x_names is None:
            draw.line(path, fill=colour, width=2)
        height = TOP + 18 * number
        draw.line([(WIDTH - RIGHT + 14, height + 7), (WIDTH - RIGHT + 34, height + 7)], fill=colour, width=3)
        draw.text((WIDTH - RIGHT + 40, height), name[:26], fill="black", font=font)
    return sheet


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1) if (high - low) / (step * part) <= 8 or part == 1)
    return [round(step * number, 10) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
