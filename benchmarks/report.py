"""The committed JSON of a device as tables and as a bar chart.

python -m benchmarks.report [FILE]   FILE is results/amd_epyc.json where it is left out. Writes the table between the
marks <!-- results --> and <!-- /results --> in README.md, which leaves out some shapes, all of them warm and cold into
FILE with the ending .md, and draws FILE with the ending .png.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "benchmarks" / "results" / "amd_epyc.json"
MARKS = "<!-- results -->", "<!-- /results -->"
# Heading, variant of the benchmarks
COLUMNS = {
    "eager": "eager",
    "eager NCHW": "eager_nchw",
    "F.pad": "pad",
    "torch.compile": "compile",
    "this op in plain torch": "reference",
}


# Shapes that say little more than others of the same op; the .md has them.
NOT_IN_README = ("voc ", "camvid ", " smooth ", "int64/uint8", "mobilenet 384", "mobilenet_384", "cityscapes jitter")


def tables(about: dict[str, Any], *, whole: bool = False) -> str:
    """Markdown of README; whole: of every shape, warm, then cold."""
    results = about["results"]
    if not whole:
        results = {g: rows for g, rows in results.items() if not any(word in g for word in NOT_IN_README)}
    versions = about["versions"]
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {versions['torch']}, commit {about['commit']}, "
        f"{about['date']}; copy {about['roof']['copy_gb_s']:.0f} GB/s read + write, bf16 product "
        f"{about['roof']['matmul_tflop_s']:.2f} TFLOP/s in the same run. How many times slower than ours each is:",
        "",
        *_table(results, "median_ms", "share_of_copy"),
    ]
    if whole:
        lines += ["", "The same with fresh pages for every result, as where glibc's allocator is left alone:", ""]
        lines += _table(results, "cold_ms", None)
    return "\n".join(lines)


def _table(results: dict[str, dict[str, dict[str, float]]], key: str, share: str | None) -> list[str]:
    present = {h: v for h, v in COLUMNS.items() if any(v in group for group in results.values())}
    last = ["of the copy rate", "peak memory, ours / eager"] if share else []
    heads = ["op and shape", "ours", *present, *last]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for group, rows in results.items():
        ours = rows["native"]
        if key not in ours:
            continue
        cells = [group, _milliseconds(ours[key])]
        for variant in present.values():
            cells.append(f"{_ratio(rows, variant, key):.3g} x" if variant in rows else "")
        if share:
            cells.append(f"{ours[share]:.0%}" if ours[share] else "")
            eager = rows.get("eager", {})
            cells.append(f"{ours['peak_mb']:.3g} / {eager['peak_mb']:.3g} MB" if "peak_mb" in eager else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(rows: dict[str, dict[str, float]], variant: str, key: str) -> float:
    return rows[variant]["ratio"] if key == "median_ms" else rows[variant][key] / rows["native"][key]


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def insert(readme: str, text: str) -> str:
    """`readme` with `text` between the marks."""
    before, found, rest = readme.partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not found or not closed:
        raise SystemExit(f"README.md has no {MARKS[0]} ... {MARKS[1]}")
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"


def draw(about: dict[str, Any], path: Path) -> None:
    """One row a benchmark, a bar for each alternative: how many times as long as ours it takes."""
    from matplotlib.figure import Figure

    variants = {"eager": "#888888", "compile": "#4477aa", "pad": "#cc9944"}
    shown = {g: r for g, r in about["results"].items() if not any(word in g for word in NOT_IN_README)}
    groups = {g: rows for g, rows in shown.items() if any(v in rows for v in variants)}
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, (_, rows) in enumerate(groups.items()):
        bars = [v for v in variants if v in rows]
        high = 0.8 / len(bars)
        for i, variant in enumerate(bars):
            ratio = rows[variant]["ratio"]
            axes.barh(place - 0.4 + (i + 0.5) * high, ratio, high * 0.9, color=variants[variant])
            axes.text(ratio * 1.03, place - 0.4 + (i + 0.5) * high, f"{ratio:.3g}", va="center", fontsize=6)
    axes.set_yticks(range(len(groups)), [f"{g} ({_milliseconds(r['native']['median_ms'])})" for g, r in groups.items()])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as long as ours (in brackets)")
    names = {"eager": "eager", "compile": "torch.compile", "pad": "F.pad workaround"}
    handles = [axes.barh([0], [0], color=colour, label=names[v]) for v, colour in variants.items()]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.set_title(f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)


def main(file: str | None = None) -> None:
    path = Path(file) if file else DEFAULT
    about = json.loads(path.read_text())
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), tables(about)))
    path.with_suffix(".md").write_text(tables(about, whole=True) + "\n")
    draw(about, path.with_suffix(".png"))
    print(f"wrote README.md's table, {path.with_suffix('.md').name} and {path.with_suffix('.png').name}")


def committed_tables() -> str:
    """What README.md has between the marks."""
    return re.search(rf"{MARKS[0]}\n(.*)\n{MARKS[1]}", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
