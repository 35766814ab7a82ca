"""Reference data: emoji artwork of several vendors, named by Unicode CLDR, composited on named colours.

The artwork and the names come from npm packages (see `PACKAGES`); a *concept* is one emoji without skin tone, a *style*
is one vendor's drawing of it, and a picture is a concept in a style on a background colour.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from textcond.folders import atomic_folder, read_json, write_json

RESOLUTION = 128

# Style word in captions -> icon set. Licences and attribution are in the model card.
STYLES = {
    "noto": "noto",
    "blob": "noto-v1",
    "twemoji": "twemoji",
    "fluent": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "firefox": "fxemoji",
}
# A seventh vendor that nothing trains on: retrieval is measured on it.
HELD_OUT_STYLE, HELD_OUT_SET = "emojione", "emojione"

COLOURS = {
    "white": (255, 255, 255),
    "red": (229, 57, 53),
    "orange": (251, 140, 0),
    "yellow": (253, 216, 53),
    "green": (67, 160, 71),
    "blue": (30, 136, 229),
    "purple": (142, 36, 170),
    "pink": (244, 143, 177),
    "brown": (109, 76, 65),
    "gray": (158, 158, 158),
    "black": (33, 33, 33),
}
DEFAULT_COLOUR = "white"

PACKAGES = [f"@iconify-json/{name}@1" for name in [*STYLES.values(), HELD_OUT_SET]] + [
    "cldr-annotations-full@48",
    "cldr-annotations-derived-full@48",
    "unicode-emoji-json@0.9",
]

# Groups of emoji, in the order in which concepts join the training set: animals and food look alike across vendors.
GROUPS = [
    ["Animals & Nature", "Food & Drink"],
    ["Travel & Places", "Objects", "Activities", "Smileys & Emotion"],
    ["People & Body", "Symbols"],
]
# Drawings that differ by the hands of a clock or the arrow in a box are told apart by nobody at this size.
LOOK_ALIKE = re.compile(r"o’clock|-thirty|arrow|button|\bmoon\b|mailbox|medium|small|: (man|woman|beard)")


@dataclass
class Concept:
    """One emoji: its CLDR short name, its keywords, and the names that other languages give it."""

    name: str
    emoji: str
    group: str
    keywords: list[str]
    names: dict[str, str] = field(default_factory=dict)


def read_concepts(folder: str | Path) -> list[Concept]:
    """The concepts that `prepare` wrote, in the order in which they join the training set."""
    return [Concept(**row) for row in read_json(Path(folder) / "concepts.json")["concepts"]]


@dataclass
class ReferenceData:
    """Rendered artwork. `pixels[row]` is the RGBA picture `(128, 128, 4)` of `icons[row] = (concept index, style)`."""

    concepts: list[Concept]
    icons: list[tuple[int, str]]
    pixels: np.ndarray

    @classmethod
    def load(cls, folder: str | Path) -> ReferenceData:
        """Read what `prepare` wrote; the pixels stay on disk, memory-mapped."""
        folder = Path(folder)
        meta = read_json(folder / "concepts.json")
        return cls(
            concepts=read_concepts(folder),
            icons=[tuple(icon) for icon in meta["icons"]],
            pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
        )

    def rows(self, concepts: int | None = None, styles: list[str] | None = None) -> list[int]:
        """Rows of the first `concepts` concepts (all when None) in `styles` (the training styles when None)."""
        styles = list(STYLES) if styles is None else styles
        limit = len(self.concepts) if concepts is None else concepts
        return [row for row, (concept, style) in enumerate(self.icons) if concept < limit and style in styles]

    def composite(self, rows: list[int], colours: list[str]) -> torch.Tensor:
        """Pictures of `rows` on `colours`, float32 in -1..1, `(n, 3, 128, 128)`."""
        rgba = torch.from_numpy(np.stack([self.pixels[row] for row in rows])).float().permute(0, 3, 1, 2)
        background = torch.tensor([COLOURS[colour] for colour in colours]).float()[:, :, None, None]
        return composite(rgba, background)


def composite(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Alpha-composite `rgba` `(n, 4, h, w)` in 0..255 over `background` `(n, 3, 1, 1)`; float in -1..1."""
    alpha = rgba[:, 3:] / 255
    return (rgba[:, :3] * alpha + background * (1 - alpha)) / 127.5 - 1


def is_held_out(concept: str, style: str, colour: str) -> bool:
    """Whether a subject-style-colour combination is kept out of training (one in five; never on white)."""
    digest = hashlib.sha256(f"{concept}|{style}|{colour}".encode()).digest()
    return colour != DEFAULT_COLOUR and digest[0] < 51


def is_held_out_concept(name: str) -> bool:
    """Whether every caption, name and keyword list of a concept is kept out of alignment (one in five)."""
    return hashlib.sha256(name.lower().encode()).digest()[0] < 51


def is_unseen_concept(name: str) -> bool:
    """Whether dictionaries' entries for a held-out concept are kept out of alignment too (one in ten)."""
    return hashlib.sha256(name.lower().encode()).digest()[0] < 26


# -- captions --------------------------------------------------------------------------------------------------------


def caption(concept: Concept, style: str | None = None, colour: str | None = None, *, words: str | None = None) -> str:
    """The caption "{name}, {style} style, on a {colour} background" with only the parts that are given."""
    text = words or concept.name
    if style:
        text += f", {style} style"
    if colour:
        article = "an" if colour[0] in "aeiou" else "a"
        text += f"{', ' if style else ' '}on {article} {colour} background"
    return text


def sample_caption(concept: Concept, style: str, colour: str, rng: np.random.Generator) -> str:
    """A random training caption of a picture: style and name mostly, keywords sometimes. White may go unsaid."""
    words = concept.name
    if rng.random() < 0.15 and len(concept.keywords) > 1:
        count = min(len(concept.keywords), int(rng.integers(2, 5)))
        words = ", ".join(rng.permutation(concept.keywords)[:count])
    said_style = style if rng.random() < 0.9 else None
    said_colour = colour if colour != DEFAULT_COLOUR or rng.random() < 0.15 else None
    return caption(concept, said_style, said_colour, words=words)


# -- preparation -----------------------------------------------------------------------------------------------------


def fetch_artwork(folder: str | Path) -> Path:
    """Install `PACKAGES` with npm into `folder` unless they are there; return its `node_modules`.

    Raises:
        RuntimeError: npm is missing or failed; the message says what to do.
    """
    folder = Path(folder)
    modules = folder / "node_modules"
    wanted = [package.rsplit("@", 1)[0] for package in PACKAGES]
    if all((modules / name / "package.json").is_file() for name in wanted):
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed and the artwork is not there: install Node.js, or pass --artwork DIR")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm could not install the artwork: {done.stderr.strip().splitlines()[-1:]}")
    return modules


def prepare(modules: str | Path, out: str | Path) -> Path:
    """Join, order and render the artwork under `modules` into `out` (`concepts.json`, `pixels.npy`)."""
    modules, out = Path(modules), Path(out)
    concepts, drawings = _join(modules)
    icons, svgs = [], []
    for index, found in enumerate(drawings):
        for style, svg in found.items():
            icons.append((index, style))
            svgs.append(svg)
    with atomic_folder(out, owned=("*",)) as folder:
        pixels = np.lib.format.open_memmap(
            folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=(len(svgs), RESOLUTION, RESOLUTION, 4)
        )
        for row, svg in enumerate(tqdm(svgs, desc="render", unit="picture")):
            pixels[row] = render(svg)
        pixels.flush()
        del pixels
        write_json(folder / "concepts.json", {"concepts": [asdict(concept) for concept in concepts], "icons": icons})
    return out


def render(svg: str) -> np.ndarray:
    """Rasterise an SVG to RGBA `(128, 128, 4)` uint8, centred on a transparent square."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=RESOLUTION, height=RESOLUTION))
    image = Image.open(BytesIO(png)).convert("RGBA")
    if image.size != (RESOLUTION, RESOLUTION):
        square = Image.new("RGBA", (RESOLUTION, RESOLUTION))
        image.thumbnail((RESOLUTION, RESOLUTION))
        square.paste(image, ((RESOLUTION - image.width) // 2, (RESOLUTION - image.height) // 2))
        image = square
    return np.asarray(image)


def slug(text: str) -> str:
    """Icon-file name of an English emoji name, hyphens left out: the icon sets disagree about them."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "", ascii_text)


def _code_points(emoji: str) -> str:
    return "-".join(f"{ord(character):x}" for character in emoji if character != "\ufe0f")


class _IconSet:
    """SVGs of one icon set, found by code point where the set has them, else by the slug of a name."""

    def __init__(self, folder: Path):
        data = read_json(folder / "icons.json")
        self.icons, self.size = data["icons"], (data.get("width", 16), data.get("height", 16))
        aliases = {name: alias["parent"] for name, alias in data.get("aliases", {}).items() if len(alias) == 1}
        self.by_slug = {slug(name): parent for name, parent in aliases.items()} | {
            slug(name): name for name in self.icons
        }
        characters = folder / "chars.json"
        self.by_character = read_json(characters) if characters.is_file() else {}
        self.by_character = {key.replace("-fe0f", ""): name for key, name in self.by_character.items()}

    def svg(self, code_points: str, names: list[str]) -> str | None:
        name = self.by_character.get(code_points)
        if name not in self.icons:
            name = next((self.by_slug[key] for key in map(slug, names) if key in self.by_slug), None)
        if name not in self.icons:
            return None
        icon = self.icons[name]
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def _annotations(modules: Path) -> dict[str, dict[str, dict]]:
    """Language -> emoji -> {"tts": [name], "default": [keywords]}, from both CLDR packages."""
    languages: dict[str, dict[str, dict]] = {}
    for package, folder, key in [
        ("cldr-annotations-derived-full", "annotationsDerived", "annotationsDerived"),
        ("cldr-annotations-full", "annotations", "annotations"),
    ]:
        for path in sorted((modules / package / folder).glob("*/annotations.json")):
            found = json.loads(path.read_text(encoding="utf-8"))[key].get("annotations", {})
            languages.setdefault(path.parent.name, {}).update(found)
    return languages


def _join(modules: Path) -> tuple[list[Concept], list[dict[str, str]]]:
    """Concepts in curriculum order, each with its SVGs by style (the held-out vendor's included)."""
    sets = {style: _IconSet(modules / "@iconify-json" / name) for style, name in STYLES.items()}
    sets[HELD_OUT_STYLE] = _IconSet(modules / "@iconify-json" / HELD_OUT_SET)
    languages = _annotations(modules)
    english = languages["en"]
    tiers: list[dict[str, list]] = [{group: [] for group in groups} for groups in GROUPS]
    for group in read_json(modules / "unicode-emoji-json" / "data-by-group.json"):
        tier = next((tier for tier in tiers if group["name"] in tier), None)
        for entry in group["emojis"] if tier is not None else []:
            emoji = entry["emoji"]
            keys = [emoji, emoji.replace("\ufe0f", "")]
            labels = next((english[key] for key in keys if key in english), {})
            name = labels.get("tts", [entry["name"]])[0]
            code_points = _code_points(emoji)
            names = [name, entry["name"], entry["slug"]]
            names += [s.by_character[code_points] for s in sets.values() if code_points in s.by_character]
            svgs = {style: svg for style, s in sets.items() if (svg := s.svg(code_points, names))}
            if sum(style in svgs for style in STYLES) < 5 or LOOK_ALIKE.search(name):
                continue
            translations = {}
            for language, found in languages.items():
                text = next((found[key]["tts"][0] for key in keys if "tts" in found.get(key, {})), None)
                if text and language != "en":
                    translations[language] = text
            concept = Concept(name, emoji, group["name"], labels.get("default", []), translations)
            tier[group["name"]].append((concept, svgs))
    ordered = []
    for tier in tiers:
        # Every vendor's drawing first; then groups take turns in proportion to their size, so that any prefix is mixed.
        ranked = []
        for group in tier.values():
            group.sort(key=lambda item: -len(item[1]))
            ranked += [(rank / len(group), concept, svgs) for rank, (concept, svgs) in enumerate(group)]
        ranked.sort(key=lambda item: item[0])
        ordered += [(concept, svgs) for _, concept, svgs in ranked]
    return [concept for concept, _ in ordered], [svgs for _, svgs in ordered]
