"""The pictures of a run and the page that shows them; `report.py html` calls write_page. Needs matplotlib.

Every picture is drawn twice, for light and dark surroundings; the page embeds both and the browser chooses.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runlog import STAGES, Run


class Theme(NamedTuple):
    name: str
    background: str
    ink: str
    grid: str
    colors: tuple[str, ...]  # told apart by colour-blind readers too; one per run


THEMES = (
    Theme(
        "light",
        "#ffffff",
        "#1d2733",
        "#d9dee4",
        ("#0b6fb8", "#c9530b", "#0a8a63", "#b0508b", "#8a6d00", "#5c6670"),
    ),
    Theme(
        "dark",
        "#12171d",
        "#e4e9ee",
        "#333c46",
        ("#5bb4f0", "#ff9a4d", "#3ccfa0", "#e79ac8", "#e3cf57", "#a9b4bf"),
    ),
)
DPI = 110


class Series(NamedTuple):
    """A run as the pictures show it: label, and dashed when it belongs to the runs compared with."""

    run: Run
    label: str
    dashed: bool

    @property
    def style(self) -> str:
        return "--" if self.dashed else "-"


def _figure(theme: Theme, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.background, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.set_facecolor(theme.background)
        ax.tick_params(colors=theme.ink, labelsize=9)
        ax.grid(color=theme.grid, linewidth=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(theme.grid)
    return figure, list(axes)


def _label(ax: Axes, theme: Theme, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x, color=theme.ink, fontsize=9)
    ax.set_ylabel(y, color=theme.ink, fontsize=9)
    if title:
        ax.set_title(title, color=theme.ink, fontsize=10, loc="left")


def _legend(ax: Axes, theme: Theme) -> None:
    legend = ax.legend(fontsize=8, frameon=False, labelcolor=theme.ink)
    legend.set_zorder(5)


def _seconds(run: Run) -> list[float]:
    """Training seconds at each progress line, from the mean speed, which has more digits than the minutes."""
    return [run.tokens_at(point.step) / point.tok_per_s for point in run.curve]


def draw_loss(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Training loss over steps and over time, with the switch to looped layers."""
    shown = [s for s in series if len(s.run.curve) > 1]
    if not shown:
        return None
    figure, axes = _figure(theme, 10, 3.6, 2)
    for color, s in zip(theme.colors * 9, shown):
        for ax, xs in zip(axes, ([p.step for p in s.run.curve], _seconds(s.run))):
            ax.plot(
                xs,
                [p.loss for p in s.run.curve],
                s.style,
                color=color,
                linewidth=1.6,
                marker="o",
                markersize=2.5,
                label=s.label,
            )
        if s.run.loop_step is not None:
            off = s.run.tok_per_s[0]
            axes[0].axvline(s.run.loop_step, color=color, linewidth=0.9, linestyle=":")
            if off:
                axes[1].axvline(
                    s.run.tokens_at(s.run.loop_step) / off,
                    color=color,
                    linewidth=0.9,
                    linestyle=":",
                )
    low = min(p.loss for s in shown for p in s.run.curve)
    settled = [p.loss for s in shown for p in s.run.curve if p.step > 5] or [low]
    for ax in axes:
        ax.set_ylim(low - 0.1, max(settled) + 0.3)  # the first five steps would flatten the rest
    _label(axes[0], theme, "step", "training loss, nats per token", "Dotted: looped layers begin")
    joined = len({s.run.merges for s in shown}) > 1
    _label(
        axes[1], theme, "training time, s", "", "Tokens of different text: curves do not compare" if joined else ""
    )
    _legend(axes[0], theme)
    return figure


def draw_speed(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Tokens per second between progress lines."""
    shown = [s for s in series if len(s.run.curve) > 1]
    if not shown:
        return None
    figure, (ax,) = _figure(theme, 10, 3)
    for color, s in zip(theme.colors * 9, shown):
        seconds = _seconds(s.run)
        xs, ys = [], []
        for before, after, t0, t1 in zip(s.run.curve, s.run.curve[1:], seconds, seconds[1:]):
            if after.step > 5 and t1 > t0:  # the first lines are single steps and jump
                xs += [before.step, after.step]
                tokens = s.run.tokens_at(after.step) - s.run.tokens_at(before.step)
                ys += [tokens / (t1 - t0) / 1e6] * 2
        ax.plot(xs, ys, s.style, color=color, linewidth=1.8, label=s.label)
        if s.run.loop_step is not None:
            ax.axvline(s.run.loop_step, color=color, linewidth=0.9, linestyle=":")
    ax.set_ylim(bottom=0)
    _label(ax, theme, "step", "million tokens/s")
    _legend(ax, theme)
    return figure


def draw_stages(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Where the wall-clock of the whole run went, one bar a run."""
    shown = [s for s in series if s.run.stages()]
    if not shown:
        return None
    present = {name for s in shown for name, _ in s.run.stages()}
    names = [name for name in STAGES if name in present]
    figure, (ax,) = _figure(theme, 10, 1.6 + 0.5 * len(shown))
    shades = dict(zip(names, matplotlib.colormaps["tab10"].colors * 2))
    for row, s in enumerate(shown):
        left = 0.0
        for name, seconds in s.run.stages():
            ax.barh(row, seconds, left=left, color=shades[name], edgecolor=theme.background, height=0.62)
            if seconds > 0.05 * sum(value for _, value in s.run.stages()):
                ax.text(
                    left + seconds / 2,
                    row,
                    f"{seconds:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="#ffffff",
                )
            left += seconds
        ax.text(left, row, f"  {left:,.0f} s", va="center", fontsize=8, color=theme.ink)
    ax.set_yticks(range(len(shown)), [s.label for s in shown], color=theme.ink)
    ax.invert_yaxis()
    ax.margins(x=0.08)
    _label(ax, theme, "seconds, of the stages that the log times", "")
    for name in names:
        ax.barh(0, 0, color=shades[name], label=name)
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
        labelcolor=theme.ink,
    )
    return figure


def draw_running_score(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Running BPB of test-time training on the rank that writes the log; it need not end at the final score."""
    shown = [s for s in series if len(s.run.batches) > 1]
    if not shown:
        return None
    figure, (ax,) = _figure(theme, 10, 3.2)
    for color, s in zip(theme.colors * 9, shown):
        scores = [batch.bpb for batch in s.run.batches]
        xs = [100 * (k + 1) / len(scores) for k in range(len(scores))]
        ax.plot(xs, scores, s.style, color=color, linewidth=1.6, label=s.label)
        phases = [batch.phase for batch in s.run.batches]
        for k in range(1, len(phases)):
            if phases[k] != phases[k - 1]:
                ax.axvline(100 * k / len(phases), color=color, linewidth=0.9, linestyle=":")
        if s.run.ttt:
            ax.plot([100], [s.run.ttt.bpb], "D", color=color, markersize=6)
    _label(
        ax,
        theme,
        "% of the logged batches",
        "bits per byte",
        "Dotted: the base adapts to scored documents. Diamond: the final score of all ranks",
    )
    ax.legend(fontsize=8, frameon=False, labelcolor=theme.ink, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def draw_groups(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Bytes of the artifact by tensor group."""
    shown = [s for s in series if s.run.groups]
    if not shown:
        return None
    names = list(dict.fromkeys(name for s in shown for name in s.run.groups))
    figure, (ax,) = _figure(theme, 10, 3)
    width = 0.8 / len(shown)
    for k, (color, s) in enumerate(zip(theme.colors * 9, shown)):
        xs = [i + (k - (len(shown) - 1) / 2) * width for i in range(len(names))]
        ax.bar(
            xs,
            [s.run.groups.get(name, 0) / 1e6 for name in names],
            width * 0.92,
            color=color,
            label=s.label,
            hatch="//" if s.dashed else None,
            edgecolor=theme.background,
        )
    ax.set_xticks(range(len(names)), names, color=theme.ink)
    _label(ax, theme, "tensor group", "million bytes")
    _legend(ax, theme)
    return figure


def draw_scores(series: Sequence[Series], theme: Theme) -> Figure | None:
    """Bits per byte at the three stages of every run."""
    shown = [s for s in series if s.run.pre or s.run.quantized or s.run.ttt]
    if not shown:
        return None
    figure, (ax,) = _figure(theme, 10, 3.2)
    stages = (
        ("before quantization", "pre"),
        ("after quantization", "quantized"),
        ("with test-time training", "ttt"),
    )
    for k, (color, s) in enumerate(zip(theme.colors * 9, shown)):
        scores = [getattr(s.run, key).bpb if getattr(s.run, key) else None for _, key in stages]
        ax.plot(
            [i for i, v in enumerate(scores) if v is not None],
            [v for v in scores if v is not None],
            s.style,
            marker="o",
            markersize=6,
            color=color,
            linewidth=1.2,
            label=s.label,
        )
    ax.set_xticks(range(3), [name for name, _ in stages], color=theme.ink)
    ax.set_xlim(-0.3, 2.3)
    _label(ax, theme, "", "bits per byte")
    _legend(ax, theme)
    return figure


PICTURES: tuple[tuple[str, str, Callable], ...] = (
    ("scores", "Bits per byte at each stage", draw_scores),
    ("loss", "Training loss", draw_loss),
    ("speed", "Training speed", draw_speed),
    ("stages", "Where the wall-clock went", draw_stages),
    ("running", "Running score of test-time training", draw_running_score),
    ("groups", "Bytes by tensor group", draw_groups),
)


def png(figure: Figure) -> bytes:
    """The picture as PNG bytes, equal for equal input."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


# --- the page -----------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --ink: #1d2733; --soft: #5c6670; --line: #d9dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12171d; --ink: #e4e9ee; --soft: #a9b4bf; --line: #333c46; --card: #1a2129; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1120px;
       margin: 0 auto; padding: 24px 16px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; }
p.sub, figcaption { color: var(--soft); } figure { margin: 0; } img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
code { font: 12px ui-monospace, monospace; } ul { padding-left: 20px; }
"""


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def markdown(text: str) -> str:
    """HTML of the Markdown that report.py writes: tables, lists and paragraphs."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if all(line.startswith("|") for line in lines):
            rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
            parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')
        elif all(line.startswith("* ") for line in lines):
            parts.append("<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>")
        else:
            parts.append(f"<p>{_inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def write_page(
    out: Path, runs: Sequence[Run], against: Sequence[Run] = (), parts: Sequence[tuple[str, str]] = ()
) -> list[Path]:
    """Write the page and its PNG files (folder named after the page) and return the paths.

    parts: (heading, Markdown); the first stands above the pictures, the others below.
    """
    series = [Series(run, run.name, False) for run in runs] + [
        Series(run, f"{run.name} (against)", True) for run in against
    ]
    folder = out.with_suffix("")
    folder = folder if folder != out else out.with_name(out.name + "_files")
    folder.mkdir(parents=True, exist_ok=True)
    written, figures = [out], []
    for name, title, draw in PICTURES:
        images = {}
        for theme in THEMES:
            figure = draw(series, theme)
            if figure is not None:
                images[theme.name] = png(figure)
                path = folder / f"{name}_{theme.name}.png"
                path.write_bytes(images[theme.name])
                written.append(path)
        if images:
            light, dark = (
                f"data:image/png;base64,{base64.b64encode(images[theme.name]).decode()}" for theme in THEMES
            )
            caption = _inline(draw.__doc__.splitlines()[0])
            figures.append(
                f'<h2>{html.escape(title)}</h2><figure><picture><source srcset="{dark}" '
                f'media="(prefers-color-scheme: dark)"><img src="{light}" alt="{html.escape(title)}"></picture>'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    texts = [f"<h2>{html.escape(heading)}</h2>{markdown(text)}" for heading, text in parts]
    heading = "Runs " + ", ".join(run.name for run in runs) if len(runs) > 1 else f"Run {runs[0].name}"
    hardware = "; ".join(dict.fromkeys(run.hardware for run in runs))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(heading)}</title><style>{STYLE}</style></head><body>'
        f'<h1>{html.escape(heading)}</h1><p class="sub">{html.escape(hardware)}</p>'
        f"{''.join(texts[:1])}{''.join(figures)}{''.join(texts[1:])}</body></html>\n"
    )
    out.write_text(page, encoding="utf-8")
    return written
