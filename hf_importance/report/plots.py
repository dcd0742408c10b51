"""Plots of the figures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from hf_importance.report.findings import Findings
from hf_importance.report.pictures import data_url
from hf_importance.sampling.record import QUANTILES, distribution

_INK, _GRID, _COOL, _WARM = "#1f2933", "#d5dae0", "#2f6f9f", "#e0555f"
_INKED = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
_STYLE = {
    **dict.fromkeys(_INKED, _INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True},
    **{"grid.color": _GRID, "grid.linewidth": 0.6, "lines.linewidth": 1.8, "legend.frameon": False, "font.size": 10},
}
_SHARES = torch.linspace(0, 1, QUANTILES, dtype=torch.float32)  # share of the examples below each percentile
_MAX_CURVES = 6
_MAX_POINTS = 20_000
_GOLDEN = 0.618034  # multiples modulo 1 are evenly spread
_SMALLEST = 1e-6  # smaller importances are drawn here, because the axis is logarithmic


@dataclass(frozen=True)
class Plot:
    """A plot with a description."""

    name: str  # of the file, without extension
    title: str
    text: str  # also used as alternative text
    draw: Callable[[Axes], None]  # onto axes

    def png(self) -> bytes:
        """Render as PNG."""
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(5.0, 3.4), layout="constrained")
            self.draw(figure.add_subplot())
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def write_plots(findings: Findings, folder: Path) -> list[dict[str, str]]:
    """Write the plots into a folder; return name, title, text and data URL of each."""
    written = []
    for plot in plots(findings):
        png = plot.png()
        (folder / f"{plot.name}.png").write_bytes(png)
        written.append({"name": plot.name, "title": plot.title, "text": plot.text, "url": data_url(png)})
    return written


def plots(findings: Findings) -> list[Plot]:
    """All plots for which there is data."""
    gain = {"effective_sample_size": "effective sample size", "variance_ratio": "variance ratio"}
    coverage = {"known": "measured", "pruned": "pruned"}
    drawn = [
        _distributions(findings),
        _spread(findings),
        _logged(findings, gain, "gain", "Gain", "share of uniform sampling"),
        _logged(findings, coverage, "coverage", "Measured and pruned", "share of the examples"),
        _visits(findings),
    ]
    return [plot for plot in drawn if plot is not None]


def _distributions(findings: Findings) -> Plot | None:
    moments = [(moment.visits, moment.importance) for moment in findings.distributions]
    moments.append((findings.visits / len(findings), distribution(findings.columns["importance"])))
    moments = [(visits, percentiles) for visits, percentiles in moments if percentiles.isfinite().all()]
    if not moments:
        return None
    moments = _evenly_spaced(moments)
    curves = [(f"{visits:.1f}", q.clamp(min=_SMALLEST), _SHARES) for visits, q in moments]

    def draw(axes: Axes) -> None:
        axes.set(xscale="log", xlabel="importance", ylabel="examples with less")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _label_logarithmic(axes.xaxis, (1, 3))
        _draw_moments(axes, curves)

    (first, early), (last, late) = moments[0], moments[-1]
    text = (
        f"Cumulative distribution of importance at {len(moments)} moments. The median was {early.median():.3g} after "
        f"{first:.1f} visits per example and {late.median():.3g} after {last:.1f}."
    )
    return Plot("importances", "Importances", text, draw)


def _spread(findings: Findings) -> Plot | None:
    moments = [(moment.visits, moment.visits_since) for moment in findings.distributions]
    moments = [(until, visits) for until, visits in moments if visits.sum() > 0]
    if not moments:
        return None
    curves = [(f"until {until:.1f}", _SHARES, visits / visits.mean()) for until, visits in _evenly_spaced(moments)]

    def draw(axes: Axes) -> None:
        axes.set(xlabel="examples with fewer", ylabel="visits over their mean")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _draw_moments(axes, curves)

    first, last = (_share_of_top_tenth(visits) for _, visits in (moments[0], moments[-1]))
    text = (
        f"Distribution of visits in each pass. The tenth with the most had {first:.0%} of them in the first pass and "
        f"{last:.0%} in the last complete one."
    )
    return Plot("spread", "Visits early and late", text, draw)


def _draw_moments(axes: Axes, curves: Sequence[tuple[str, Tensor, Tensor]]) -> None:
    """Draw percentiles at several moments, in colours from early to late."""
    shades = mpl.colormaps["viridis"](np.linspace(0.25, 0.85, len(curves)))
    for shade, (label, x, y) in zip(shades, curves, strict=True):
        axes.plot(x, y, color=shade, label=label)
    axes.legend(title="visits per example")


def _share_of_top_tenth(percentiles: Tensor) -> float:
    """Share of all visits of the tenth of the examples with the most, interpolating the percentiles."""
    between = (percentiles[1:] + percentiles[:-1]) / 2
    return (between[-len(between) // 10 :].sum() / between.sum()).item()


def _evenly_spaced(moments: list[Any]) -> list[Any]:
    """At most `_MAX_CURVES` of them, evenly spaced, including the first and the last."""
    return [moments[i] for i in np.unique(np.linspace(0, len(moments) - 1, _MAX_CURVES).round().astype(int))]


def _logged(findings: Findings, names: dict[str, str], file: str, title: str, label: str) -> Plot | None:
    """Logged figures over the steps; `names` has what each is called."""
    curves = {word: findings.logged(key) for key, word in names.items()}
    curves = {word: points for word, points in curves.items() if points[0]}
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for (word, points), colour in zip(curves.items(), (_COOL, _WARM), strict=False):
            axes.plot(*points, color=colour, marker=".", label=word)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(0, max(1.05, *(1.05 * max(values) for _, values in curves.values())))
        axes.legend()

    ends = ", ".join(f"{word} {values[0]:.2f} → {values[-1]:.2f}" for word, (_, values) in curves.items())
    return Plot(file, title, f"{label.capitalize()} over the steps. First and last: {ends}.", draw)


def _visits(findings: Findings) -> Plot | None:
    columns = findings.columns
    known = (columns["importance"].isfinite() & (columns["visits"] > 0)).nonzero().flatten()
    if not len(known):
        return None
    shown = known[:: -(-len(known) // _MAX_POINTS)]
    importance, visits = columns["importance"][shown].clamp(min=_SMALLEST), columns["visits"][shown]
    number = torch.arange(len(shown), dtype=torch.float32)
    jitter = (number * _GOLDEN % 1 - 0.5) * 0.6  # points with equal visits would overlap
    suspect = columns["suspect"][shown]

    def draw(axes: Axes) -> None:
        kinds = [(~suspect, _COOL, "not suspect"), (suspect, _WARM, "suspected label error")]
        for points, colour, label in kinds:
            if points.any():
                places = importance[points], (visits + jitter)[points]
                axes.scatter(*places, color=colour, s=7, alpha=0.5, linewidths=0, label=label)
        axes.set(xscale="log", yscale="log", xlabel="importance", ylabel="visits")
        _label_logarithmic(axes.xaxis, (1, 3))
        _label_logarithmic(axes.yaxis, (1, 2, 5))
        axes.legend(markerscale=3)

    text = (
        f"Visits against importance, a point per example: from {visits.min().item()} to {visits.max().item()} visits, "
        f"more where the importance is larger; {int(suspect.sum()):,} of {len(shown):,} points are suspected label "
        "errors."
    )
    return Plot("visits", "Visits", text, draw)


def _label_logarithmic(axis: Axis, multiples: tuple[int, ...]) -> None:
    """Label these multiples of each power of ten with plain numbers."""
    axis.set_major_locator(LogLocator(subs=multiples, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
