"""Small packages in the form of the real ones: npm tarballs, Debian packages, drawings, photographs."""

import gzip
import io
import json
import lzma
import struct
import tarfile

import numpy as np
from PIL import Image

from openvision.data.sources.picto.emoji import STYLES

ROOT = '<svg xmlns="http://www.w3.org/2000/svg"'
# The owl is held out: the hash of its name says so.
EMOJI = {"frog": "1F438", "hammer": "1F528", "owl": "1F989", "snail": "1F40C"}
COLOURS = {"frog": "#22aa33", "hammer": "#777777", "owl": "#cc88ee", "snail": "#884422"}
FASHION = "usr/share/datasets/fashion-mnist/t10k"


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npm(files: dict[str, object]) -> bytes:
    encoded = {name: data if isinstance(data, bytes) else json.dumps(data).encode() for name, data in files.items()}
    return gzip.compress(tar_of({f"package/{name}": data for name, data in encoded.items()}), mtime=0)


def debian(files: dict[str, bytes]) -> bytes:
    content = b"!<arch>\n"
    data = lzma.compress(tar_of({f"./{name}": data for name, data in files.items()}))
    for name, part in (("debian-binary", b"2.0"), ("data.tar.xz", data)):
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part
        content += b"\n" * (len(part) % 2)
    return content


def icons(radius: int, names: dict[str, str] | None = None) -> dict[str, object]:
    """Discs in the colours of their emoji; the radius is the style."""
    bodies = {
        (names or {}).get(name, name): {"body": f'<circle cx="50" cy="50" r="{radius}" fill="{colour}"/>'}
        for name, colour in COLOURS.items()
    }
    return {"width": 100, "height": 100, "icons": bodies}


def emoji_rows() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"label": name, "hexcode": code, "emoji": chr(int(code, 16)), "group": 0, "tags": ["owl", "pond"]}
        for name, code in EMOJI.items()
    ]
    return [*rows, {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "🇦"}]


def image(colour: tuple[int, int, int], side: int) -> bytes:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[8 : 8 + side, 8 : 8 + side] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawing(title: str, tags: list[str], licence: str = "PublicDomain", extra: str = "") -> bytes:
    bag = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
    side = 20 + sum(title.encode()) % 50
    return (
        f'{ROOT} xmlns:rdf="r" xmlns:dc="d" xmlns:cc="c" width="200mm" height="200mm"><metadata><rdf:RDF><cc:Work>'
        f"<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject>"
        f'<cc:license rdf:resource="http://web.resource.org/cc/{licence}"/></cc:Work></rdf:RDF></metadata>'
        f'<rect x="300" y="40" width="{side}" height="60" fill="#aa2200"/>{extra}</svg>'
    ).encode()


def idx(values: np.ndarray) -> bytes:
    head = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(head + values.tobytes())


CLIPART = {
    "food/bottle.svg": drawing("A Bottle", ["hash", "glass", "food"]),
    "food/cup.svg": drawing("A Cup", []),
    "animals/barn_owl.svg": drawing("Barn Owls", ["bird"]),
    "animals/stolen.svg": drawing("Some Horse", ["bird"], licence="BY-NC"),
    "special/stripes.svg": drawing("Stripes", []),
    "food/menu.svg": drawing("A Menu", [], extra='<text x="1" y="9">Soup</text>'),
}


def fake_files() -> dict[str, bytes]:
    """Tiny packages of the layout of the real ones."""
    codes = {code.lower(): name for name, code in EMOJI.items()}
    files = {
        "emojibase": {
            "en/data.json": emoji_rows(),
            "en/messages.json": {"groups": [{"key": "animals", "message": "animals & nature", "order": 0}]},
            **{
                f"en/shortcodes/{vendor}.json": {}
                for vendor in ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")
            },
        },
        "emojilib": {"dist/emoji-en-US.json": {chr(int(EMOJI["frog"], 16)): ["frog", "toad", "owls", ":)"]}},
        "google": {"emoji.json": [{"name": "FROG FACE", "unified": EMOJI["frog"]}]},
        "twitter": {},
    }
    for side, style in enumerate(("google", "twitter"), start=30):
        for name, code in EMOJI.items():
            colour = tuple(bytes.fromhex(COLOURS[name][1:]))
            files[style][f"img/{style}/64/{code.lower()}.png"] = image((colour[0], colour[1], colour[2]), side)
    for radius, style in enumerate(style for style in STYLES if style.png_folder is None):
        names = {"frog": "frog-face"} if style.name == "emojione" else {}
        files[style.name] = {"icons.json": icons(30 + 2 * radius, names), "chars.json": codes}
    packed = {short: npm(content) for short, content in files.items()}
    packed["openclipart"] = debian({f"usr/share/openclipart/svg/{name}": data for name, data in CLIPART.items()})
    images = np.zeros((20, 28, 28), np.uint8)
    images[:, 4:24, 10:18] = 200
    labels = np.arange(20, dtype=np.uint8) % 10
    packed["fashion-mnist"] = debian(
        {f"{FASHION}-images-idx3-ubyte.gz": idx(images), f"{FASHION}-labels-idx1-ubyte.gz": idx(labels)}
    )
    return packed
