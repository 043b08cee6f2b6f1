"""A bar chart as SVG, readable on light and dark pages."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

WIDTH, LABELS, ROW, BAR, TOP = 760, 330, 34, 20, 44


def draw(file: Path, title: str, values: Mapping[str, float]) -> None:
    """Write one horizontal bar a value, in the order given, with the value behind it."""
    most = max(values.values())
    height = TOP + ROW * len(values) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="14" fill="#767676">',
        f'<text x="8" y="24" font-size="16">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(values.items()):
        y = TOP + ROW * number
        length = round((WIDTH - LABELS - 60) * value / most)
        colour = "#2f7ed8" if name.startswith("Inkwell") else "#9a9a9a"
        parts += [
            f'<text x="{LABELS - 10}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LABELS}" y="{y}" width="{length}" height="{BAR}" rx="2" fill="{colour}"/>',
            f'<text x="{LABELS + length + 8}" y="{y + 15}">{value:.2f}</text>',
        ]
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")
