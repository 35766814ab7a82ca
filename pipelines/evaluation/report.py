"""The report: tables with intervals, picture grid and plots of what the harness measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from textcond.evaluation import paired_bootstrap
from textcond.files import atomic_file, write_mark

from .cases import Case
from .controls import ORIGINAL
from .distance import share, share_interval
from .grid import brief, grid_blocks, picture_grid
from .plots import line_chart

ALL = "all"


@dataclass
class Measured:
    """What was measured of one encoder or control.

    Attributes:
        scores: by guidance, by name: the judge's, `(cases, seeds)`, NaN where a case asks for nothing.
        diversity: by guidance: `pixel_spread` of each case over seeds, `(cases,)`.
        distances: squared distances to the teacher's output, `(cases, timesteps)`.
        empty_distances: those of the empty prompt along the same trajectories.
        pictures: those of the grid, by index of their case.
        parameters: bytes of the text encoders' weights.
        encode_seconds: of one prompt; NaN where it is another row's encoder.
        picture_seconds: of one whole picture.
    """

    scores: dict[float, dict[str, np.ndarray]] = field(default_factory=dict)
    diversity: dict[float, np.ndarray] = field(default_factory=dict)
    distances: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    empty_distances: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    parameters: int = 0
    encode_seconds: float = math.nan
    picture_seconds: float = math.nan


@dataclass
class Report:
    """Everything that `evaluate_conditioning` found; the first row is the original.

    Attributes:
        settings: options of the run and where it ran.
        cases: what was drawn.
        timesteps: at which distances were measured.
        rows: by name of the encoder or control.
        notes: what a reader must know before believing the numbers.
    """

    settings: dict[str, Any]
    cases: list[Case]
    timesteps: list[float]
    rows: dict[str, Measured]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def languages(self) -> list[str]:
        """Languages of the cases in their order, "all" first where there are several."""
        found = list(dict.fromkeys(case.language for case in self.cases))
        return [ALL, *found] if len(found) > 1 else found

    @cached_property
    def results(self) -> dict[str, Any]:
        """Means with 95% bootstrap intervals: row -> language -> distance, and scores by guidance.

        Subjects are drawn, not cases: two languages' pictures of one thing, from one latent, are no two witnesses.
        `difference` is paired with the original on the same cases and latents; `kept` is the share of its mean.
        """
        return {
            name: {language: self._of_language(name, language) for language in self.languages} for name in self.rows
        }

    def save(self, folder: str | Path) -> Path:
        """Write `report.md`, `report.json`, `grid.png` and the plots into a folder; returns the path of the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {"grid.png": picture_grid(self.cases, {name: row.pictures for name, row in self.rows.items()})}
        pictures |= self._plots()
        for name, picture in pictures.items():
            with atomic_file(folder / name) as file:
                picture.save(file, format="png")
        write_mark(folder / "report.json", self.to_dict())
        with atomic_file(folder / "report.md") as file:
            file.write(self.markdown(list(pictures)).encode())
        return folder / "report.md"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, for JSON: numbers that do not exist are None."""
        costs = ("parameters", "encode_seconds", "picture_seconds")
        return _plain(
            {
                "settings": self.settings,
                "notes": self.notes,
                "timesteps": self.timesteps,
                "costs": {name: {cost: getattr(row, cost) for cost in costs} for name, row in self.rows.items()},
                "results": self.results,
                "cases": [asdict(case) for case in self.cases],
                "scores": {name: row.scores for name, row in self.rows.items()},
                "diversity": {name: row.diversity for name, row in self.rows.items()},
                "squared distances": {name: row.distances for name, row in self.rows.items()},
                "squared distances of the empty prompt": {n: row.empty_distances for n, row in self.rows.items()},
            }
        )

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        """The report as Markdown, with links to pictures that lie beside it."""
        settings, guidance = self.settings, self.settings["guidance"]
        parts = ["# Text encoders compared by what they condition\n"]
        parts.append(
            f"{settings['pipeline']}, {len(self.cases)} cases, {len(settings['seeds'])} seed(s), "
            f"{settings['steps']} steps, guidance {', '.join(f'{scale:g}' for scale in guidance)}, "
            f"judge: {settings['judge'] or 'none'}. Every encoder starts from the same latents.\n"
        )
        parts += [f"**Note**: {note}.\n" for note in self.notes]
        parts.append(self._summary())
        for language in self.languages:
            for scale in guidance:
                parts.append(f"## {_language(language)}, guidance {scale:g}\n\n{self._table(language, scale)}")
        parts.append(f"## Cost\n\n{self._costs()}")
        if "grid.png" in pictures:
            parts.append(
                f"## Pictures\n\nSeed {settings['seeds'][0]}, guidance {settings['distance guidance']:g}, unselected.\n"
                f"\n![pictures](grid.png)\n\n{self._prompts_shown()}"
            )
        for name in pictures:
            if name != "grid.png":
                parts.append(f"![{Path(name).stem}]({name})\n")
        parts.append(self._definitions())
        return "\n".join(parts)

    # -- numbers -----------------------------------------------------------------------------------------------------

    def _of_language(self, name: str, language: str) -> dict[str, Any]:
        row, cases = self.rows[name], self._cases_of(language)
        above, below = (_summed(values, self.cases, cases) for values in (row.distances, row.empty_distances))
        low, high = share_interval(above, below)
        by_timestep = []
        for place, timestep in enumerate(self.timesteps):
            one, other = above[:, place], below[:, place]
            interval = share_interval(one, other)
            by_timestep.append(
                {"timestep": timestep, "share": share(one, other), "low": interval[0], "high": interval[1]}
            )
        return {
            "cases": len(cases),
            "distance": {"share": share(above, below), "low": low, "high": high, "timesteps": by_timestep},
            "guidance": {
                f"{scale:g}": {
                    "scores": {score: self._score(name, scale, score, cases) for score in row.scores.get(scale, {})},
                    "diversity": _mean(_by_subject(row.diversity[scale][:, None], self.cases, cases)),
                }
                for scale in self.settings["guidance"]
            },
        }

    def _score(self, name: str, scale: float, score: str, cases: list[int]) -> dict[str, float] | None:
        values = _by_subject(self.rows[name].scores[scale][score], self.cases, cases)
        if not values:
            return None
        found = _mean(values)
        if name != ORIGINAL:
            base = _by_subject(self.rows[ORIGINAL].scores[scale][score], self.cases, cases)
            found["difference"] = asdict(paired_bootstrap(values, base))
            mean = float(np.mean(list(base.values())))
            found["kept"] = found["mean"] / mean if mean else math.nan
        return found

    def _cases_of(self, language: str) -> list[int]:
        return [index for index, case in enumerate(self.cases) if language in (ALL, case.language)]

    # -- tables ------------------------------------------------------------------------------------------------------

    @property
    def _scores(self) -> list[str]:
        """Names of the judge's scores that at least one case asks for."""
        tables = next(iter(self.rows[ORIGINAL].scores.values()), {})
        return [name for name, values in tables.items() if not np.isnan(values).all()]

    def _summary(self) -> str:
        """A row an encoder, a column a language."""
        scale = f"{self.settings['distance guidance']:g}"
        head = f"| | {' | '.join(_language(language) for language in self.languages)} |\n"
        head += "|---" * (len(self.languages) + 1) + "|\n"
        parts = []
        for score in self._scores[:1]:
            parts.append(f"## {score} x 100, guidance {scale}, and how much of the original's is kept\n\n{head}")
            for name in self.rows:
                cells = []
                for language in self.languages:
                    found = self.results[name][language]["guidance"][scale]["scores"][score]
                    share_kept = found.get("kept", math.nan) if found else math.nan
                    kept = "" if math.isnan(share_kept) else f" ({100 * share_kept:.0f}%)"
                    cells.append(f"{100 * found['mean']:.1f}{kept}" if found else "")
                parts.append(f"| {name} | {' | '.join(cells)} |\n")
            parts.append("\n")
        parts.append(f"## Distance to the teacher, as a share of the empty prompt's\n\n{head}")
        for name in self.rows:
            cells = [f"{self.results[name][language]['distance']['share']:.3f}" for language in self.languages]
            parts.append(f"| {name} | {' | '.join(cells)} |\n")
        return "".join(parts)

    def _table(self, language: str, scale: float) -> str:
        """A row an encoder, a column a figure, with intervals and the paired difference to the original."""
        head = [f"{score} x 100" for score in self._scores] + ["distance", "diversity"]
        lines = [f"| {self.results[ORIGINAL][language]['cases']} cases | {' | '.join(head)} |"]
        lines.append("|---" * (len(head) + 1) + "|")
        for name in self.rows:
            result = self.results[name][language]
            figures = result["guidance"][f"{scale:g}"]
            cells = [_score_cell(figures["scores"][score]) for score in self._scores]
            cells.append("{share:.3f} [{low:.3f}, {high:.3f}]".format(**result["distance"]))
            spread = figures["diversity"]
            cells.append("" if math.isnan(spread["mean"]) else "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**spread))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _costs(self) -> str:
        lines = ["| | encode one prompt, ms | one picture, s | weights, MB |", "|---|---|---|---|"]
        for name, row in self.rows.items():
            if not math.isnan(row.encode_seconds):
                figures = f"{1000 * row.encode_seconds:.1f} | {row.picture_seconds:.2f} | {row.parameters / 1e6:.1f}"
                lines.append(f"| {name} | {figures} |")
        peak = self.settings["peak memory of the process, bytes"]
        peak = f" The process took {peak / 1e6:,.0f} MB at its largest, all encoders together." if peak else ""
        where = f"on {self.settings['device']} with {self.settings['threads']} thread(s)"
        return "\n".join(lines) + f"\n\nMedians, {where}, batch 1.{peak}\n"

    def _prompts_shown(self) -> str:
        lines = []
        for block in grid_blocks(self.cases):
            prompts = [f"{self.cases[index].language}: {brief(self.cases[index].prompt)}" for index in block]
            lines.append(f"- {' | '.join(prompts)}\n")
        return "".join(lines)

    def _definitions(self) -> str:
        controls = [f"- `{name}`: {meaning}\n" for name, meaning in self.settings["controls"].items()]
        return (
            "## What the words mean\n\n"
            + "".join(controls)
            + "- in brackets: 95% bootstrap interval over subjects (all languages and seeds of one together); "
            "after it the difference to the original, paired on the same cases and latents, in bold where its interval "
            "leaves out 0\n"
            "- distance: mean squared difference of the denoiser's output to what it is under the original reading the "
            "English, at every step of the original's own sampling "
            f"(guidance {self.settings['distance guidance']:g}, first seed), divided by the same for the empty prompt "
            "under the original: 0 is the teacher, 1 is as if nothing was said\n"
            "- diversity: root mean square difference of pixels (0 to 1), mean over pairs of pictures of one prompt "
            "from different seeds; noise is diverse too\n"
        )

    # -- plots -------------------------------------------------------------------------------------------------------

    def _plots(self) -> dict[str, Image.Image]:
        plots = {}
        for language in self.languages:
            lines = {
                name: [
                    (point["timestep"], point["share"], point["low"], point["high"])
                    for point in self.results[name][language]["distance"]["timesteps"]
                ]
                for name in self.rows
            }
            plots[f"distance-{_file_name(language)}.png"] = line_chart(
                lines, title=f"Distance to the teacher, {_language(language)}", x_label="timestep (noise at the left)",
                y_label="share of the empty prompt's", reverse=True,
            )  # fmt: skip
        scales = self.settings["guidance"]
        for score in self._scores if len(scales) > 1 else []:
            lines = {
                name: [
                    (scale, found["mean"], found["low"], found["high"])
                    for scale in scales
                    if (found := self.results[name][self.languages[0]]["guidance"][f"{scale:g}"]["scores"][score])
                ]
                for name in self.rows
            }
            plots[f"guidance-{_file_name(score)}.png"] = line_chart(
                lines, title=f"{score}, {_language(self.languages[0])}", x_label="guidance", y_label=score
            )
        for score in self._scores[:1] if len(self.languages) > 1 else []:
            scale = f"{self.settings['distance guidance']:g}"
            lines = {
                name: [
                    (place, found["mean"], found["low"], found["high"])
                    for place, language in enumerate(self.languages)
                    if (found := self.results[name][language]["guidance"][scale]["scores"][score])
                ]
                for name in self.rows
            }
            plots[f"languages-{_file_name(score)}.png"] = line_chart(
                lines, title=f"{score}, guidance {scale}", x_label="language", y_label=score, x_names=self.languages
            )
        return plots


def _by_subject(values: np.ndarray, cases: Sequence[Case], chosen: Sequence[int]) -> dict[str, float]:
    """Means over everything drawn of a subject, of the cases that ask for this score."""
    groups: dict[str, list[float]] = {}
    for index in chosen:
        value = float(values[index].mean())
        if not math.isnan(value):
            groups.setdefault(cases[index].subject, []).append(value)
    return {subject: sum(group) / len(group) for subject, group in groups.items()}


def _summed(values: np.ndarray, cases: Sequence[Case], chosen: Sequence[int]) -> np.ndarray:
    """Sums over the cases of a subject: `(cases, timesteps)` -> `(subjects, timesteps)`."""
    _, groups = np.unique([cases[index].subject for index in chosen], return_inverse=True)
    sums = np.zeros((groups.max() + 1, values.shape[1]))
    np.add.at(sums, groups, values[list(chosen)])
    return sums


def _mean(values: dict[str, float]) -> dict[str, float]:
    """Mean of a figure over subjects and its interval."""
    if not values:
        return {"mean": math.nan, "low": math.nan, "high": math.nan}
    return asdict(paired_bootstrap(values, dict.fromkeys(values, 0.0)))


def _score_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    cell = f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    if "difference" in found:
        mean, low, high = (100 * found["difference"][key] for key in ("mean", "low", "high"))
        shown = f"{mean:+.1f}"
        cell += f", {f'**{shown}**' if low > 0 or high < 0 else shown} [{low:+.1f}, {high:+.1f}]"
    return cell


def _language(code: str) -> str:
    return "all languages" if code == ALL else code


def _file_name(text: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in text)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return json.loads(json.dumps(value))
