"""Pictures of videos, for people to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def filmstrip(frames: np.ndarray, count: int = 5) -> np.ndarray:
    """`count` frames spread over a clip, side by side: uint8 (t, h, w, 3) -> (h, count * w, 3)."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.concatenate([frames[i] for i in chosen], axis=1)


def contact_sheet(rows: Sequence[tuple[str, np.ndarray]], *, count: int = 5, scale: int = 2) -> Image.Image:
    """A filmstrip per video under its text. rows: (text, uint8 (t, h, w, 3)), all of one size."""
    strips = [Image.fromarray(filmstrip(frames, count)) for _, frames in rows]
    width, height = strips[0].width * scale, strips[0].height * scale
    font = ImageFont.load_default(size=13)
    caption = 20
    sheet = Image.new("RGB", (width, len(rows) * (height + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((text, _), strip) in enumerate(zip(rows, strips, strict=True)):
        top = i * (height + caption)
        while draw.textlength(text, font) > width - 8:
            text = text[: int(len(text) * 0.97) - 1].rstrip() + "…"
        draw.text((4, top + 2), text, fill="black", font=font)
        sheet.paste(strip.resize((width, height), Image.Resampling.NEAREST), (0, top + caption))
    return sheet
