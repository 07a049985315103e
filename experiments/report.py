"""Numbers and curves of an experiment for `results/`: no image of a patient, no pseudonym.

    python experiments/report.py FINETUNE NAME "title" [METHOD=RUN ...]     # writes results/NAME.md, results/NAME.json, results/NAME*.png
"""
import sys
from pathlib import Path

from medssl_nb.core import read_json, read_jsonl, write_json
from medssl_nb.plot.curves import show_arms, show_history
from medssl_nb.plot.volume import png

RESULTS = Path(__file__).parent.parent / "results"


def thin(rows, n=200):
    return rows[:: max(1, len(rows) // n)]


def show_decisions(rows, metric="auc"):
    "A decision is judged by ranking: each arm's value with its interval, at each number of labels, beside its twin."
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["metric"] == metric and r.get("class", "all") == "all"]
    arms = sorted({r["arm"] for r in rows}, key=lambda a: (not a.startswith("scratch"), a))
    budgets = sorted({r["budget"] for r in rows})
    fig = Figure(figsize=(4.5, 3), layout="constrained")
    ax = fig.subplots()
    for k, a in enumerate(arms):
        for r in (r for r in rows if r["arm"] == a):
            x = budgets.index(r["budget"]) + (k - (len(arms) - 1) / 2) * 0.12
            ax.errorbar([x], [r["mean"]], [[r["mean"] - r["low"]], [r["high"] - r["mean"]]], marker="o", ms=4, lw=1, color=f"C{k}", label=a if r["budget"] == budgets[0] else None)
    ax.set_xticks(range(len(budgets)), budgets)
    ax.set_xlabel("labelled images", fontsize=8)
    ax.set_ylabel({"auc": "area under the ROC curve"}.get(metric, metric), fontsize=8)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="lower right")
    return fig


def main(folder, name, title, runs):
    folder = Path(folder)
    cells = [{k: c[k] for k in ("arm", "budget", "seed", "score")} for c in read_jsonl(folder / "cells.jsonl")]
    kind = read_json(folder / "table.json")
    rows = kind["rows"] if isinstance(kind, dict) else kind
    arms = sorted({c["arm"] for c in cells}, key=lambda a: (not a.startswith("scratch"), a))
    dice = any(r["metric"] == "dice" for r in rows)
    (RESULTS / f"{name}.png").write_bytes(png(show_arms(cells, ylabel="Dice", order=arms, size=(4.5, 3)) if dice else show_decisions(rows)))
    said = "every seed a dot, bars are 95 % intervals over seeds" if dice else "area under the ROC curve, 95 % intervals over seeds and people"
    text = [f"# {title}", "", (folder / "table.md").read_text().strip(), "", f"![{said}]({name}.png)", ""]
    out = dict(title=title, cells=cells, table=rows, pretraining={})
    for m, run in runs.items():
        h = read_jsonl(Path(run) / "history.jsonl")
        card = read_json(Path(run) / "encoder" / "card.json")
        (RESULTS / f"{name}_{m}.png").write_bytes(png(show_history(h), dpi=80))
        out["pretraining"][m] = dict(card={k: card.get(k) for k in ("method", "preset", "data", "parameters", "input", "left_out")}, history=thin(h))
        text += [f"## Pre-training: {m}", "", f"{card['data']['cases']} cases of {card['data']['subjects']} people, {len(h)} steps, {card['parameters']:,} encoder parameters.", "", f"![loss and terms]({name}_{m}.png)", ""]
    (RESULTS / f"{name}.md").write_text("\n".join(text))
    write_json(RESULTS / f"{name}.json", out)
    print(RESULTS / f"{name}.md")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3], dict(a.split("=", 1) for a in sys.argv[4:]))
