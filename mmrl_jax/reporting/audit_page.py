"""A page with the worst samples that an audit has found, and why they were flagged."""

import html
import os

import numpy as np

from mmrl_jax.auditing.checks import UNREADABLE, Report, Result
from mmrl_jax.auditing.samples import Samples
from mmrl_jax.reporting.report import STYLE, data_uri, write_page

SHOWN = 12  # Maximum number of samples of each check on the page.

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
{style}td {{ vertical-align: top; }}
img {{ height: 128px; }}
.exceeded {{ color: #b3261e; }} .exceeded::before {{ content: "\\2717\\00a0"; }}
</style></head><body><h1>{title}</h1>
<p>{summary}</p>
<table><tr><th>check</th><th>a flagged sample</th><th class="number">flagged</th>
<th class="number">of</th><th class="number">limit</th></tr>
{rows}
</table>
{sections}
</body></html>
"""


def write(path: str | os.PathLike[str], report: Report, title: str) -> None:
    """Writes a page with the counts of an audit and the worst flagged samples of each check.

    The images are embedded, so that the page is a single file. Of an episode, they are the first,
    the most conspicuous and the last one.

    Args:
      path: HTML file to write.
      report: Report of the audit.
      title: Title of the page.
    """
    samples, failed = report.samples, report.failed
    count = len(samples.unreadable)
    rows = [_row(UNREADABLE, "It cannot be used", count, count + len(samples),
                 report.max_unreadable, UNREADABLE in failed)]  # fmt: skip
    for name, result in report.results.items():
        flagged, check = int(result.flagged.sum()), result.check
        rows.append(_row(name, check.meaning, flagged, result.scored, check.limit, result.failed))
    sections = [_unreadable(samples)] if count else []
    sections += [
        _section(name, result, samples) for name, result in report.results.items()
        if result.flagged.any()
    ]  # fmt: skip
    verdict = (
        f"More samples than allowed: {', '.join(failed)}." if failed else "No limit is exceeded."
    )
    left = int((report.weights() == 0).sum())
    page = _PAGE.format(
        title=html.escape(title),
        style=STYLE,
        summary=html.escape(
            f"{len(samples)} samples were audited, {count} could not be read, and {left} have the "
            f"weight 0. {verdict}"
        ),
        rows="\n".join(rows),
        sections="\n".join(sections),
    )
    write_page(path, page)


def _row(name: str, meaning: str, flagged: int, of: int, limit: float, failed: bool) -> str:
    kind = " class='exceeded'" if failed else ""
    return (
        f"<tr><td{kind}>{html.escape(name)}</td><td>{html.escape(meaning)}</td>"
        f"<td class='number'>{flagged}</td><td class='number'>{of}</td>"
        f"<td class='number'>{limit:.1%}</td></tr>"
    )


def _unreadable(samples: Samples) -> str:
    rows = "\n".join(
        f"<tr><td class='text'>{html.escape(_place(samples, x.split, x.id))}</td>"
        f"<td class='text'>{html.escape(x.reason)}</td></tr>"
        for x in samples.unreadable[:SHOWN]
    )
    shown = _shown("first", len(samples.unreadable))
    return (
        f"<h2>{UNREADABLE}</h2><p>It cannot be used. {shown}</p>\n<table><tr><th>sample</th>"
        f"<th>why</th></tr>\n{rows}\n</table>"
    )


def _shown(which: str, count: int) -> str:
    """Returns a sentence with the number of samples that are shown, '' if all are."""
    return f"The {which} {SHOWN} of {count} are shown." if count > SHOWN else ""


def _section(name: str, result: Result, samples: Samples) -> str:
    """Returns the table of the worst samples of a check, the highest scores first."""
    flagged = np.flatnonzero(result.flagged)
    worst = flagged[np.argsort(-result.finding.scores[flagged], kind="stable")][:SHOWN]
    rows = "\n".join(_sample(int(i), result, samples) for i in worst)
    check = result.check
    return (
        f"<h2>{html.escape(name)}</h2><p>{html.escape(check.meaning)}. The scores of "
        f"{len(flagged)} samples are at least {check.threshold:g}. "
        f"{_shown('worst', len(flagged))}</p>\n<table><tr><th>image</th>"
        f"<th>sample</th><th class='number'>score</th><th>why</th></tr>\n{rows}\n</table>"
    )


def _sample(i: int, result: Result, samples: Samples) -> str:
    partner, note = int(result.finding.partner[i]), result.finding.notes.get(i, "")
    why = html.escape(note)
    if partner >= 0:
        place = _place(samples, int(samples.split[partner]), samples.ids[partner])
        why += f"{_image(samples, partner)}{html.escape(place)}"
    text = f"{samples.caption(i)}\n{_place(samples, int(samples.split[i]), samples.ids[i])}"
    return (
        f"<tr><td>{_image(samples, i)}</td><td class='text'>{html.escape(text)}</td>"
        f"<td class='number'>{result.finding.scores[i]:.2f}</td><td class='text'>{why}</td></tr>"
    )


def _place(samples: Samples, split: int, name: str) -> str:
    return name if len(samples.splits) == 1 else f"{samples.splits[split]}: {name}"


def _image(samples: Samples, i: int) -> str:
    picture = samples.picture(i)
    if picture is None:
        return ""
    place = html.escape(_place(samples, int(samples.split[i]), samples.ids[i]))
    return f"<img src='{data_uri(picture)}' alt='Image of {place}'>"
