"""Plots of the figures, for a light and a dark page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter

from hf_importance.report.findings import Findings
from hf_importance.sampling.record import distribution

THEMES = {
    "light": {"page": "#ffffff", "ink": "#1f2933", "grid": "#d5dae0", "cool": "#2f6f9f"},
    "dark": {"page": "#161b22", "ink": "#e6e9ed", "grid": "#3a424d", "cool": "#6cb6e8"},
}
WARM = "#e0555f"  # in both themes
_MAX_CURVES = 6
_MAX_POINTS = 20_000
_GOLDEN = 0.618034  # multiples modulo 1 are evenly spread
_SMALLEST = 1e-6
"""Smaller importances are drawn here, because the axis is logarithmic."""


@dataclass(frozen=True)
class Plot:
    """A plot with a description.

    Args:
        name: file name without extension.
        title: title of the plot.
        text: description, also used as alternative text.
        draw: draws onto axes with the colours of a theme.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Axes, dict[str, str]], None]

    def png(self, theme: str) -> bytes:
        """Render as PNG, with the `light` or `dark` theme."""
        colours = THEMES[theme]
        inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
        style = {**dict.fromkeys(inked, colours["ink"]), "grid.color": colours["grid"], "font.size": 10}
        style |= {"axes.facecolor": colours["page"], "axes.spines.top": False, "axes.spines.right": False}
        with mpl.rc_context(style):
            figure = Figure(figsize=(5.0, 3.4), layout="constrained", facecolor=colours["page"])
            axes = figure.add_subplot()
            axes.grid(linewidth=0.6)
            axes.set_axisbelow(True)
            self.draw(axes, colours)
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


def plots(findings: Findings) -> list[Plot]:
    """All plots for which there is data."""
    drawn = [_distributions(findings), _spread(findings), _gains(findings), _coverage(findings), _visits(findings)]
    return [plot for plot in drawn if plot is not None]


def _distributions(findings: Findings) -> Plot | None:
    last = (findings.visits / len(findings), distribution(findings.columns["importance"]))
    moments = [*((moment.visits, moment.importance) for moment in findings.distributions), last]
    moments = _evenly_spaced([(visits, percentiles) for visits, percentiles in moments if percentiles.isfinite().all()])
    if not moments:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        for shade, (visits, percentiles) in zip(_shades(len(moments)), moments, strict=True):
            share = torch.linspace(0, 1, len(percentiles))
            axes.plot(percentiles.clamp(min=_SMALLEST), share, color=shade, linewidth=1.8, label=f"{visits:.1f}")
        axes.set(xscale="log", xlabel="importance", ylabel="examples with less")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _label_logarithmic(axes.xaxis, (1, 3))
        axes.legend(title="visits per example", frameon=False)

    medians = [percentiles[len(percentiles) // 2].item() for _, percentiles in moments]
    text = (
        f"Cumulative distribution of importance at {len(moments)} moments. The median was {medians[0]:.3g} after "
        f"{moments[0][0]:.1f} visits per example and {medians[-1]:.3g} after {moments[-1][0]:.1f}."
    )
    return Plot("importances", "Importances", text, draw)


def _spread(findings: Findings) -> Plot | None:
    moments = [moment for moment in findings.distributions if moment.visits_since.sum() > 0]
    if not moments:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        chosen = _evenly_spaced(moments)
        for shade, moment in zip(_shades(len(chosen)), chosen, strict=True):
            share = torch.linspace(0, 1, len(moment.visits_since))
            visits = moment.visits_since / moment.visits_since.mean()
            axes.plot(share, visits, color=shade, linewidth=1.8, label=f"until {moment.visits:.1f}")
        axes.set(xlabel="examples with fewer", ylabel="visits over their mean")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(title="visits per example", frameon=False)

    first, last = (_share_of_top_tenth(moment.visits_since) for moment in (moments[0], moments[-1]))
    text = (
        f"Distribution of visits in each pass. The tenth with the most had {first:.0%} of them in the first pass and "
        f"{last:.0%} in the last complete one."
    )
    return Plot("spread", "Visits early and late", text, draw)


def _share_of_top_tenth(percentiles: torch.Tensor) -> float:
    """Share of all visits of the tenth of the examples with the most, interpolating the percentiles."""
    between = (percentiles[1:] + percentiles[:-1]) / 2
    return (between[-len(between) // 10 :].sum() / between.sum()).item()


def _evenly_spaced(moments: list[Any]) -> list[Any]:
    """At most `_MAX_CURVES` of them, evenly spaced, including the first and the last."""
    chosen = sorted({round(i * (len(moments) - 1) / (_MAX_CURVES - 1)) for i in range(_MAX_CURVES)})
    return [moments[i] for i in chosen] if moments else []


def _shades(number: int) -> Any:
    """Colours from early to late, visible in both themes."""
    return mpl.colormaps["viridis"](torch.linspace(0.25, 0.85, number).numpy())


def _gains(findings: Findings) -> Plot | None:
    names = {"effective_sample_size": "effective sample size", "variance_ratio": "variance ratio"}
    text = "Effective sample size and variance ratio over the steps."
    return _curves(findings, "gain", "Gain", names, "share of uniform sampling", text)


def _coverage(findings: Findings) -> Plot | None:
    names = {"known": "measured", "pruned": "pruned"}
    text = "Share of the examples that were measured, and that were pruned, over the steps."
    return _curves(findings, "coverage", "Measured and pruned", names, "share of the examples", text)


def _curves(findings: Findings, name: str, title: str, names: dict[str, str], label: str, text: str) -> Plot | None:
    curves = {word: findings.logged(key) for key, word in names.items()}
    curves = {word: points for word, points in curves.items() if points[0]}
    if not curves:
        return None

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        for (word, points), colour in zip(curves.items(), (colours["cool"], WARM), strict=False):
            axes.plot(*points, color=colour, linewidth=1.8, marker=".", label=word)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(0, max(1.05, *(1.05 * max(values) for _, values in curves.values())))
        axes.legend(frameon=False)

    ends = ", ".join(f"{word} {values[0]:.2f} → {values[-1]:.2f}" for word, (_, values) in curves.items())
    return Plot(name, title, f"{text} First and last: {ends}.", draw)


def _visits(findings: Findings) -> Plot | None:
    columns = findings.columns
    known = (columns["importance"].isfinite() & (columns["visits"] > 0)).nonzero().flatten()
    if not len(known):
        return None
    shown = known[:: -(-len(known) // _MAX_POINTS)]
    importance, visits = columns["importance"][shown].clamp(min=_SMALLEST), columns["visits"][shown]
    spread = (
        visits + (torch.arange(len(shown)) * _GOLDEN % 1 - 0.5) * 0.6
    )  # jitter: points with equal visits would overlap
    suspect = columns["suspect"][shown]

    def draw(axes: Axes, colours: dict[str, str]) -> None:
        for points, colour, label in (
            (~suspect, colours["cool"], "not suspect"),
            (suspect, WARM, "suspected label error"),
        ):
            if points.any():
                scatter = {"s": 7, "alpha": 0.5, "linewidths": 0, "label": label}
                axes.scatter(importance[points], spread[points], color=colour, **scatter)
        axes.set(xscale="log", yscale="log", xlabel="importance", ylabel="visits")
        _label_logarithmic(axes.xaxis, (1, 3))
        _label_logarithmic(axes.yaxis, (1, 2, 5))
        axes.legend(frameon=False, markerscale=3)

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
