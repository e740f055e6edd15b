"""The report as one HTML file that needs nothing else: no script, and nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evlgen.common.safe_text import Lines, printable
from evlgen.comparison.plots import (
    COLOURS,
    as_data_address,
    image_use_figure,
    loss_figure,
    plotted_metrics,
    quality_figure,
    sweep_figure,
)
from evlgen.comparison.stages import Run
from evlgen.comparison.table import best_rows, cost_table, errors, image_use_table, quality_table

Report = Mapping[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1e21;
  background: #fff; margin: 2rem auto; max-width: 1160px; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead, p.note, figcaption { color: #555; margin: .2rem 0 .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid #e3e5e8; vertical-align: top; }
th { font-weight: 600; color: #444; border-bottom: 2px solid #c9cdd2; vertical-align: bottom; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
td.best { font-weight: 700; } tr.failed td { color: #a33; }
.wide { overflow-x: auto; } img.plot { width: 100%; max-width: 1100px; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
td { white-space: nowrap; } td.text { white-space: normal; min-width: 7rem; }
.card { display: inline-block; vertical-align: top; width: 30%; min-width: 270px; box-sizing: border-box;
  margin: 0 1% 1rem 0; border: 1px solid #e3e5e8; border-radius: 8px; padding: .8rem; }
.card img { width: 150px; height: 150px; object-fit: contain; display: block; margin: 0 auto .6rem;
  background: #f6f7f8; image-rendering: auto; border-radius: 4px; }
.card dl { margin: 0; } .card dt { font-size: 12.5px; color: #555; margin-top: .4rem; }
.card dd { margin: 0; } code { font: 13px ui-monospace, Menlo, Consolas, monospace; background: #f4f5f7;
  padding: .1rem .3rem; border-radius: 4px; overflow-wrap: anywhere; }
pre { background: #f4f5f7; padding: .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
ul.notes { background: #fff8e6; border: 1px solid #f0e0b0; border-radius: 6px;
  padding: .6rem 1rem .6rem 2rem; }
"""


def page(report: Report, runs: Sequence[Run], swept: str | None = None) -> str:
    """The whole page.

    Args:
        report: see `results.collect`.
        runs: where pictures are read from.
        swept: the key of a sweep.
    """
    title = f"Sweep of {swept}" if swept else "Comparison"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(_lead(report))}</p>',
        _notes(report),
        *(_plot(sweep_figure(report, swept), _sweep_caption(report)) if swept else []),
        "<h2>Results</h2>",
        _tables(report),
        *_errors(report),
        "<h2>What differs</h2>",
        _differences(report),
        "<h2>Quality while training</h2>",
        *_plot(quality_figure(report), _curve_caption(report)),
        *_image_use(report),
        "<h2>Training loss</h2>",
        *_plot(loss_figure(report), _loss_caption(report)),
        *_captions(report, runs),
        "<h2>How this was made</h2>",
        _origin(report),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _lead(report: Report) -> str:
    budget = f"{report['budget']} of training each" if report["budget"] else "each trained as its file says"
    seeds = ", ".join(map(str, report["seeds"]))
    samples = report["evaluation"]["samples"]
    part = "all samples" if samples is None else f"the same samples ({samples} at most)"
    return (
        f"{len(report['configurations'])} configurations, {budget}; "
        f"{'seed' if len(report['seeds']) == 1 else 'seeds'} {seeds}; "
        f"scored on {part} of '{report['evaluation']['split']}'. Evaluation and start-up are not part of the "
        "training time."
    )


def _notes(report: Report) -> str:
    lines = "".join(f"<li>{_text(note)}</li>" for note in report["notes"])
    return f'<ul class="notes">{lines}</ul>' if lines else ""


def _tables(report: Report) -> str:
    best = best_rows(report)
    several = len(report["seeds"]) > 1
    meaning = "Mean ± standard deviation over the seeds that finished. " if several else ""
    return (
        _table(*quality_table(report), best)
        + f'<p class="note">{meaning}The highest mean of a metric is bold.</p>'
        + _table(*cost_table(report), {})
        + '<p class="note">Training time is without start-up and evaluation, wall-clock with both. Peak '
        "memory is what the process had resident, libraries included.</p>"
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], best: Mapping[str, int]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = []
    for number, row in enumerate(rows):
        cells = []
        for title, cell in zip(titles, row, strict=True):
            mark = ' class="best"' if best.get(title) == number else ""
            swatch = _swatch(number) if title == titles[0] else ""
            cells.append(f"<td{mark}>{swatch}{_text(cell)}</td>")
        failed = " class=failed" if "failed" in row[-1] else ""
        body.append(f"<tr{failed}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _errors(report: Report) -> list[str]:
    return [f"<pre>{_text(error)}</pre>" for error in errors(report)]


def _differences(report: Report) -> str:
    configurations = report["configurations"]
    keys = list(dict.fromkeys(key for c in configurations for key in c["differs"]))
    head = "".join(
        f'<th class="text">{_swatch(i)}{_text(c["label"])}</th>' for i, c in enumerate(configurations)
    )
    files = [" + ".join(c["files"]) for c in configurations]
    file_cells = "".join(f'<td class="text">{_text(file)}</td>' for file in files)
    file_row = f"<tr><td>project file</td>{file_cells}</tr>" if len(set(files)) > 1 else ""
    body = "".join(
        f"<tr><td><code>{_text(key)}</code></td>"
        + "".join(f'<td class="text">{_text(_value(c["differs"], key))}</td>' for c in configurations)
        + "</tr>"
        for key in keys
    )
    return (
        f'<div class="wide"><table><tr><th>key</th>{head}</tr>{file_row}{body}'
        "</table></div><p class='note'>All other keys have the same value in every configuration.</p>"
    )


def _value(differs: Mapping[str, Any], key: str) -> str:
    if key not in differs:
        return "–"
    value = differs[key]
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _plot(figure: Any, caption: str) -> list[str]:
    if figure is None:
        return ['<p class="note">There are not enough numbers to draw.</p>']
    return [
        f'<figure style="margin:0"><img class="plot" alt="{_text(caption)}" src="{as_data_address(figure)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    ]


def _curve_caption(report: Report) -> str:
    metrics = " and ".join(plotted_metrics(report))
    band = "; the band is from the lowest seed to the highest" if len(report["seeds"]) > 1 else ""
    counted = " Of a run in stages, time and samples of the earlier ones are counted."
    counted = counted if _has_stages(report) else ""
    return f"{metrics} on the held-out samples{band}.{counted}"


def _loss_caption(report: Report) -> str:
    of_last = " Of a run in stages it is the last one's." if _has_stages(report) else ""
    return f"Means over neighbouring steps; one line for each seed.{of_last}"


def _has_stages(report: Report) -> bool:
    return any(run["stage_seconds"][1:] for c in report["configurations"] for run in c["runs"])


def _sweep_caption(report: Report) -> str:
    bars = "Bars are one standard deviation over seeds. " if len(report["seeds"]) > 1 else ""
    return f"{bars}The percentages are shares of the longest training time."


def _image_use(report: Report) -> list[str]:
    """How much the images are used, where that was measured."""
    table, figure = image_use_table(report), image_use_figure(report)
    if table is None:
        return []
    return [
        "<h2>Use of the images</h2>",
        _table(*table, {}),
        '<p class="note">Losses of held-out texts in eval mode, nats per token. What the image is worth: how '
        "much higher the loss is when each text is read with another sample's image. The common part: how "
        "much of the soft prompts' mean square is the same for all images.</p>",
        *([] if figure is None else _plot(figure, "Use of the images on the held-out samples.")),
    ]


def _captions(report: Report, runs: Sequence[Run]) -> list[str]:
    """A card for each picture, with what each configuration's first run wrote about it."""
    texts: list[tuple[int, str, dict[str, str]]] = []
    pictures: dict[str, tuple[str, Path | None]] = {}  # id -> reference and picture
    for number, configuration in enumerate(report["configurations"]):
        of_it = [run for run in runs if run.configuration.name == configuration["name"]]
        run = next((run for run in of_it if run.stages[-1].shown()), None)
        if run is None:
            continue
        shown = run.stages[-1].shown()
        texts.append((number, configuration["label"], {str(row["id"]): row["text"] for row in shown}))
        for row in shown:
            file = run.stages[-1].folder / row["picture"] if row.get("picture") else None
            pictures.setdefault(str(row["id"]), (row["reference"], file))
    if not pictures:
        return []
    cards = []
    for key, (reference, file) in pictures.items():
        lines = "".join(
            f"<dt>{_swatch(number)}{_text(label)}</dt><dd>{_text(by_id[key]) or '<i>nothing</i>'}</dd>"
            for number, label, by_id in texts
            if key in by_id
        )
        told = f"<dt>a reference</dt><dd>{_text(reference)}</dd>" if reference else ""
        cards.append(f'<div class="card">{_image(key, file)}<dl>{lines}{told}</dl></div>')
    return [
        "<h2>What they write</h2>",
        '<p class="note">The latest evaluation of the first seed that has one.</p>',
        f"<div>{''.join(cards)}</div>",
    ]


def _image(key: str, file: Path | None) -> str:
    if file is None or not file.exists():
        return f"<p>{_text(key)}</p>"
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{_text(key)}" src="data:image/png;base64,{data}">'


def _text(text: str) -> str:
    """Text as HTML, control characters shown escaped; its lines stay lines where they are our own."""
    return escape(text if isinstance(text, Lines) else printable(text))


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{COLOURS[number % len(COLOURS)]}"></span>'


def _origin(report: Report) -> str:
    machine, evaluation = report["machine"], report["evaluation"]
    devices = [d for d in machine["devices"] if d != "cpu"]
    facts = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        *([("GPU", ", ".join(devices))] if devices else []),
        *([("memory", f"{machine['memory_bytes'] / 1e9:.0f} GB")] if machine["memory_bytes"] else []),
        ("software", f"PyTorch {machine['torch']}, Python {machine['python']}, {machine['system']}"),
        ("evaluated every", evaluation["every"] or "as the project files say"),
        ("runs took turns", "yes" if report.get("interleaved") else "no, one after the other"),
    ]
    lines = "".join(f'<tr><td>{k}</td><td class="text">{_text(str(v))}</td></tr>' for k, v in facts)
    return f"<pre>{_text(report['command'])}</pre><table>{lines}</table>"
