"""All benchmarks in one run: tables, measurements and a plot in one folder.

python benchmarks/run_all.py --out benchmarks/results/my-machine            # an hour or so on two cores
python benchmarks/run_all.py --short --out runs/bench                       # `make bench`: some ten minutes
python benchmarks/run_all.py --quick --out runs/bench                       # toys, for the tests
python benchmarks/run_all.py --only rollouts --out benchmarks/results/my-machine    # one of them anew
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT = {
    "loss": ["--repeats", "1"],
    "compare_trl": ["--short"],
    "rollouts": ["--rounds", "1", "--calls", "1"],
}
TITLES = {"loss": "Loss alone (JSD)", "compare_trl": "Training step", "rollouts": "Rollouts"}
# Ours is the unit of every bar; the colours say who.
COLOURS = {"ours": "tab:blue", "decode": "tab:blue", "trl": "tab:orange", "trl_gkd": "tab:orange"}
COLOURS |= {"trl_distillation": "tab:red", "liger": "tab:green", "bare": "tab:gray", "hf": "tab:gray"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--short", action="store_true", help="one process each, and fewer modes")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="*", choices=list(TITLES), help="measure these; without a name just draw")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in TITLES if options.only is None else options.only:
        (options.out / f"{name}.md").write_text(measure(name, options), encoding="utf-8")
    measured = {name: json.loads((options.out / f"{name}.json").read_text())["results"] for name in TITLES}
    print(f"Written: {plot(measured, options.out / 'ratios.svg')} and tables beside it.")


def measure(name: str, options: argparse.Namespace) -> str:
    """Run one benchmark, its progress shown, and return what it prints."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", str(options.out / f"{name}.json")]
    command += ["--quick"] if options.quick else SHORT[name] if options.short else []
    print(f"=== {TITLES[name]}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed; see above.")
    print(done.stdout, flush=True)
    return f"# {TITLES[name]}\n\n{done.stdout}"


def plot(measured: dict[str, Any], path: Path) -> Path:
    """Times and peak memory as multiples of ours, one group of bars for each thing measured."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "ratios", "svg.fonttype": "none"}  # the same figures, the same small file
    import matplotlib.pyplot as plt

    groups = {TITLES["loss"]: measured["loss"], **measured["compare_trl"], TITLES["rollouts"]: measured["rollouts"]}
    labels = names_of_all()
    figure, axes = plt.subplots(1, 2, figsize=(11, 1 + 0.28 * sum(map(len, groups.values()))), layout="constrained")
    for axis, key, title in (
        (axes[0], "seconds", "time, multiples of ours"),
        (axes[1], "extra_mib", "extra peak memory, multiples of ours"),
    ):
        place, ticks = 0.0, []
        for group, results in groups.items():
            own = median(results["ours" if "ours" in results else "decode"], key)
            if axis is axes[0]:
                axis.text(0, place, f" {group}", fontsize=8, va="center", weight="bold")
            for name, runs in results.items():
                place -= 1
                if name == "bare" and key == "extra_mib":
                    continue  # its logits were there before
                ratio = median(runs, key) / own
                axis.barh(place, ratio, color=COLOURS.get(name, "tab:cyan"), height=0.8)
                axis.text(ratio, place, f" {ratio:.2f}", fontsize=7, va="center")
                ticks.append((place, labels[name]))
            place -= 1.5
        axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=7)
        axis.axvline(1, color="black", linewidth=0.6)
        axis.margins(x=0.12)
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def names_of_all() -> dict[str, str]:
    from compare_trl import TRAINERS
    from loss import LOSSES
    from rollouts import ENGINES

    return {**LOSSES, **ENGINES, **TRAINERS, "ours": "ours"}


if __name__ == "__main__":
    main()
