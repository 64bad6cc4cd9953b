"""Results of models side by side: as JSON, as a table and as an HTML page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anarchobot.evaluation.metrics import Ratio, Result, mean_of
from anarchobot.reporting.html_report import render_page

SHOWN_ANSWERS = 3
LABELS = {  # of metrics whose names are keys
    "bits_per_byte": "bits per byte",
    "documents_trained_on": "documents trained on",
    "log_prob_margin": "margin of log-probability",
    "reward_accuracy": "reward accuracy",
    "too_long": "left out: too long",
}


@dataclass(frozen=True)
class Report:
    """The results of the model at `checkpoint`, by data set."""

    checkpoint: str
    results: Mapping[str, Result]


class Difference(NamedTuple):
    """`value` is the second model's metric minus the first's; `half_width` that of its 95% interval, None if the
    models were not evaluated on the same units."""

    value: float
    half_width: float | None


def json_report(reports: Sequence[Report], *, units: bool) -> str:
    """One report, or two as `models` with their `differences`. `units` adds the values of each unit, which `from_json`
    needs for intervals of differences."""
    each = [_to_json(report, units) for report in reports]
    if len(each) == 1:
        return json.dumps(each[0], indent=1)
    compared = differences(*reports)
    rows = {name: {key: d._asdict() for key, d in metrics.items()} for name, metrics in compared.items()}
    return json.dumps({"models": each, "differences": rows}, indent=1)


def _to_json(report: Report, units: bool) -> dict[str, Any]:
    results = report.results.items()
    data: dict[str, Any] = {
        "checkpoint": report.checkpoint,
        "results": {name: result.metrics for name, result in results},
        "intervals": {name: result.intervals for name, result in results},
        "answers": {name: result.answers for name, result in results if result.answers},
    }
    if units:
        data["units"] = {
            name: {
                "names": result.units,
                **{key: [x.tolist() for x in (r.values, r.weights)] for key, r in result.ratios.items()},
            }
            for name, result in results
            if result.units
        }
    return data


def from_json(data: Any) -> Report:
    """The report that `json_report` wrote for one model; other data raises ValueError, KeyError, TypeError or
    AttributeError."""
    results = {}
    for name, metrics in data["results"].items():
        units = dict(data.get("units", {}).get(name, {}))
        names = [str(unit) for unit in units.pop("names", [])]
        ratios = {key: _ratio(pair, len(names)) for key, pair in units.items()}
        counts = {key: _number(value) for key, value in metrics.items() if key not in ratios}
        if "loss" in ratios:
            counts.pop("perplexity", None)  # computed from the loss
        answers = [dict(answer) for answer in data.get("answers", {}).get(name, [])]
        results[str(name)] = Result(names, ratios, counts, answers)
    if not isinstance(data["checkpoint"], str):
        raise TypeError("checkpoint")
    return Report(data["checkpoint"], results)


def _ratio(pair: Any, units: int) -> Ratio:
    values, weights = (np.array([_number(x) for x in side], np.float64) for side in pair)
    if not len(values) == len(weights) == units or not weights.sum() > 0:
        raise ValueError("units")
    return Ratio(values, weights)


def _number(value: Any) -> float:
    if isinstance(value, float) or (type(value) is int and abs(value) < 2**63):
        return value
    raise TypeError("not a number")


def differences(a: Report, b: Report) -> dict[str, dict[str, Difference]]:
    """By data set and metric. For preferences also `reward_accuracy`: the share of pairs whose log-probability margin
    is greater under `b`, which is DPO's reward accuracy with `a` as the reference model."""
    found: dict[str, dict[str, Difference]] = {}
    for name in a.results.keys() & b.results.keys():
        first, second = a.results[name], b.results[name]
        mine, theirs = first.metrics, second.metrics
        paired = bool(first.units) and first.units == second.units
        found[name] = {}
        for metric in (metric for metric in mine if metric in theirs):
            width = None
            if paired and metric in first.ratios and metric in second.ratios:
                width = second.ratios[metric].difference_half_width(first.ratios[metric])
            found[name][metric] = Difference(theirs[metric] - mine[metric], width)
        if paired and "log_prob_margin" in first.ratios and "log_prob_margin" in second.ratios:
            margins = second.ratios["log_prob_margin"].values - first.ratios["log_prob_margin"].values
            accuracy = mean_of(margins > 0)
            found[name]["reward_accuracy"] = Difference(accuracy.mean, accuracy.half_width())
    return found


class Row(NamedTuple):
    """A line of the table: one cell for each model and, for two, their difference."""

    dataset: str
    metric: str
    cells: list[str]


def table_rows(reports: Sequence[Report]) -> list[Row]:
    """Intervals are written as `value ± half-width`."""
    compared = differences(*reports) if len(reports) == 2 else {}
    rows = []
    for dataset in dict.fromkeys(name for report in reports for name in report.results):
        results = [report.results.get(dataset, Result()) for report in reports]
        known = [key for result in results for key in result.metrics]
        for metric in dict.fromkeys([*known, *compared.get(dataset, {})]):
            cells = [_cell(result.metrics.get(metric), result.intervals.get(metric)) for result in results]
            if len(reports) == 2:
                difference = compared.get(dataset, {}).get(metric)
                sign = "" if metric == "reward_accuracy" else "+"
                cells.append("" if difference is None else _cell(*difference, sign))
            rows.append(Row(dataset, LABELS.get(metric, metric), cells))
    return rows


def notes(reports: Sequence[Report]) -> list[str]:
    """The data sets whose differences have no interval, and why."""
    lines = []
    if len(reports) == 2:
        a, b = (report.results for report in reports)
        for name in (name for name in a if name in b):
            if a[name].units != b[name].units:
                lines.append(
                    f"{name}: differences have no interval, because the models were not evaluated on the same "
                    f"{_kind(a[name], b[name])}"
                )
    return lines


def _kind(a: Result, b: Result) -> str:
    kinds = {unit.partition(" ")[0] for unit in (*a.units[:1], *b.units[:1])}
    return "windows" if kinds & {"document", "window"} else "rows"


def text_report(reports: Sequence[Report]) -> str:
    """A Markdown table with a row per metric and a column per model, notes, and the first answers side by side."""
    lines = [f"| | {' | '.join(_columns(reports))} |", f"| --- |{' ---: |' * len(_columns(reports))}"]
    lines += [f"| {row.dataset}: {row.metric} | {' | '.join(row.cells)} |" for row in table_rows(reports)]
    lines += [f"\n{line}" for line in notes(reports)]
    for answers in answers_by_row(reports)[:SHOWN_ANSWERS]:
        lines += ["", f"question: {answers.question}", f"reference: {answers.reference}"]
        lines += [f"{report.checkpoint}: {text}" for report, text in zip(reports, answers.answers, strict=True)]
    return "\n".join(lines)


def html_report(reports: Sequence[Report]) -> str:
    """The same with all answers, as a page that loads nothing from elsewhere."""
    names = [report.checkpoint for report in reports]
    return render_page(
        "comparison.html.jinja",
        title=" and ".join(names),
        models=names,
        columns=_columns(reports),
        rows=table_rows(reports),
        notes=notes(reports),
        all_answers=answers_by_row(reports),
    )


def _columns(reports: Sequence[Report]) -> list[str]:
    return [*(report.checkpoint for report in reports), *(["difference"] if len(reports) == 2 else [])]


class Answers(NamedTuple):
    """The answers of all models to one question."""

    question: str
    reference: str
    answers: list[str]
    scores: list[float | None]  # ROUGE-L


def answers_by_row(reports: Sequence[Report]) -> list[Answers]:
    """Of the questions that all models have answered."""
    found = []
    for dataset, result in reports[0].results.items():
        others = [
            {answer["row"]: answer for answer in report.results.get(dataset, Result()).answers} for report in reports
        ]
        for answer in result.answers:
            if all(answer["row"] in rows for rows in others):
                each = [rows[answer["row"]] for rows in others]
                found.append(
                    Answers(
                        str(answer["question"]),
                        str(answer["reference"]),
                        [str(one["answer"]) for one in each],
                        [one.get("rougeL") for one in each],
                    )
                )
    return found


def _cell(value: float | None, half_width: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{value:{sign}.4f}" + ("" if half_width is None else f" ± {half_width:.4f}")
