"""The laboratory: grids, results that are kept, methods of equal budget, runs on a small model, the page."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile", "jiwer", "peft", "yaml", "matplotlib"):
    pytest.importorskip(needed, reason="needs the extras: pip install 'ssvdo_kernels[asr,peft,bench]'")

from transformers import WhisperConfig, WhisperForConditionalGeneration

from examples.asr import demo, experiment, report, run, speech_report, train
from examples.asr.experiment import HERE, PROFILES, Experiment, Store, key_of, main, run_all
from examples.asr.methods import METHODS, adapt
from examples.asr.whisper import config_of

COMMITTED = sorted((HERE / "experiments").glob("*.yaml"))
GRID = """
question: Why?
settings: {corpus: committed, steps: 2, voices: [scottish]}
rates: {lora: 0.1, ssvdo: 0.2}
grids:
  - {cases: [{method: none}], seed: [0]}
  - {method: [lora, ssvdo], seed: [1, 0]}
reduced: {grid: {method: [lora]}, settings: {steps: 1}}
"""


def described(folder, text=GRID, name="small"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return Experiment.read(path)


def test_grids_are_products_with_each_method_s_rate(tmp_path):
    cells = described(tmp_path).cells("full")
    assert [(c["method"], c["seed"], c.get("rate"), c["steps"]) for c in cells] == [
        ("none", 0, None, 0), ("lora", 0, 0.1, 2), ("ssvdo", 0, 0.2, 2), ("lora", 1, 0.1, 2),
        ("ssvdo", 1, 0.2, 2)]  # fmt: skip
    reduced = described(tmp_path).cells("reduced")
    assert [(c["method"], c["seed"], c["steps"]) for c in reduced] == [("none", 0, 0), ("lora", 0, 1), ("lora", 1, 1)]


def test_the_key_is_of_all_settings_defaults_included():
    assert key_of({"seed": 0}) == key_of({}) != key_of({"seed": 1})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps: 2", "stepz: 2", "setting 'stepz' is unknown"),
        ("question", "quest", "key 'quest' is unknown"),
        ("lora, ssvdo", "lora, sssvd", "sssvd"),
        ("lora: 0.1, ", "", "rates: none for method 'lora'"),
        ("reduced: {grid", "reduced: {grids", "key 'grids' of a profile"),
        ("question: Why?", "- 1", "small.yaml"),
        ("question: Why?", "question: " + "[" * 10_000, "small.yaml"),
    ],
)
def test_a_wrong_description_is_refused_and_named(tmp_path, old, new, said):
    assert old in GRID
    with pytest.raises(ValueError, match=said) as error:
        described(tmp_path, GRID.replace(old, new))
    assert "small.yaml" in str(error.value)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.stem)
def test_committed_experiments_are_well_formed(path):
    found = Experiment.read(path)
    counts = {p: len(found.cells(p)) for p in PROFILES}
    assert found.question and 0 < counts["reduced"] <= counts["full"]
    assert {key_of(c) for c in found.cells("reduced")} <= {key_of(c) for c in found.cells("full")}
    assert all(c["corpus"] == "committed" for c in found.cells("quick"))


def test_the_page_covers_every_committed_experiment():
    assert sorted(report.REAL + report.SYNTHETIC) == [p.stem for p in COMMITTED]


def tiny():
    torch.manual_seed(0)
    small = {**config_of().to_dict(), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
             "decoder_ffn_dim": 48}  # fmt: skip
    return WhisperForConditionalGeneration(WhisperConfig(**small)).eval()


@pytest.mark.parametrize("method", METHODS)
def test_methods_start_at_the_base_and_share_a_budget(method):
    base, settings = tiny(), {"method": method, "inner_ratio": 0.5, "outer_rank": 4, "init_angle": 0.0}
    mel, tokens = torch.randn(2, 80, 600), torch.tensor([[3, 4], [5, 6]])
    model = adapt(copy.deepcopy(base), settings).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inner = {"ssvd": 4 * 16 * 17 // 2, "ssvd_first_order": 4 * 16 * 17 // 2}  # p = 1 is the most
    if method == "full":
        assert trained == sum(p.numel() for p in base.parameters())
    else:  # one rank of LoRA more or less is 4 * 64 numbers
        assert abs(trained - inner.get(method, 4 * (8 * 9 // 2 + 32 * 4))) <= 4 * 64 / 2
    with torch.no_grad():
        expected, got = (m(mel, decoder_input_ids=tokens).logits for m in (base, model))
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "pissa", "ssvdo", "full"])
def test_baking_keeps_the_function_in_plain_layers(method):
    adapted = adapt(tiny(), {"method": method, "inner_ratio": 0.5, "outer_rank": 4})
    with torch.no_grad():
        for p in adapted.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    mel, tokens = torch.randn(1, 80, 600), torch.tensor([[3, 4]])
    with torch.no_grad():
        expected = adapted.model(mel, decoder_input_ids=tokens).logits
        plain = adapted.bake()
        assert torch.allclose(plain(mel, decoder_input_ids=tokens).logits, expected, atol=1e-4)
    assert {type(m) for n, m in plain.named_modules() if n.endswith(("fc1", "fc2"))} == {torch.nn.Linear}


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='magic' is unknown; allowed: 'full', 'lora'"):
        adapt(tiny(), {"method": "magic"})


class Letters:
    def encode(self, text, add_special_tokens):
        self.ids = [ord(c) for c in text]
        return self

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture
def small_whisper(monkeypatch):
    monkeypatch.setattr(run, "_whisper", lambda model, seconds: (tiny(), Letters()))


SMALL = {"corpus": "committed", "train": 8, "utterances": 2, "steps": 2, "batch": 4, "precision": "fp32",
         "inner_ratio": 0.5, "outer_rank": 4, "rate": 1e-3}  # fmt: skip


@pytest.mark.parametrize("strategy", ["continue", "merged"])
def test_a_run_trains_in_stages_and_reports_them(small_whisper, strategy):
    settings = {**SMALL, "voices": ["scottish", "scottish"], "strategy": strategy, "evaluate_at": [0, 1],
                "evaluate": ["child", "en-us"]}  # fmt: skip
    result = run.Run(settings).result()
    seen = [(e["stage"], e["step"], e["voice"]) for e in result["evaluations"]]
    assert seen == [(stage, step, voice) for stage, step in [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
                    for voice in ("child", "en-us")]  # fmt: skip
    assert len(result["losses"]) == 4 and result["trained"] == 4 * (36 + 128)
    first = result["evaluations"][0]
    assert first["wer"] == pytest.approx(100 * sum(first["words_wrong"]) / sum(first["words"]))
    assert len(first["words"]) == 2 and json.loads(json.dumps(result)) == result
    assert [d["step"] for d in result["diagnostics"]] == [0, 1, 2, 1, 2]
    fresh = strategy == "merged"
    assert (result["diagnostics"][3]["drift"] < result["diagnostics"][2]["drift"]) is fresh


def test_a_run_tells_splits_speakers_and_parts(small_whisper, monkeypatch):
    corpus = run.open_corpus("committed")
    people = tuple(replace(u, speaker=u.voice) for u in corpus.utterances)
    monkeypatch.setattr(run, "_corpus", lambda source: type(corpus)(people))
    run._features.cache_clear()
    settings = {**SMALL, "steps": 5, "evaluate": ["child/test", "scottish/train"], "part_rates": {"outer": 0.0},
                "evaluate_at": [1]}  # fmt: skip
    result = run.Run(settings).result()
    run._features.cache_clear()
    first, second = result["evaluations"][-2:]
    assert (first["split"], second["split"], second["speakers"]) == ("test", "train", ["scottish"] * 2)
    assert first["capped"] <= first["wer"] and 0 <= first["deletions"] <= first["capped"]
    traced = {t["part"]: t for t in result["trace"]}
    assert set(traced) == {"inner_rotation", "inner_scale", "outer"} and {t["step"] for t in traced.values()} == {5}
    assert traced["inner_rotation"]["gradient"] > 0 and traced["inner_rotation"]["value"] > 1e-4
    begun, ended = result["diagnostics"]
    assert ended["outer_angle"] == begun["outer_angle"] and ended["inner_angle"] > begun["inner_angle"]


@pytest.mark.parametrize("method", ["full", "lora", "ssvdo"])
def test_a_run_is_tested_with_shares_of_what_it_learnt(small_whisper, monkeypatch, method):
    seen = []

    def look(self, stage, step, **more):
        weight = dict(self.model.named_parameters()).get("model.encoder.layers.0.fc1.weight")
        seen.append((step, more, weight if weight is None else weight.detach().clone()))

    monkeypatch.setattr(run.Run, "evaluate", look)
    made = run.Run({**SMALL, "method": method, "shares": [0.0, 0.25, 1.0], "rate": 0.1})
    made.result()
    (trained_at, plain, _), *between = seen
    assert (trained_at, plain) == (2, {}) and [(step, more) for step, more, _ in between] == [
        (2, {"share": 0.0}), (2, {"share": 0.25}), (2, {"share": 1.0})]  # fmt: skip
    none, some, whole = (weight for *_, weight in between)
    assert torch.equal(none, made.base.model.encoder.layers[0].fc1.weight)
    assert (whole - none).abs().max() > 1e-2
    torch.testing.assert_close(some, 0.75 * none + 0.25 * whole)


def test_tables_tell_shares_from_the_whole():
    settings = {"method": "lora", "voices": ["child"], "source": "librispeech", "shares": [0.5], "seed": 0, "rate": 1}
    spoken = {"words": [10, 10], "speakers": ["a", "b"], "step": 2}
    runs = [{"settings": settings, "evaluations": [
        {**spoken, "voice": voice, "split": split, "wer": wer, "words_wrong": [wer // 5, 0], **more}
        for wer, more in ((20, {}), (30, {"share": 0.5})) for voice, split in
        (("child", "dev"), ("child", "test"), ("librispeech", "test"))]}]  # fmt: skip
    rows = [line.split(" | ") for line in speech_report.shares(runs).splitlines()[2:]]
    assert [(row[1], row[3], row[4][:4]) for row in rows] == [("0.5", "30.0", "30.0"), ("1", "20.0", "20.0")]
    assert speech_report.between_ends(runs) == {"lora": [(30.0, 30.0, "0.5"), (20.0, 20.0, "1")]}


def test_a_run_depends_on_its_seed_alone(small_whisper):
    losses = [run.Run({**SMALL, "seed": seed}).result()["losses"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def stepped(steps=4, **how):
    """The size of each step of one number whose gradient is always 1: Adam then moves by the rate itself."""
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.zero_()
    at = [0.0]
    scores = type("", (torch.nn.Module,), {"forward": lambda self, **_: None})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loss_of", lambda model, batch: -layer.weight.sum())
        train.fine_tune(torch.nn.Sequential(layer, scores()), iter([None] * steps), steps, 1.0, quiet=True,
                        after=lambda step: at.append(layer.weight.item()), **how)  # fmt: skip
    return [round(b - a, 4) for a, b in itertools.pairwise(at)]


def test_rates_fall_to_zero_after_a_warmup_and_by_part():
    assert stepped() == [1.0, 0.75, 0.5, 0.25]
    assert stepped(warmup=2) == [0.5, 0.75, 0.5, 0.25]
    assert stepped(part_rates={"weight": 0.5}) == [0.5, 0.375, 0.25, 0.125]
    with pytest.raises(ValueError, match="part_rates names 'outr'; the model trains weight"):
        stepped(part_rates={"outr": 2.0})


class Here:
    """Runs in this process what a pool would."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        future = experiment.Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_):
        pass


def fake(settings):
    return {"settings": {**run.SETTINGS, **settings}, "evaluations": [{"voice": "x", "wer": 1.0}]}


def test_results_are_kept_resumed_and_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", Here)
    calls, prepared = [], []
    monkeypatch.setattr(experiment, "prepare", lambda *shared: prepared.append((*shared, len(calls))))

    def failing(settings):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(settings)
        return fake(settings)

    monkeypatch.setattr(experiment, "work", failing)
    described_here = described(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all([Store(described_here, tmp_path)], "full", 1, None)
    assert prepared == [("committed", "tiny.en", 6, 0)]  # once, before any run
    kept = json.loads((tmp_path / "small.json").read_text())
    assert len(kept["runs"]) == 3 and len(kept["missing"]) == 2
    monkeypatch.setattr(experiment, "work", lambda s: calls.append(s) or fake(s))
    assert run_all([Store(described_here, tmp_path)], "full", 2, None) == 0
    assert len(calls) == 5 == len({key_of(c) for c in calls})
    other = described(tmp_path, name="other")
    assert run_all([Store(other, tmp_path)], "full", 1, None) == 0 and len(calls) == 5  # the same settings: taken over
    assert json.loads((tmp_path / "other.json").read_text())["missing"] == []


def test_time_that_runs_out_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(experiment, "work", fake)
    monkeypatch.setattr(experiment, "prepare", lambda *shared: None)
    assert run_all([Store(described(tmp_path), tmp_path)], "full", 1, 0.0) == 5


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", "{}", '{"runs": []}', '{"runs": {"a": 1}}', '{"runs": {"a": {}}}', "[" * 100_000])
def test_a_damaged_results_file_is_not_overwritten(tmp_path, text):
    (tmp_path / "small.json").write_text(text)
    with pytest.raises(ValueError, match=r"small\.json is damaged"):
        Store(described(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"small\.json is damaged"):  # another experiment's, in the same folder
        run_all([Store(described(tmp_path, name="other"), tmp_path)], "full", 1, None)
    with pytest.raises(ValueError, match=r"baseline\.json is damaged"):
        report.load("baseline", (tmp_path / "small.json").rename(tmp_path / "baseline.json").parent)
    assert (tmp_path / "baseline.json").read_text() == text and not (tmp_path / "other.json").exists()


def test_a_results_file_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "small.json").mkdir()
    with pytest.raises(ValueError, match=r"small\.json: not read as text"):
        Store(described(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--workers", "0", "a whole number of at least 1"),
        ("--workers", "x", "a whole number of at least 1"),
        ("--minutes", "nan", "a finite number of at least 0"),
        ("--minutes", "-1", "a finite number of at least 0"),
        ("--minutes", "inf", "a finite number of at least 0"),
        ("--out", __file__, "a folder, or where one can be made"),
        ("--out", f"{__file__}/deep/er", "a folder, or where one can be made"),
    ],
)
def test_a_wrong_option_is_named(capsys, option, value, allowed):
    with pytest.raises(SystemExit) as error:
        main(["baseline", option, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"argument {option}: {value!r} is refused; allowed: {allowed}" in last


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--manifest", "/nope", "a file that is there"),
        ("--manifest", "/", "a file that is there"),
        ("--steps", "0", "a whole number of at least 1"),
        ("--rate", "0", "a finite number above 0"),
        ("--rate", "nan", "a finite number above 0"),
        ("--seed", str(10**30), "a whole number from 0 to 4294967295"),
        ("--adapter", __file__, "a folder, or where one can be made"),
    ],
)
def test_a_wrong_option_of_the_demo_is_named(capsys, option, value, allowed):
    with pytest.raises(SystemExit) as error:
        demo.main([option, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and f"argument {option}: {value!r} is refused; allowed: {allowed}" in last


def test_an_unknown_experiment_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"experiment 'magic' is unknown; allowed: all, attention, baseline"):
        main(["magic"])


def test_the_committed_page_is_what_the_committed_results_give(tmp_path):
    assert report.page(plots=tmp_path) == report.PAGE.read_text(encoding="utf-8")
