"""The committed JSON of a device as tables and as a bar chart.

python -m benchmarks.report [FILE]   FILE is results/amd_epyc.json where it is left out. Writes the table between the
marks <!-- results --> and <!-- /results --> in README.md, which leaves out some shapes, all of them warm and cold into
FILE with the ending .md, and draws FILE with the ending .png. A GPU's FILE does not go into README.md's table.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.ratios import ours

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
    "kthvalue": "kthvalue",
    "our ops one by one": "one_by_one",
    "autocast": "autocast",
    "max-autotune": "compile_max",
    "ours in Triton": "triton",
    "ours in a graph": "ours+graph",
    "ours in Triton in a graph": "triton+graph",
    "eager in a graph": "eager+graph",
    "torch.compile in a graph": "compile+graph",
    "max-autotune in a graph": "compile_max+graph",
}
COLD = {  # what `cold_ms` is, by the kind of device
    "cpu": "The same with fresh pages for every result, as where glibc's allocator is left alone:",
    "gpu": "The same of single calls, each after the L2 cache was overwritten:",
}


# Shapes that say little more than others of the same op; the .md has them.
NOT_IN_README = ("voc ", "camvid ", " smooth ", "int64/uint8", "mobilenet 384", "mobilenet_384", "cityscapes jitter")


def tables(about: dict[str, Any], *, whole: bool = False) -> str:
    """Markdown of README; whole: of every shape, warm, then cold."""
    results = about["results"]
    if not whole:
        results = {g: rows for g, rows in results.items() if not any(word in g for word in NOT_IN_README)}
    versions = about["versions"]
    gpu = "driver" in about
    kind = f"driver {about['driver']}, triton {versions['triton']}" if gpu else f"{about['threads']} threads"
    lines = [
        f"{about['device']}, {kind}, torch {versions['torch']}, commit {about['commit']}, "
        f"{about['date']}; copy {about['roof']['copy_gb_s']:.0f} GB/s read + write, bf16 product "
        f"{about['roof']['matmul_tflop_s']:.2f} TFLOP/s in the same run. How many times slower than ours each is:",
        "",
        *_table(results, "median_ms", "share_of_roof" if gpu else "share_of_copy"),
    ]
    if whole:
        lines += ["", COLD["gpu" if gpu else "cpu"], ""]
        lines += _table(results, "cold_ms", None)
    return "\n".join(lines)


def _named(rows: dict[str, dict[str, float]], variant: str) -> dict[str, float]:
    """A variant's row, empty where there is none; "ours" as the first part of a name is what our rows are called.

    Empty too for one of OURS by its own name where it is what the others are compared with.
    """
    mine = ours(rows)
    if re.match(rf"{mine}\b", variant):
        return {}
    return rows.get(re.sub(r"^ours\b", mine, variant), {})


def _table(results: dict[str, dict[str, dict[str, float]]], key: str, share: str | None) -> list[str]:
    present = {h: v for h, v in COLUMNS.items() if any(key in _named(group, v) for group in results.values())}
    last = ["of the copy rate", "peak memory, ours / eager"] if share else []
    heads = ["op and shape", "ours", *present, *last]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) - 1)]
    for group, rows in results.items():
        mine = rows[ours(rows)]
        if key not in mine:
            continue
        cells = [group, _milliseconds(mine[key])]
        for variant in present.values():
            row = _named(rows, variant)
            cells.append(f"{_ratio(row, mine, key):.3g} x" if key in row else "")
        if share:
            # Of what lies in a GPU's L2 the share is the cold call's: see ratios.py.
            cells.append(f"{mine[share]:.0%}{' cold' if mine.get('fits_l2') else ''}" if mine.get(share) else "")
            eager = rows.get("eager", {})
            cells.append(f"{mine['peak_mb']:.3g} / {eager['peak_mb']:.3g} MB" if "peak_mb" in eager else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(row: dict[str, float], mine: dict[str, float], key: str) -> float:
    return row["ratio"] if key == "median_ms" else row[key] / mine[key]


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

    variants = {"eager": "#888888", "compile": "#4477aa", "pad": "#cc9944", "compile_max": "#aa3377"}
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
    axes.set_yticks(range(len(groups)), [f"{g} ({_milliseconds(r[ours(r)]['median_ms'])})" for g, r in groups.items()])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as long as ours (in brackets)")
    names = {"eager": "eager", "compile": "torch.compile", "pad": "F.pad workaround", "compile_max": "max-autotune"}
    shown = [v for v in variants if any(v in rows for rows in groups.values())]
    handles = [axes.barh([0], [0], color=variants[v], label=names[v]) for v in shown]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.set_title(f"{about['device']}, {about['threads']} threads, torch {about['versions']['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)


def main(file: str | None = None) -> None:
    path = Path(file) if file else DEFAULT
    about = json.loads(path.read_text())
    if "driver" not in about:
        readme = ROOT / "README.md"
        readme.write_text(insert(readme.read_text(), tables(about)))
    path.with_suffix(".md").write_text(tables(about, whole=True) + "\n")
    draw(about, path.with_suffix(".png"))
    table = "" if "driver" in about else "README.md's table, "
    print(f"wrote {table}{path.with_suffix('.md').name} and {path.with_suffix('.png').name}")


def committed_tables() -> str:
    """What README.md has between the marks."""
    return re.search(rf"{MARKS[0]}\n(.*)\n{MARKS[1]}", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
