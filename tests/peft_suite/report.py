"""Runs PEFT's tests of SSVD-O's rows and those written for LoRA with its configuration swapped for ours, LoRA's own
beside them, and writes the tables.

    HF_HOME=CACHE python -m tests.peft_suite.report TESTS RESULT.md [FILE ...]

TESTS: the folder that `rows` has written. FILE: custom_models, ..., swap_low_level_api, ... Ends with 1 where a test
fails for no reason that is known.
"""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from .rows import SWAPPED

FILES = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier",
         "config")  # fmt: skip
OTHERS = ("AdaLora", "Delora", "Gralora", "RandLora", "TinyLora", "UniLora", "XLora", "VBLora", "Velora", "Monte", "Bd",
          "LoraGA", "Adamss", "Arrow")  # fmt: skip
LORA = f"LoraConfig and not ({' or '.join(OTHERS)})"  # names are compared as parts of words, of any case
REASONS = {  # of failures, by "test: error"
    r"test_loading_model.*requires_grad_set_correctly":
        "makes the base anew with other random weights, and another base is refused",
    r"test_parameters_after_loading_model\[.*neumann": "lr 0.5 takes the truncated series out of its range",
    r"test_training(_gradient_checkpointing|_layer_indexing)?\[.*(Bert|Roberta)Model":
        "all-linear adapts the pooler, which the output that is tested does not use",
    r"test_lora_conversion\[.*OPT": "asks for rank 8 of layers that are 4 wide in the tiny model",
    r"test_from_pretrained|test_save_pretrained_with_runtime_config": "needs the hub; LoRA's fail in the same place",
    r".*trained on other base weights": "loads an adapter onto a base with other random weights, which is refused",
    r".*(Embedding|MultiheadAttention|LSTM|GRU|groups=)\b.*allowed: ": "adapts a kind of layer that is refused by name",
    r"test_inject_from_state_dict_low_cpu_mem_usage": "what V_k and the fingerprints hold is computed, not loaded",
    r".*disable_input_dtype_casting": "asks for the dtype error of LoRA's own weights; ours take tokens of the base's",
    r".*(nb_params|model_target_parameters|model_status_with|model_with_injected)": "counts LoRA's parameters",
    r".*not compatible with the `PeftMixedModel`": "a mixed model, which refuses the method by name",
    r"test_custom_models_dont_have|test_maybe_include_all_linear_does_not": "asserts names of LoRA's own",
    r".*(lora_|lora\.|'lora'|Lora[A-Z]|'r'|scaling|rank_pattern|alpha|layer_replication)":
        "asserts names of LoRA's own",
}  # fmt: skip


def run(tests: Path, name: str, chosen: str) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Counts by outcome, and (test, its error) of the failures."""
    report = tests.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short",
               *(["-k", chosen] if chosen else []), f"--junitxml={report}",
               f"{tests.name}/test_{name}.py"]  # fmt: skip
    subprocess.run(command, cwd=tests.parent, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
    counts, failed = Counter(), []
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        counts["failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if bad is not None:
            errors = [line for line in (bad.text or "").splitlines() if line.startswith("E ")]
            failed.append((str(case.get("name")), " ".join([str(bad.get("message", "")), *errors[-6:]])))
    return counts, failed


def main() -> int:
    """Writes the table; 1 where there are failures without a known reason."""
    tests, result = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    lines = ["| file | SSVD-O: passed | failed | skipped | LoRA: passed | failed | skipped |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    known: Counter[str] = Counter()
    unknown = []
    for name in sys.argv[3:] or (*FILES, *(f"swap_{name}" for name in SWAPPED)):
        swapped = name.startswith("swap_")
        own, failed = run(tests, name, "" if swapped else "SSVDO or ssvdo")
        other, theirs = run(tests, name.removeprefix("swap_"), "" if swapped else LORA)
        together = {test for test, _ in theirs} if swapped else set()
        counts = [count[outcome] for count in (own, other) for outcome in ("passed", "failed", "skipped")]
        lines.append(f"| test_{name}.py | {' | '.join(map(str, counts))} |")
        for test, error in failed:
            said = f"{test}: {' '.join(error.split())}"
            reason = next((why for pattern, why in REASONS.items() if re.match(pattern, said)), None)
            if test in together:
                known[f"{name}: LoRA's own fail too"] += 1
            elif reason is None:
                unknown.append(f"- {name}: {said[:300]}")
            else:
                known[f"{name}: {reason}"] += 1
    lines += ["", "Failures with a reason:", "", *(f"- {count} x {what}" for what, count in sorted(known.items()))]
    lines += ["", "Failures without one:", "", *(unknown or ["- none"])]
    result.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
