"""The drawings of docs/concepts.md, computed by the code that they explain.

    python -m tests.docs.drawings

writes them into docs/drawings/: pooled values by :func:`tokenflex_kernels.pool_norm`, a packed row
by :func:`tokenflex_kernels.plan_packing`, and operations by :mod:`tokenflex.training.flops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path

import torch

from tokenflex.training.build import empty_model
from tokenflex.training.config import load_config
from tokenflex.training.flops import forward_flops
from tokenflex_kernels import plan_packing, pool_norm

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/drawings"

TEXT, VISION = "#d7dbe2", ("#4c78a8", "#f58518", "#54a24b")
INK, FAINT, FRAME = "#1f2933", "#61707f", "#c2410c"
PLACEHOLDER = 9


class Drawing:
    """An SVG of rectangles, lines and words on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13" '
            f'role="img"><title>{title}</title>'
        )
        self.parts: list[str] = []
        self.box(0, 0, width, height, "#ffffff")

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = "none"
    ) -> None:
        """Draw a rectangle."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        color: str = INK,
        anchor: str = "middle",
        size: int = 13,
    ) -> None:
        """Write text whose baseline is at y."""
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{color}" text-anchor="{anchor}" '
            f'font-size="{size}">{escaped}</text>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, color: str = FAINT) -> None:
        """Draw a straight line."""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{color}"/>'
        )

    def arrow_down(self, x: float, y: float, to_y: float) -> None:
        """Draw a vertical line with a head."""
        self.line(x, y, x, to_y)
        self.line(x - 4, to_y - 5, x, to_y)
        self.line(x + 4, to_y - 5, x, to_y)

    def text(self) -> str:
        """Return the file's content."""
        return "\n".join([self.head, *self.parts, "</svg>"]) + "\n"


def grid_to_tokens() -> str:
    """Draw one patch grid of 8 x 8, its windows at three counts, and the averages in them."""
    side, patch = 8, 17
    size = side * patch
    drawing = Drawing(720, 370, "A grid of 8 x 8 patches becomes 4, 9 or 16 vision tokens")
    values = torch.tensor([[_shade(row, column) for column in range(side)] for row in range(side)])

    def draw_grid(left: float, top: float) -> None:
        for row in range(side):
            for column in range(side):
                fill = _grey(values[row, column].item())
                drawing.box(left + column * patch, top + row * patch, patch, patch, fill, "#ffffff")

    top = 40
    drawing.words(24 + size / 2, 26, "patch grid, 8 x 8")
    draw_grid(24, top)
    drawing.words(24 + size / 2, top + size + 22, "one pass of the encoder", size=12)
    drawing.words(24 + size / 2, top + size + 40, "serves every count", size=12)
    for index, n in enumerate((2, 3, 4)):
        left = 200 + index * 175
        drawing.words(left + size / 2, 26, f"windows of {n} x {n} tokens")
        draw_grid(left, top)
        windows = [_window(n, side, cell) for cell in range(n)]
        for row, (first, last) in enumerate(windows):
            for column, (start, end) in enumerate(windows):
                overlap = side % n > 0
                inset = 2 + 2 * ((row + column) % 2) * overlap  # tells neighbours apart
                drawing.box(
                    left + start * patch + inset,
                    top + first * patch + inset,
                    (end - start) * patch - 2 * inset,
                    (last - first) * patch - 2 * inset,
                    "none",
                    FRAME,
                )
        drawing.arrow_down(left + size / 2, top + size + 8, top + size + 34)
        pooled = pool_norm(values.reshape(-1, 1), [(side, side)], [(n, n)])
        token, first_left = 28, left + (size - n * 28) / 2
        for cell, value in enumerate(pooled.flatten().tolist()):
            drawing.box(
                first_left + cell % n * token,
                top + size + 42 + cell // n * token,
                token - 3,
                token - 3,
                _grey(value),
                INK,
            )
        drawing.words(left + size / 2, top + size + 42 + n * token + 16, f"{n * n} vision tokens")
    return drawing.text()


def _shade(row: int, column: int) -> float:
    """Return the brightness of a patch of a picture of two bright spots."""
    spots = ((1.6, 2.1, 3.0), (5.4, 5.2, 5.0))
    return sum(exp(-((row - y) ** 2 + (column - x) ** 2) / wide) for y, x, wide in spots)


def _grey(value: float) -> str:
    level = round(40 + 200 * min(value, 1.0))
    return f"#{level:02x}{level:02x}{level:02x}"


def _window(cells: int, patches: int, cell: int) -> tuple[int, int]:
    """Return the first patch of a cell's window and the one after its last."""
    return cell * patches // cells, -(-(cell + 1) * patches // cells)


def packed_row() -> str:
    """Draw two prompts with three images, and the row that ``plan_packing`` makes of them."""
    prompts, counts = [[1, PLACEHOLDER, 5], [PLACEHOLDER, 7, 8, PLACEHOLDER]], [4, 9, 4]
    plan = plan_packing(prompts, counts, PLACEHOLDER)
    box, left = 30, 45
    drawing = Drawing(720, 332, "Prompts and vision tokens become one packed row")
    drawing.words(left, 26, "prompts, with one placeholder for each image", anchor="start")
    image, x, starts = 0, float(left), []
    for name, prompt in zip("AB", prompts, strict=True):
        drawing.words(x + 8, 60, name)
        x += 24
        for token in prompt:
            is_image = token == PLACEHOLDER
            drawing.box(x, 40, box - 2, box - 2, VISION[image] if is_image else TEXT)
            drawing.words(
                x + 14, 59, "I" if is_image else str(token), color="#ffffff" if is_image else INK
            )
            image += is_image
            x += box
        x += 30
    x += 20
    drawing.words(x, 26, "vision tokens of each image", anchor="start")
    for color, count in zip(VISION, counts, strict=True):
        for cell in range(count):
            drawing.box(x + cell * 12, 42, 10, 24, color)
        drawing.words(x + count * 6, 84, str(count), size=12)
        x += count * 12 + 12
    row = 140
    drawing.words(left, row - 14, "one packed row, without padding", anchor="start")
    image_of_row = [index for index, count in enumerate(counts) for _ in range(count)]
    for at, source in enumerate(plan.source.tolist()):
        fill = TEXT if source >= 0 else VISION[image_of_row[~source]]
        drawing.box(left + at * box, row, box - 2, box - 2, fill)
        if source >= 0:
            drawing.words(left + at * box + 14, row + 19, str(source))
    for name, values, y in (
        ("source", plan.source.tolist(), row + 50),
        ("position_ids", plan.position_ids.tolist(), row + 92),
    ):
        drawing.words(left + 4, y, name, anchor="start", color=FAINT, size=11)
        for at, value in enumerate(values):
            label = f"~{~value}" if value < 0 else str(value)
            drawing.words(left + at * box + 14, y + 17, label, size=11)
    drawing.words(left + 4, row + 134, "cu_seqlens", anchor="start", color=FAINT, size=11)
    for boundary in plan.cu_seqlens.tolist():
        at = left + boundary * box - 1
        starts.append(at)
        drawing.line(at, row - 6, at, row + 138, FRAME)
        drawing.words(at, row + 154, str(boundary), size=12, color=FRAME)
    for name, begin, end in zip("AB", starts, starts[1:], strict=False):
        drawing.words(
            (begin + end) / 2, row + 176, f"sample {name}: attends to itself alone", size=12
        )
    return drawing.text()


def cost_of_a_count() -> str:
    """Draw the operations of a prompt with one picture at three counts, part by part."""
    path = "configs/siglip400m_qwen2.5_7b.yaml"
    config = load_config(ROOT / path)
    flops = forward_flops(empty_model(config.model))
    assert config.sample is not None
    text = round(config.sample.text_tokens)
    parts = ("vision encoder", "projector", "vision rows of the language model", "text rows")
    colors = (VISION[2], VISION[1], VISION[0], TEXT)
    drawing = Drawing(720, 250, "Operations of one prompt at 64, 144 and 256 vision tokens")
    drawing.words(
        20, 26, "10^12 operations of reading a prompt with one picture of one tile", anchor="start"
    )
    scale, left = 100.0, 110.0
    for index, count in enumerate((64, 144, 256)):
        top, x = 44 + index * 42, left
        drawing.words(left - 12, top + 21, f"{count} tokens", anchor="end")
        shares = (
            flops.tile,
            count * flops.vision_token,
            count * flops.token,
            text * flops.token,
        )
        for color, share in zip(colors, shares, strict=True):
            width = share / 1e12 * scale * 0.75
            drawing.box(x, top, width, 32, color)
            x += width
        drawing.words(x + 8, top + 21, f"{sum(shares) / 1e12:.2f}", anchor="start")
    x = left
    for color, part in zip(colors, parts, strict=True):
        drawing.box(x, 182, 12, 12, color)
        drawing.words(x + 18, 193, part, anchor="start", size=12)
        x += 34 + 6.6 * len(part)
    drawing.words(
        20,
        226,
        f"SigLIP-400M + Qwen2.5-7B, {text} text tokens: arithmetic of {path}, not measured",
        anchor="start",
        color=FAINT,
        size=11,
    )
    return drawing.text()


DRAWINGS: dict[str, Callable[[], str]] = {
    "grid-to-tokens.svg": grid_to_tokens,
    "packed-row.svg": packed_row,
    "cost.svg": cost_of_a_count,
}


def main(names: Sequence[str] = ()) -> None:
    """Write the drawings of these names, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or DRAWINGS:
        (FOLDER / name).write_text(DRAWINGS[name](), encoding="utf-8")


if __name__ == "__main__":
    main()
