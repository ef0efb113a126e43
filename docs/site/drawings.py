"""The drawings of docs/concepts.md: `python docs/site/drawings.py` writes them into docs/images/."""

from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "images"
INK, PALE, LINE = "#1f2937", "#6b7280", "#9ca3af"
IMAGE, TEXT, DECODER, LOSS, NOTHING = "#dbeafe", "#dcfce7", "#fef3c7", "#fee2e2", "#f3f4f6"
STRONG = "#2563eb"


class Drawing:
    """An SVG that is built up from boxes, arrows and words; lengths are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="15">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>',
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="{PALE}"/></marker></defs>',
        ]

    def box(self, x: int, y: int, width: int, height: int, fill: str, *lines: str) -> None:
        """A rounded box; its first line is bold, the others are small."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{LINE}"/>'
        )
        middle, top = x + width // 2, y + height // 2 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.words(middle, top + 18 * number + 5, line, "middle", bold=number == 0, small=number > 0)

    def words(
        self, x: int, y: int, text: str, anchor: str = "start", bold: bool = False, small: bool = False, ink: str = INK
    ) -> None:
        """One line of text."""
        weight = ' font-weight="600"' if bold else ""
        size = ' font-size="13"' if small else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{ink}"{weight}{size}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        """A line through points with a tip at its end."""
        path = " ".join(f"{'ML'[bool(number)]}{x} {y}" for number, (x, y) in enumerate(points))
        dashes = ' stroke-dasharray="5 5"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{PALE}" stroke-width="1.6" marker-end="url(#tip)"{dashes}/>'
        )

    def patches(self, x: int, y: int, side: int, count: int, kept: frozenset[int] | None = None) -> None:
        """A square image cut into count x count patches; only `kept` are coloured, by default all."""
        step = side / count
        for number in range(count * count):
            fill = IMAGE if kept is None else STRONG if number in kept else "#ffffff"
            left, top = x + step * (number % count), y + step * (number // count)
            place = f'x="{left:.1f}" y="{top:.1f}" width="{step:.1f}" height="{step:.1f}"'
            self.parts.append(f'<rect {place} fill="{fill}" stroke="{LINE}"/>')

    def text(self) -> str:
        """The whole file."""
        return "\n".join([*self.parts, "</svg>", ""])


def recipe() -> Drawing:
    """OpenVision 1: two texts, a caption decoder, three resolutions."""
    d = Drawing(1060, 640, "The OpenVision recipe: two contrastive losses, a caption decoder, three resolutions")
    d.words(30, 36, "Three stages of growing resolution", bold=True)
    stages = ((40, 4, "84 px", "12.8 billion"), (66, 6, "224 px", "1.02 billion"), (92, 8, "336 px", "256 million"))
    for (side, count, size, samples), left in zip(stages, (38, 118, 212), strict=True):
        d.patches(left, 150 - side, side, count)
        d.words(left + side // 2, 170, size, "middle", bold=True, small=True)
        d.words(left + side // 2, 188, samples, "middle", small=True, ink=PALE)
    d.words(30, 212, "samples of L/14; no weight depends on the grid", small=True, ink=PALE)

    d.box(30, 300, 270, 70, TEXT, "alt-text", "“red bike for sale - shop 24”")
    d.box(30, 450, 270, 90, TEXT, "synthetic caption", "“A red bicycle leans on a wall.", "A cat sleeps below it.”")
    d.box(390, 80, 190, 90, IMAGE, "vision tower", "ViT, no text inside")
    d.box(390, 300, 190, 110, TEXT, "text tower", "bidirectional, read at", "the class token")
    d.arrow((314, 118), (388, 118))
    d.arrow((302, 335), (388, 335))
    d.arrow((302, 480), (345, 480), (345, 385), (388, 385))
    d.words(352, 440, "one sentence,", small=True, ink=PALE)
    d.words(352, 457, "drawn at random", small=True, ink=PALE)

    d.box(760, 70, 270, 50, IMAGE, "image embedding")
    d.arrow((582, 95), (758, 95))
    d.words(668, 84, "mean, norm, head", "middle", small=True, ink=PALE)
    d.box(760, 160, 270, 60, LOSS, "contrastive loss", "image with alt-text")
    d.box(760, 240, 270, 60, LOSS, "contrastive loss", "image with sentence")
    d.arrow((895, 122), (895, 158))
    d.arrow((1020, 122), (1044, 140), (1044, 270), (1032, 270))
    d.arrow((582, 335), (690, 335), (690, 190), (758, 190))
    d.arrow((582, 375), (720, 375), (720, 270), (758, 270))

    d.box(600, 450, 190, 120, DECODER, "caption decoder", "128 learned queries,", "all positions at once")
    d.arrow((545, 172), (545, 230), (640, 230), (640, 448))
    d.words(553, 222, "patch tokens", small=True, ink=PALE)
    d.arrow((545, 412), (545, 510), (598, 510))
    d.words(436, 505, "tokens of the", small=True, ink=PALE)
    d.words(436, 522, "alt-text", small=True, ink=PALE)
    d.box(830, 470, 200, 80, LOSS, "caption loss, weight 2", "contrastive: mean, weight 1")
    d.arrow((792, 510), (828, 510))
    d.arrow((165, 542), (165, 605), (930, 605), (930, 552), dashed=True)
    d.words(548, 597, "the whole caption is the target", "middle", small=True, ink=PALE)
    return d


def openvision2() -> Drawing:
    """OpenVision 2: captioning alone, from a third of the patches."""
    d = Drawing(1060, 400, "OpenVision 2: a caption from 35 % of the patch tokens, no text tower, no contrastive loss")
    d.words(30, 40, "OpenVision 2: one loss", bold=True)
    d.patches(40, 90, 120, 6)
    d.words(100, 232, "all 36 patches", "middle", small=True, ink=PALE)
    d.words(100, 249, "of 84 px", "middle", small=True, ink=PALE)
    d.box(220, 105, 170, 90, IMAGE, "vision tower", "the same ViT")
    d.arrow((165, 150), (218, 150))
    d.patches(450, 90, 120, 6, frozenset({2, 5, 8, 9, 14, 16, 19, 24, 25, 29, 31, 34}))
    d.arrow((392, 150), (444, 150))
    d.words(510, 232, "12 of 36 tokens are kept,", "middle", small=True, ink=PALE)
    d.words(510, 249, "sampled for each image", "middle", small=True, ink=PALE)
    d.box(640, 105, 180, 90, DECODER, "caption decoder", "next token after", "image and caption so far")
    d.arrow((575, 150), (638, 150))
    d.box(870, 105, 160, 90, LOSS, "caption loss", "the only one")
    d.arrow((822, 150), (868, 150))
    d.box(640, 270, 180, 70, TEXT, "synthetic caption", "written with the alt-text")
    d.arrow((730, 268), (730, 197))
    d.arrow((822, 305), (950, 305), (950, 197), dashed=True)
    d.words(832, 297, "target", small=True, ink=PALE)
    d.box(40, 290, 350, 70, NOTHING, "gone", "text tower and contrastive losses")
    return d


def kept() -> Drawing:
    """Which parts of a trained model are kept, where, and for what."""
    d = Drawing(1060, 420, "What is kept of a trained model, and what it is used for")
    d.words(150, 40, "trained", "middle", bold=True)
    d.words(500, 40, "in which files", "middle", bold=True)
    d.words(890, 40, "used for", "middle", bold=True)
    everywhere = ("every file", "released, exported or our own")
    first = ("OpenVision 1", "released, exported and our own")
    runs = ("run folders, model folders", "and the original's JAX trees")
    rows = (
        (IMAGE, "vision tower", everywhere, ("patch tokens, embedding", "for language models and probes")),
        (TEXT, "text tower", first, ("classify and search", "by words")),
        (DECODER, "caption decoder", runs, ("captions; else only", "a teacher in training")),
    )
    for number, (fill, part, files, uses) in enumerate(rows):
        top = 70 + 115 * number
        d.box(40, top, 220, 80, fill, part)
        d.box(360, top, 280, 80, NOTHING, *files)
        d.box(750, top, 280, 80, NOTHING, *uses)
        d.arrow((262, top + 40), (358, top + 40))
        d.arrow((642, top + 40), (748, top + 40))
    return d


def drawings() -> dict[str, str]:
    """File name -> SVG."""
    return {"recipe.svg": recipe().text(), "openvision2.svg": openvision2().text(), "kept.svg": kept().text()}


if __name__ == "__main__":
    for name, svg in drawings().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
