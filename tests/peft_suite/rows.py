"""Adds SSVD-O's rows to the tables of PEFT's tests, and swaps LoRA for it in tests that were written for LoRA.

    python -m tests.peft_suite.rows ORIGINAL TARGET

ORIGINAL: the folder `tests` of PEFT's source archive. TARGET: a copy of it, in which files are written.
"""

import re
import sys
from pathlib import Path

IMPORT = "import ssvdo_kernels.integrations.peft  # noqa: F401 - registers SSVD-O\nfrom peft import SSVDOConfig\n"
SWAP = '''

def swap(**kw):
    """The arguments of LoraConfig for SSVD-O; skips where one is LoRA's alone."""
    import ssvdo_kernels.integrations.peft  # noqa
    import peft

    for name in ("use_rslora", "use_dora"):
        if not kw.get(name, True):
            kw.pop(name)
    if "init_lora_weights" in kw:
        kw["init_weights"] = kw.pop("init_lora_weights")
    for name in ("r", "lora_alpha"):
        kw.pop(name, None)
    if "lora_dropout" in kw:
        kw["dropout"] = kw.pop("lora_dropout")
    if kw.get("bias") == "lora_only":
        kw["bias"] = "ssvdo_only"
    try:
        return peft.SSVDOConfig(**{"outer_rank": 0, **kw})
    except TypeError as error:
        if "PYTEST_CURRENT_TEST" not in os.environ:
            return peft.LoraConfig()  # at collection
        pytest.skip(f"an argument of LoRA's alone: {error}")
'''
CUSTOM = {  # name: (target_modules, other arguments)
    "1": ("lin0", {}), "2": (["lin0"], {}), "3": (["lin1"], {}), "4": (["lin0", "lin1"], {}),
    "5": (["lin0"], {"modules_to_save": ["lin1"]}), "6": (["lin0", "lin1"], {"modules_to_save": ["lin1"]}),
    "7 neumann": (["lin0"], {"rotation": "neumann"}), "8 first_order": (["lin0"], {"rotation": "first_order"}),
    "9 additive": (["lin0"], {"outer": "additive"}), "10 full inner": (["lin0"], {"inner_ratio": 1.0}),
    "11 no outer": (["lin0"], {"outer_rank": 0}), "12 reference": (["lin0", "lin1"], {"backend": "reference"}),
    "13 patterns": (["lin0", "lin1"], {"inner_ratio_pattern": {"lin0": 0.8}, "outer_rank_pattern": {"lin1": 2}}),
}  # fmt: skip
TASKS = {"decoder_models": "CAUSAL_LM", "encoder_decoder_models": "SEQ_2_SEQ_LM",
         "feature_extraction_models": "FEATURE_EXTRACTION", "seq_classifier": "SEQ_CLS"}  # fmt: skip
SWAPPED = ("tuners_utils", "low_level_api", "other", "initialization", "mapping", "helpers", "auto", "hub_features",
           "integrations", "trainable_tokens", "target_parameters", "custom_models")  # fmt: skip
NAMES = {"self.emb0 = nn.Embedding(10, 10)": "self.emb0 = nn.Linear(10, 10)", '"lora.Conv2d"': '"ssvdo.Linear"',
         '"lora.Embedding"': '"ssvdo.Linear"', '"lora.Linear"': '"ssvdo.Linear"', '"LoraModel"': '"SSVDOModel"',
         '"LORA"': '"SSVDO"'}  # fmt: skip


def with_import(text: str) -> str:
    """The file with our import before its first one from peft."""
    return re.sub(r"^from peft import", IMPORT + "from peft import", text, count=1, flags=re.M)


def once(text: str, old: str, new: str) -> str:
    """`old`, which must be there, replaced at its first place."""
    if old not in text:
        raise SystemExit(f"PEFT's tests have changed: {old!r} is not there")
    return text.replace(old, new, 1)


def custom_models(text: str) -> str:
    """Rows of every table of test_custom_models.py."""
    text = with_import(text)
    values = {name: {"outer_rank": 2, "target_modules": targets, **own} for name, (targets, own) in CUSTOM.items()}
    rows = "".join(f'    ("Vanilla MLP {name} SSVDO", "MLP", SSVDOConfig, {own!r}),\n' for name, own in values.items())
    text = once(text, "ALL_PEFT_CONFIG_CLASSES = sorted(",
                f"TEST_CASES += [\n{rows}]\nALL_PEFT_CONFIG_CLASSES = sorted(")  # fmt: skip
    own = '"outer_rank": 2, "init_weights": False'
    several = (f'MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES += [\n    ("SSVDO Same", "ssvdo", SSVDOConfig, '
               f'{{"target_modules": ["lin0"], {own}}}, {{"target_modules": ["lin0"], {own}}}),\n'
               f'    ("SSVDO Different", "ssvdo", SSVDOConfig, {{"target_modules": ["lin0"], {own}}}, '
               f'{{"target_modules": ["lin1"], {own}}}),\n]\n\n\n')  # fmt: skip
    place = "def _skip_tests_with_multiple_adapters_with_target_parameters"
    text = once(text, place, several + place)
    hra = '            HRAConfig(target_modules=["lin0"], init_weights=False),\n'
    ours = '            SSVDOConfig(target_modules=["lin0"], init_weights=False, outer_rank=4),\n'
    text = once(text, hra, hra + ours)
    text = text.replace("            LoraConfig,\n            HRAConfig,\n",
                        "            LoraConfig,\n            SSVDOConfig,\n            HRAConfig,\n")  # fmt: skip
    text = once(text, "MIXED_ADAPTER_TEST_CASES = [\n",
                'MIXED_ADAPTER_TEST_CASES = [\n    ("SSVDO mixed adapter", SSVDOConfig(target_modules=["lin0"], '
                'outer_rank=4, init_weights=False), SSVDOConfig(target_modules=["lin0"], outer_rank=2, '
                'init_weights=False)),\n')  # fmt: skip
    start = text.index("    def test_requires_grad_oft_different_targets")
    end = text.index("    def test_requires_grad_hra")
    block = text[start:end].replace("requires_grad_oft", "requires_grad_ssvdo")
    block = block.replace(", r=2, oft_block_size=0", ", outer_rank=2, inner_ratio=1.0")
    block = block.replace("OFTConfig", "SSVDOConfig")

    def three(found: re.Match[str]) -> str:
        indent, base, adapter = found.groups()
        return "".join(f'{indent}"{base}.ssvdo_adapters.{adapter}.{part}",\n'
                       for part in ("inner_rotation", "inner_scale", "outer"))  # fmt: skip

    block = re.sub(r'( +)"(base_model\.model\.lin\d)\.oft_R\.(\w+)\.weight",\n', three, block)
    return text[:end] + block + text[end:]


def family(text: str, task: str) -> str:
    """Two rows for the models of Transformers: default names, and all linear layers."""
    text = with_import(text)
    rows = "".join(f'    (SSVDOConfig, {{"task_type": "{task}", "target_modules": {targets!r}, "outer_rank": 4}}),\n'
                   for targets in (None, "all-linear"))  # fmt: skip
    at = text.index("\n\n\n", text.index("ALL_CONFIGS = [")) + 3
    return text[:at] + f"ALL_CONFIGS += [\n{rows}]\n\n\n" + text[at:]


def swapped(text: str) -> str:
    """The file with LoraConfig's calls by way of `swap`, and ours for the names that a status shows."""
    for lora, ours in NAMES.items():
        text = text.replace(lora, ours)
    text = re.sub(r"\bLoraConfig\(", "swap(", text)
    text = re.sub(r"^from \.testing_(utils|common) import", r"from .testing_utils import swap\nfrom .testing_\1 import",
                  text, count=1, flags=re.M)  # fmt: skip
    if "import swap" not in text:
        text = re.sub(r"^from peft import", "from .testing_utils import swap\nfrom peft import", text, count=1,
                      flags=re.M)  # fmt: skip
    return text


def main() -> None:
    """Writes the changed files."""
    original, target = map(Path, sys.argv[1:3])
    read = {p.name: p.read_text(encoding="utf-8") for p in original.glob("*.py")}
    written = {"__init__.py": "", "testing_utils.py": read["testing_utils.py"].replace(
        'is_offline = override.get("HF_HUB_OFFLINE", False) == "1"', "is_offline = True") + SWAP}  # fmt: skip
    written["test_custom_models.py"] = custom_models(read["test_custom_models.py"])
    for name, task in TASKS.items():
        written[f"test_{name}.py"] = family(read[f"test_{name}.py"], task)
    written["test_config.py"] = once(with_import(read["test_config.py"]), "    (WaveFTConfig, {}),\n",
                                     "    (WaveFTConfig, {}),\n    (SSVDOConfig, {}),\n")  # fmt: skip
    for name in SWAPPED:
        written[f"test_swap_{name}.py"] = swapped(read[f"test_{name}.py"])
    for name, text in written.items():
        (target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
