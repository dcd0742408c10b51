"""Tables of the runs of `fine_tuning` and `networks`: seconds and quality relative to `Trainer`, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks import tables
from benchmarks.fine_tuning import RECIPES
from benchmarks.fine_tuning_methods import AS_MANY_SECONDS, METHODS, OURS
from benchmarks.fine_tuning_tasks import ENCODERS
from benchmarks.pairs import (
    UNTOUCHED,
    Pairs,
    Runs,
    compared_with_rivals,
    largest,
    mean_over_tasks,
    means_of,
    pairs,
    parts_of,
    title_of,
    worse_by_holm,
)
from benchmarks.results import mean_and_error

# ---- ours ------------------------------------------------------------------------------------------------------------


def minutes_table(runs: Runs) -> str:
    """What fine-tuning takes and reaches with default settings, a row per task: the table of the README.

    Minutes of ours are those of `Trainer`, times the mean ratio.
    """
    head = ("task", "`Trainer`, minutes", "ours, minutes", "seconds", "accuracy or F1", "`Trainer` in these seconds")
    lines = [tables.row(head), tables.rule(head)]
    for part in parts_of(runs, []):
        lines.append(_line_of_part(part.title, len(head)))
        for each in part.ours:
            minutes = each.mean("seconds", of_ours=False) / 60
            ratio = statistics.mean(each.ratios)
            cells = (each.what, f"{minutes:.1f}", f"{minutes * ratio:.1f}", tables.percent(ratio))
            control = part.controls.get(each.task)
            lines.append(tables.row((*cells, told_points(each), "" if control is None else told_points(control))))
    return "\n".join(lines)


def headline_table(fine_tuning: Runs, networks: Runs) -> str:
    """The same in full: seconds, operations, steps, rows, and quality with errors; a mean per part."""
    head = (
        *("task", "examples × epochs", "seeds", "seconds", "operations", "steps", "rows propagated back"),
        *("`Trainer`: accuracy or F1, %", "difference, points", "`Trainer`: cross-entropy", "difference"),
        "`Trainer` in these seconds, points",
    )
    lines = [tables.row(head), tables.rule(head)]
    for part in parts_of(fine_tuning, networks):
        lines.append(_line_of_part(part.title, len(head)))
        lines += [tables.row(_headline_cells(each, part.controls.get(each.task))) for each in part.ours]
        controls = [part.controls[each.task] for each in part.ours if each.task in part.controls]
        lines.append(tables.row(_mean_cells(part.ours, controls)))
    return "\n".join(lines)


def _line_of_part(title: str, columns: int) -> str:
    return tables.row([f"*{title}*", *[""] * (columns - 1)])


def _headline_cells(each: Pairs, control: Pairs | None) -> list[str]:
    return [
        *(f"**{each.task}**: {each.what}", f"{each.examples:,} × {each.epochs}", str(len(each.runs))),
        f"{_with_error([100 * ratio for ratio in each.ratios], '.1f')} %",
        *(tables.percent(each.mean(name)) for name in ("operations", "share_of_steps", "backward_fraction")),
        f"{100 * each.mean(each.metric, of_ours=False):.2f}",
        _marked(each.points, ".2f", sign=1),
        f"{each.mean('cross_entropy', of_ours=False):.3f}",
        _marked(each.differences("cross_entropy"), ".3f", sign=-1),
        "" if control is None else _marked(control.points, ".2f", sign=1),
    ]


def _mean_cells(listed: Sequence[Pairs], controls: Sequence[Pairs]) -> list[str]:
    """Means over tasks, with the standard error that follows from those of the tasks."""
    costs = [statistics.mean(each.mean(name) for each in listed) for name in _COSTS]
    entropy = mean_over_tasks(listed, lambda each: each.differences("cross_entropy"))
    return [
        f"**mean of {len(listed)}**",
        *("", ""),
        tables.percent(statistics.mean(statistics.mean(each.ratios) for each in listed)),
        *map(tables.percent, costs),
        "",
        _told_with(*mean_over_tasks(listed, lambda each: each.points), "+.2f"),
        "",
        _told_with(*entropy, "+.3f"),
        _told_with(*mean_over_tasks(controls, lambda each: each.points), "+.2f") if controls else "",
    ]


_COSTS = ("operations", "share_of_steps", "backward_fraction")


# ---- all methods -----------------------------------------------------------------------------------------------------


def methods_table(runs: Runs) -> str:
    """A row per method: its means, and seconds and points of each task."""
    found = {method: means_of(runs, method) for method in METHODS}
    found = {method: means for method, means in found.items() if means is not None}
    tasks = list(next(iter(found.values())).of_tasks) if found else []
    head = ("method", "seconds", "operations", "points", *tasks)
    lines = [tables.row(head), tables.rule(head)]
    for method, means in found.items():
        cells = tables.percent(means.seconds), tables.percent(means.operations), _told(means.points, "+.2f")
        of_tasks = ["as `Trainer`" if each is None else _short(each) for each in means.of_tasks.values()]
        lines.append(tables.row((method, *cells, *of_tasks)))
    return "\n".join(lines)


def _short(each: Pairs) -> str:
    return f"{tables.percent(statistics.mean(each.ratios))}, {_told(statistics.mean(each.points), '+.1f')}"


def table(*parts: Runs) -> str:
    """All trainings: a row per setting and method."""
    setting = ("task", "layers", "examples × epochs", "seeds", "method")
    cost = ("`Trainer`, seconds", "seconds", "operations", "steps", "rows propagated back")
    head = (*setting, *cost, "`Trainer`: accuracy or F1, %", "difference, points", "cross-entropy", "difference")
    lines = [tables.row(head), tables.rule(head)]
    lines += [tables.row(_cells(each)) for each in pairs([run for part in parts for run in part])]
    return "\n".join(lines)


def _cells(each: Pairs) -> list[str]:
    size = f"{each.examples:,} × {each.epochs}"
    return [
        *(f"**{each.task}**", str(each.layers), size, str(len(each.runs)), each.method),
        f"{each.mean('seconds', of_ours=False):,.0f}",
        f"{_with_error([100 * ratio for ratio in each.ratios], '.1f')} %",
        *(tables.percent(each.mean(name)) for name in _COSTS),
        f"{100 * each.mean(each.metric, of_ours=False):.2f}",
        _marked(each.points, ".2f", sign=1),
        f"{each.mean('cross_entropy', of_ours=False):.3f}",
        _marked(each.differences("cross_entropy"), ".3f", sign=-1),
    ]


# ---- cells -----------------------------------------------------------------------------------------------------------


def told_points(each: Pairs) -> str:
    """Difference in points, marked if it is worse."""
    return _marked(each.points, ".2f", sign=1, unit=" points")


def _marked(values: Sequence[float], form: str, sign: int, unit: str = "") -> str:
    """The mean ± standard error of differences; marked if it is worse by more than this error."""
    mean, error = mean_and_error(values)
    return _with_error(values, "+" + form) + unit + (", worse" if sign * mean < -error else "")


def _with_error(values: Sequence[float], form: str) -> str:
    return _told_with(*mean_and_error(values), form)


def _told_with(mean: float, error: float, form: str) -> str:
    return _told(mean, form) + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")


def _told(value: float, form: str) -> str:
    told = f"{value:{form}}"
    return (told.replace("-", "+") if float(told) == 0 else told).replace("-", "−")


# ---- claims ----------------------------------------------------------------------------------------------------------


def claims(accuracy: Runs, fine_tuning: Runs, networks: Runs) -> str:
    """The claims on seconds, and those of `accuracy` on steps."""
    in_seconds = claim(fine_tuning), claim_of_methods(fine_tuning), claim_of_networks(networks)
    return "\n".join(filter(None, [*in_seconds, tables.claims(accuracy)]))


def claim(runs: Runs) -> str:
    """What fine-tuning takes with default settings, and on what it was measured; empty without runs."""
    listed = largest(pairs(runs, [OURS]))
    if not listed:
        return ""
    return (
        f"- **Fine-tuning** takes {_share(listed)} of the seconds of `Trainer` {_over(listed)}, with "
        f"{_quality(listed)}{_worse(listed)}.{_untouched(listed)} Measured with {_measured_with(listed)}."
    )


def claim_of_methods(runs: Runs) -> str:
    """What `Trainer` reaches in the same seconds, and what methods of others take; empty if these were not run."""
    ours, control = means_of(runs, OURS), means_of(runs, AS_MANY_SECONDS)
    others = [means_of(runs, name) for name, method in METHODS.items() if method.is_rival]
    shares = [means.seconds for means in others if means is not None]
    if ours is None or control is None or not shares:
        return ""
    listed = compared_with_rivals(runs)
    examples, seeds = _range([each.examples for each in listed]), _range([len(each.runs) for each in listed])
    size = f"{len(ours.of_tasks)} tasks with {examples} examples, {seeds} seed{_s(seeds)}"
    control, own = (_told(means.points, "+.1f") for means in (control, ours))
    return (
        f"- **In the same seconds**, `Trainer` with its schedule shortened to match ends at {control} points, and ours "
        f"at {own} (mean over {size}). There ours takes {tables.percent(ours.seconds)} of the seconds, and methods of "
        f"others {tables.percent(min(shares))} to {tables.percent(max(shares))}."
    )


def claim_of_networks(runs: Runs) -> str:
    """What training from scratch takes, in seconds; empty without runs."""
    listed = largest(pairs(runs, [OURS]))
    if not listed:
        return ""
    epochs = _range([each.epochs for each in listed])
    return (
        f"- **Convolutional networks and a ViT from scratch** take {_share(listed)} of the seconds {_over(listed)}, "
        f"with {_quality(listed)} (CIFAR-10, {_range([each.examples for each in listed])} images, {epochs} epochs)."
    )


def _share(listed: Sequence[Pairs]) -> str:
    return tables.percent(statistics.mean(statistics.mean(each.ratios) for each in listed))


def _over(listed: Sequence[Pairs]) -> str:
    shares = [statistics.mean(each.ratios) for each in listed]
    if len(listed) == 1:
        return "on one task"
    return f"in the mean over {len(listed)} tasks, from {tables.percent(min(shares))} to {tables.percent(max(shares))}"


def _untouched(listed: Sequence[Pairs]) -> str:
    """The same for the tasks that had no influence on constants."""
    found = [each for each in listed if title_of(each) == UNTOUCHED]
    if not found or len(found) == len(listed):
        return ""
    number = f"{len(found)} task{_s(str(len(found)))}"
    return f" On the {number} that had no influence on its constants: {_share(found)}, {_quality(found)}."


def _worse(listed: Sequence[Pairs]) -> str:
    """On which tasks it is worse, corrected for their number; empty if none was run with several seeds."""
    judged = [each for each in listed if len(each.runs) > 1]
    if not judged:
        return ""
    worse = [RECIPES[task].what for task in worse_by_holm(judged)]
    return f"; with Holm's correction worse on {' and on '.join(worse) if worse else 'none'}"


def _quality(listed: Sequence[Pairs]) -> str:
    """Mean over tasks of the mean differences, ± its standard error, where all tasks have several seeds."""
    names = {"accuracy": "accuracy", "f1": "F1"}
    metric = " or ".join(names[name] for name in names if any(each.metric == name for each in listed))
    mean, error = mean_over_tasks(listed, lambda each: each.points)
    return f"{_told_with(mean, error, '+.2f')} points of {metric}"


def _measured_with(listed: Sequence[Pairs]) -> str:
    """Models, size and seeds of the trainings."""
    encoders = " and ".join(dict.fromkeys(ENCODERS[RECIPES[each.task].encoder] for each in listed))
    examples = _range([each.examples for each in listed])
    epochs = _range([each.epochs for each in listed])
    seeds = _range([len(each.runs) for each in listed])
    size = f"{examples} examples, {epochs} epoch{_s(epochs)} and {seeds} seed{_s(seeds)} per task"
    return f"pretrained encoders ({encoders}), {size}, in one thread of a CPU"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _s(number: str) -> str:
    return "" if number == "1" else "s"
