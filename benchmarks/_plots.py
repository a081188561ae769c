"""The two pictures of docs/performance.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

DPI = 80


def draw_growth(line: dict[str, Any], file: Path) -> None:
    """CPU seconds of a sample over what grows, log-log, with a line of slope 1."""
    figure, places = pyplot.subplots(1, len(line["curves"]), figsize=(3.2 * len(line["curves"]), 2.8), squeeze=False)
    for place, (name, points) in zip(places[0], line["curves"].items(), strict=True):
        across = [point["at"] for point in points]
        found = [point["cpu_s_per_sample"] for point in points]
        medians = [one["median"] for one in found]
        place.fill_between(across, [one["min"] for one in found], [one["max"] for one in found], alpha=0.25)
        place.plot(across, medians, marker="o", markersize=3)
        place.plot(across, [medians[0] * at / across[0] for at in across], color="gray", linewidth=0.8, linestyle=":")
        place.set(xscale="log", yscale="log", xlabel=name.replace("_", " "))
        place.set_xticks(across, [str(at) for at in across])
        place.minorticks_off()
    places[0][0].set_ylabel("CPU seconds a sample")
    _save(figure, file)


def draw_quality(line: dict[str, Any], file: Path) -> None:
    """Helpful rate over CPU seconds, a line for each seed, and over KL."""
    figure, (over_seconds, over_kl) = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True)
    for number, (name, of_seed) in enumerate(line["curves"].items()):
        for seed, points in enumerate(of_seed.values()):
            style = {"color": f"C{number}", "linewidth": 1, "label": name if seed == 0 else None}
            helpful = [point["helpful"] for point in points]
            over_seconds.plot([point["cpu_s"] for point in points], helpful, **style)
            over_kl.plot([point["kl"] for point in points], helpful, **style)
    over_seconds.axhline(line["target"], color="gray", linewidth=0.8, linestyle=":")
    over_seconds.set(xlabel="CPU seconds of PPO", ylabel="helpful replies")
    over_kl.set(xlabel="KL from the SFT policy, nats a reply")
    over_seconds.legend(fontsize=7)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)
