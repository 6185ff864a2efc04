"""Runs PEFT's tests of SSVD-O's rows, and LoRA's beside them, and writes the table.

    HF_HOME=CACHE python -m tests.peft_suite.report TESTS RESULT.md [FILE ...]

TESTS: the folder that `rows` has written. Ends with 1 where a test fails for no reason that is known.
"""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

FILES = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier",
         "config")  # fmt: skip
OTHERS = ("AdaLora", "Delora", "Gralora", "RandLora", "TinyLora", "UniLora", "XLora", "VBLora", "Velora", "Monte", "Bd",
          "LoraGA", "Adamss", "Arrow")  # fmt: skip
LORA = f"LoraConfig and not ({' or '.join(OTHERS)})"  # names are compared as parts of words, of any case
REASONS = {  # of failures, by test
    r"test_loading_model.*requires_grad_set_correctly":
        "makes the base anew with other random weights, and another base is refused",
    r"test_parameters_after_loading_model\[.*neumann": "lr 0.5 takes the truncated series out of its range",
    r"test_training(_gradient_checkpointing|_layer_indexing)?\[.*(Bert|Roberta)Model":
        "all-linear adapts the pooler, which the output that is tested does not use",
    r"test_lora_conversion\[.*OPT": "asks for rank 8 of layers that are 4 wide in the tiny model",
    r"test_from_pretrained|test_save_pretrained_with_runtime_config": "needs the hub; LoRA's fail in the same place",
}  # fmt: skip


def run(tests: Path, name: str, chosen: str) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Counts by outcome, and (test, first line of its error) of the failures."""
    report = tests.parent / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-k", chosen,
               f"--junitxml={report}", f"{tests.name}/test_{name}.py"]  # fmt: skip
    subprocess.run(command, cwd=tests.parent, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
    counts, failed = Counter(), []
    for case in ET.parse(report).getroot().iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        counts["failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if bad is not None:
            failed.append((str(case.get("name")), str(bad.get("message", "")).splitlines()[0][:160]))
    return counts, failed


def main() -> int:
    """Writes the table; 1 where there are failures without a known reason."""
    tests, result = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    lines = ["| file | SSVD-O: passed | failed | skipped | LoRA: passed | failed | skipped |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    known: Counter[str] = Counter()
    unknown = []
    for name in sys.argv[3:] or FILES:
        own, failed = run(tests, name, "SSVDO or ssvdo")
        other, _ = run(tests, name, LORA)
        counts = [count[outcome] for count in (own, other) for outcome in ("passed", "failed", "skipped")]
        lines.append(f"| test_{name}.py | {' | '.join(map(str, counts))} |")
        for test, error in failed:
            reason = next((why for pattern, why in REASONS.items() if re.match(pattern, test)), None)
            if reason is None:
                unknown.append(f"- {name}: {test}: {error}")
            else:
                known[f"{test.partition('[')[0]}: {reason}"] += 1
    lines += ["", "Failures with a reason:", "", *(f"- {count} x {what}" for what, count in sorted(known.items()))]
    lines += ["", "Failures without one:", "", *(unknown or ["- none"])]
    result.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
