"""A figure of a sweep's page as an SVG of its own, for docs/study.md.

    python benchmarks/study_figure.py runs/study/teacher_size docs/images/study_teacher_size.svg
    python benchmarks/study_figure.py runs/study/teacher_size docs/images/study_t.svg --caption "TAID's t"

Takes the first figure of the first score whose caption begins with --caption, in the page's colours, light or dark as
the reader's system says, with the legend below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from markupsafe import escape

from vlm_distill.sweeping.figures import curve_figures, score_figures, shown_lines
from vlm_distill.sweeping.record import read_record
from vlm_distill.sweeping.results import main_scores, read_results

#: Height of the title, and of a line of the legend; entries in a line of it, and where they begin.
TITLE, LEGEND, ENTRIES, LEFT = 26, 20, 3, 48
STYLE = """
text { font: 11.5px var(--sans); fill: var(--quiet); }
.title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.sheet { fill: var(--card); } .grid { stroke: var(--rule); } .guide { display: none; }
.line { fill: none; stroke: var(--hue); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.band { fill: var(--hue); fill-opacity: .13; stroke: none; } .dot { fill: var(--hue); }
"""


def standalone(caption: str, chart: str, names: Mapping[str, str]) -> str:
    """Return a page's chart as a file: its title above, its legend below, and the page's colours inside.

    Args:
        caption: the title.
        chart: an ``<svg>`` that is sized and coloured by its page.
        names: colour classes by name of a line.
    """
    size = re.search(r'viewBox="0 0 (\d+) (\d+)"', chart)
    assert size is not None
    width, height = int(size[1]), int(size[2])
    drawn = {name: css for name, css in names.items() if f'data-label="{escape(name)}"' in chart}
    rows = -(-len(drawn) // ENTRIES)
    total = TITLE + height + rows * LEGEND + 8
    # The variables and colour classes come before the first rule of a page.
    colours = files("vlm_distill.reporting").joinpath("templates/style.css").read_text("utf-8").split("\n\n")[0]
    inner = chart[chart.index(">") + 1 : chart.rindex("</svg>")]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" '
        f'aria-label="{escape(caption)}">',
        f"<style>{colours}{STYLE}</style>",
        f'<rect class="sheet" width="{width}" height="{total}" rx="6"/>',
        f'<text class="title" x="12" y="19">{escape(caption)}</text>',
        f'<g transform="translate(0 {TITLE})">{inner}</g>',
    ]
    for number, (name, css) in enumerate(drawn.items()):
        x = LEFT + (number % ENTRIES) * (width - LEFT) // ENTRIES
        y = TITLE + height + (number // ENTRIES) * LEGEND + 8
        parts.append(f'<path class="line {css}" d="M{x} {y}h16"/><text x="{x + 22}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a sweep's folder")
    parser.add_argument("out", type=Path, help="the SVG")
    parser.add_argument("--caption", default="", help="how the figure's caption begins")
    options = parser.parse_args()
    sweep = read_record(options.sweep)
    results = read_results(sweep)
    score = main_scores(result.scores for result in results)[0]
    names = shown_lines(sweep, results, score)
    figures = score_figures(sweep, results, score, names) + curve_figures(sweep, results, score, names)
    for caption, chart in figures:
        if caption.startswith(options.caption):
            options.out.write_text(standalone(caption, str(chart), names), encoding="utf-8")
            print(f"{options.out}: {caption}")
            return
    sys.exit(f"{options.sweep}: no such figure; there are {', '.join(caption for caption, _ in figures)}")


if __name__ == "__main__":
    main()
