"""The table of all families: `python -m tests.families.record FOLDER`, minutes; goes on where it stopped.

FOLDER gets families.jsonl, a line for each family, and families.md.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers

from . import check, truth
from .models import FAMILIES, KINDS, inputs_of, make

WAYS = {"core default": (check.through_core, None), "core all-linear": (check.through_core, "all-linear"),
        "PEFT default": (check.through_peft, None), "PEFT all-linear": (check.through_peft, "all-linear")}  # fmt: skip

_LORA = ("LoRA default", "LoRA all-linear")


def _said(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def examine(name):
    """What each way of adapting the family's tiny model comes to: "ok", or the error."""
    found = {"family": name}
    try:
        model = make(name)
    except Exception as error:
        return {**found, "not built": _said(error)}
    expected = truth.feed_forward(name, model)
    found["layers"] = len(expected)
    try:
        inputs = inputs_of(name, model)
        check.run(model, inputs)
        base = check.base_gradients(model, inputs)
    except Exception as error:
        return {**found, "no forward": _said(error)}
    for way, (through, targets) in WAYS.items():
        try:
            names = through(model, inputs, targets, base)
        except Exception as error:
            found[way] = _said(error)
            names = set()
        else:
            found[way] = "ok"
        if targets is None:
            found[f"{way}: missed"] = truth.without_numbers(expected - names)
            found[f"{way}: wrong"] = truth.without_numbers(names - expected)
        if found[way] != "ok" and _word(found, way) == "fails":
            lora = f"LoRA {way.split()[1]}"
            try:
                check.through_peft(model, inputs, targets or sorted(expected), base, lora=True)
                found[lora] = "ok"
            except Exception as error:
                found[lora] = _said(error)
    return found


def _word(row, way):
    said, default = row.get(way, "-"), way.endswith("default")
    if said in ("ok", "-"):
        return said
    if default and FAMILIES[row["family"]].missed:
        return "known miss"
    none = (default and not row["layers"]) or "no linear layer" in said or "NoMatchingPeftModule" in said
    return "none" if none else "fails"


def _default(row):
    missed, wrong = row["core default: missed"], row["core default: wrong"]
    if not row["layers"]:
        return "wrong" if wrong else "none"
    return "right" if not missed and not wrong else "known miss" if FAMILIES[row["family"]].missed else "wrong"


def table(rows):
    """The Markdown of all rows, counts first."""
    built = [row for row in rows.values() if "core default" in row]
    holding = [row for row in built if row["layers"]]
    right = [row for row in holding if _default(row) == "right"]
    wrong = [row["family"] for row in built if row["core default: wrong"]]
    lines = [
        "# Families of Transformers",
        "",
        f"A tiny random model of each of {len(rows)} families (Transformers {transformers.__version__}, PEFT "
        f"{peft.__version__}, torch {torch.__version__.split('+')[0]}, CPU, float32), by `nox -s families`'s checks: "
        "the default names against the layers",
        "that are feed-forward ones, told by widths that no other layer has; then identity at the start, gradients, "
        "merge, unmerge, save, load and removal.",
        "`none`: the model has no such layer. `known miss`: below the table, as are the errors of `fails`.",
        "",
        f"- {len(built)} built and run; {len(holding)} of them hold feed-forward layers.",
        f"- Default names exactly right: {len(right)} of {len(holding)}. Wrong takes: {len(wrong)}"
        + (f" ({', '.join(wrong)})." if wrong else "."),
    ]
    for way in WAYS:
        counted = [row for row in built if _word(row, way) not in ("none", "known miss")]
        failed = [row for row in counted if _word(row, way) == "fails"]
        alone = [row["family"] for row in failed if row[f"LoRA {way.split()[1]}"] == "ok"]
        lines.append(f"- {way}: ok in {len(counted) - len(failed)} of {len(counted)} that have such layers; fails "
                     f"where LoRA does not: {', '.join(alone) or 'nowhere'}.")  # fmt: skip
    lines += ["", "| family | layers | default names | core default | core all-linear | PEFT default | PEFT all-linear "
              "| LoRA, where SSVD-O fails |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind, families in KINDS.items():
        lines.append(f"| **{kind}** | | | | | | | |")
        for row in (rows[name] for name in families if name in rows and "core default" in rows[name]):
            ways = [_word(row, way) for way in WAYS]
            lora = ", ".join(sorted({_word(row, way) for way in _LORA if way in row}))
            lines.append("| " + " | ".join([row["family"], str(row["layers"]), _default(row), *ways, lora]) + " |")
    lines += ["", "## Known misses", ""]
    lines += [f"- {name}: {FAMILIES[name].missed}." for name in rows if FAMILIES[name].missed]
    lines += ["", "## Failures", ""]
    lines += [f"- {row['family']}, {way}: {row[way]}" for row in built for way in (*WAYS, *_LORA)
              if _word(row, way) == "fails"]  # fmt: skip
    lines += ["", "## Not measured", ""]
    lines += [f"- {row['family']}: {row.get('not built', row.get('no forward'))}" for row in rows.values()
              if "core default" not in row]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(folder):
    """Examines every family that the folder has no line for, and writes the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "families.jsonl"
    rows = {row["family"]: row for row in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    for name in FAMILIES:
        if name not in rows:
            began = time.perf_counter()
            rows[name] = examine(name)
            with lines.open("a") as out:
                out.write(json.dumps(rows[name]) + "\n")
            said = rows[name].get("not built") or rows[name].get("no forward") or [rows[name][way] for way in WAYS]
            print(f"{name}: {said}, {time.perf_counter() - began:.1f} s", flush=True)
    (folder / "families.md").write_text(table({name: rows[name] for name in FAMILIES}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
