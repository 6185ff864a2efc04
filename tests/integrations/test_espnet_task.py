"""ESPnet's own ASR task on generated audio: train, resume, average, decode; `nox -s espnet` installs what it needs."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

for package in ("espnet2", "librosa", "kaldiio", "configargparse", "hydra", "tacotron_cleaner", "soundfile"):
    pytest.importorskip(package, reason=f"{package} is not installed; nox -s espnet has all that ESPnet needs")
import soundfile
import yaml

HOME = Path(__file__).parents[2]
STAND_INS = []  # imported by ESPnet, called by nothing here: torchaudio's wheels need CUDA, newer pip refuses ci_sdr
for package, parts in (("torchaudio", ("", ".compliance", ".compliance.kaldi")), ("ci_sdr", ("",))):
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        sys.modules.update({package + part: types.ModuleType(package + part) for part in parts})
        STAND_INS += [package + part for part in parts]
from espnet2.bin.asr_inference import Speech2Text
from espnet2.tasks.asr import ASRTask
from espnet2.train import trainer

import ssvdo_kernels.integrations.espnet as integration
from ssvdo_kernels import BaseMismatchError

LETTERS = {"A": 300, "B": 900, "C": 2100}
TOKENS = ["<blank>", "<unk>", *LETTERS, "<sos/eos>"]
CONFIG = {
    "ngpu": 0, "num_workers": 0, "seed": 1, "log_level": "WARNING", "use_matplotlib": False, "use_tensorboard": False,
    "token_type": "char", "token_list": TOKENS, "batch_type": "unsorted", "batch_size": 4, "num_att_plot": 0,
    "encoder": "e_branchformer", "decoder": "transformer", "normalize": "utterance_mvn", "frontend_conf": {"fs": 16000},
    "encoder_conf": {"output_size": 16, "attention_heads": 2, "linear_units": 40, "cgmlp_linear_units": 32,
                     "num_blocks": 1, "use_ffn": True, "macaron_ffn": True, "rel_pos_type": "latest"},
    "decoder_conf": {"attention_heads": 2, "linear_units": 40, "num_blocks": 1}, "model_conf": {"ctc_weight": 0.3},
    "optim": "adam", "optim_conf": {"lr": 0.02, "weight_decay": 0.0},
    "keep_nbest_models": 2, "best_model_criterion": [["valid", "loss", "min"]]}  # fmt: skip
ADAPTER = {"use_adapter": True, "adapter": "lora", "adapter_conf": {
    "adapter_type": "ssvdo", "rank": 0, "alpha": 0, "dropout_rate": 0.1, "inner_ratio": 0.5, "outer_rank": 4,
    "target_modules": "myst"}}  # fmt: skip


class NewerLora:
    """How newer versions choose what adapter_only saves."""

    @staticmethod
    def lora_state_dict(model):
        names = {name for name, _ in model.named_parameters() if "lora_" in name}
        return {name: t for name, t in model.state_dict().items() if name in names}


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """A folder as the recipes' data stages leave it: wav.scp, text, and the lengths."""
    folder = tmp_path_factory.mktemp("dump")
    torch.manual_seed(0)
    lines = {"wav.scp": [], "text": [], "speech_shape": [], "text_shape": []}
    for i in range(12):
        said = [list(LETTERS)[j] for j in torch.randint(0, len(LETTERS), (3,)).tolist()]
        time = torch.arange(3200) / 16_000
        samples = torch.cat([0.3 * torch.sin(6.2832 * LETTERS[letter] * time) for letter in said])
        soundfile.write(folder / f"u{i}.wav", (samples + 0.01 * torch.randn(samples.shape)).numpy(), 16_000)
        for name, value in zip(lines, (folder / f"u{i}.wav", "".join(said), len(samples), len(said)), strict=True):
            lines[name].append(f"u{i} {value}")
    for name, rows in lines.items():
        (folder / name).write_text("\n".join(rows) + "\n")
    return folder


def task(dump, out, **more):
    """One run of ASRTask; out holds its config.yaml and checkpoints."""
    out.mkdir(exist_ok=True)
    (out / "given.yaml").write_text(yaml.safe_dump({**CONFIG, **more}))
    data = [f"--{split}_{what}={dump}/{value}" for split in ("train", "valid") for what, value in (
        ("data_path_and_name_and_type", "wav.scp,speech,sound"), ("data_path_and_name_and_type", "text,text,text"),
        ("shape_file", "speech_shape"), ("shape_file", "text_shape"))]  # fmt: skip
    ASRTask.main(cmd=["--config", f"{out}/given.yaml", f"--output_dir={out}", *data])


@pytest.fixture(scope="module")
def base(dump, tmp_path_factory):
    """A model that was trained without an adapter, for an epoch."""
    out = tmp_path_factory.mktemp("base")
    task(dump, out, max_epoch=1)
    return out / "1epoch.pth"


def texts(dump, config, model):
    """What every recording is heard as, with the score of the best path."""
    hear = Speech2Text(str(config), None if model is None else str(model), beam_size=2, ctc_weight=0.3)
    found = []
    for i in range(12):
        text, _, _, path = hear(soundfile.read(dump / f"u{i}.wav", dtype="float32")[0])[0]
        found.append((text, round(float(path.score), 3)))
    return found


@pytest.mark.parametrize("strategy, newest", [("all", False), ("adapter_only", False), ("adapter_only", True),
                                              ("required_grad_only", False)])  # fmt: skip
def test_training_resumes_averages_and_decodes(dump, base, tmp_path, monkeypatch, strategy, newest):
    if newest:
        monkeypatch.setattr(trainer, "lora", NewerLora)
    more = {**ADAPTER, "save_strategy": strategy, "init_param": [str(base)]}
    task(dump, tmp_path, max_epoch=2, **more)
    task(dump, tmp_path, max_epoch=3, resume=True, **more)
    pretrained, average = torch.load(base), tmp_path / "valid.loss.ave_2best.pth"
    state = torch.load(average)
    adapted = {key.removesuffix("lora_adapter.inner_scale") for key in state if key.endswith("inner_scale")}
    assert len(adapted) == 23 and any(bool(state[f"{name}lora_adapter.inner_scale"].any()) for name in adapted)
    assert (strategy == "all") == ("ctc.ctc_lo.weight" in state)
    if strategy == "all":
        assert all(torch.equal(state[key], t) for key, t in pretrained.items())
    else:
        with pytest.raises(BaseMismatchError, match="trained on other base weights than this model's"):
            texts(dump, tmp_path / "config.yaml", average)
    whole = tmp_path / "whole.pth"  # what docs/espnet.md says of a file that lacks the base
    torch.save({**pretrained, **state}, whole)
    want = texts(dump, tmp_path / "config.yaml", whole)
    assert want != texts(dump, base.parent / "config.yaml", base)

    model, _ = ASRTask.build_model_from_file(tmp_path / "config.yaml", whole)
    torch.save(integration.plain_state_dict(model), tmp_path / "plain.pth")
    assert texts(dump, base.parent / "config.yaml", tmp_path / "plain.pth") == want


def test_the_command_line_decodes_through_the_launcher(dump, base, tmp_path):
    task(dump, tmp_path, max_epoch=1, **ADAPTER, init_param=[str(base)])
    for name in STAND_INS:
        path = tmp_path / "stand_ins" / name.replace(".", "/")
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("")
    config, model, heard = tmp_path / "config.yaml", tmp_path / "1epoch.pth", tmp_path / "heard"
    options = ["--data_path_and_name_and_type", f"{dump}/wav.scp,speech,sound", "--asr_train_config", config,
               "--asr_model_file", model, "--output_dir", heard, "--beam_size", "2", "--ctc_weight", "0.3",
               "--ngpu", "0", "--num_workers", "0"]  # fmt: skip
    path = f"{HOME}:{tmp_path / 'stand_ins'}"
    done = {}
    for launcher in ([], ["-m", "ssvdo_kernels.integrations.espnet.run"]):
        done[len(launcher)] = subprocess.run(
            [sys.executable, *launcher, "-m", "espnet2.bin.asr_inference", *map(str, options)], text=True,
            capture_output=True, env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done[0].returncode and "adapter_type" in done[0].stderr  # not as if there were no adapter
    assert not done[2].returncode, done[2].stderr
    lines = (heard / "1best_recog" / "text").read_text().splitlines()
    want = {f"u{i}": text for i, (text, _) in enumerate(texts(dump, config, model))}
    assert dict(line.partition(" ")[::2] for line in lines) == want
