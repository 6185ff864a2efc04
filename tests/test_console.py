"""Commands on consoles that cannot show a name, and in places whose name is outside of ASCII."""

import io
import os
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, diagnose, save_ssvdo
from ssvdo_kernels.cli import main
from ssvdo_kernels.console import tabulate

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(*command, **variables):
    """A command in a process of its own; text that is written in the wrong encoding is an error there."""
    switches = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:ssvdo_kernels"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    done = subprocess.run([sys.executable, *switches, *map(str, command)], capture_output=True, cwd=HERE,
                          env=environment | variables)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name, console", [("na\u00efve \u65e5\u672c", {"PYTHONIOENCODING": "ascii"}),
                                           ("na\u00efve [red]x[/]", {"LC_ALL": "C"})], ids=ascii)  # fmt: skip
def test_commands_end_well(tmp_path, name, console):
    folder = tmp_path / name
    (folder / "base").mkdir(parents=True)
    model = nn.ModuleDict({"fc1": nn.Linear(4, 12)})
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    torch.save(model.state_dict(), folder / "model.pth")
    save_ssvdo(apply_ssvdo(model, SSVDOConfig(outer_rank=2)), folder / "adapter")
    code = "import sys; from ssvdo_kernels.cli import main; print([main(a.split(';')) for a in sys.argv[1:]])"
    commands = (f"plan;{folder / 'base'};--outer-rank;2", f"inspect;{folder / 'adapter'}",
                f"merge;{folder / 'base'};{folder / 'adapter'};--out;{folder / 'out'}",
                f"merge;{folder / 'model.pth'};{folder / 'adapter'};--out;{folder / 'out2'}")  # fmt: skip
    printed = run("-c", code, *commands, **console)
    assert (folder / "out" / "model.safetensors").is_file() and (folder / "out2" / "model.pth").is_file()
    assert printed.count(b"wrote") == 2 and b"[0, 0, 0, 0]" in printed
    assert ("[" in name) == (b"[red]x[/]/adapter" in printed)


@pytest.mark.parametrize("package", ["benchmarks", "examples"])
def test_commands_beside_the_package_print_anything(package):
    assert run("-c", f"import {package}; print('\u65e5', '\\udcff')", PYTHONIOENCODING="ascii") == b"\\u65e5 \\udcff\n"


@pytest.fixture
def files(tmp_path):
    """Commands of a small model, by name."""
    model = nn.ModuleDict({"fc1": nn.Linear(4, 12)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_ssvdo(apply_ssvdo(model, SSVDOConfig(outer_rank=2)), tmp_path / "adapter")
    base, adapter, out = (str(tmp_path / name) for name in ("model.safetensors", "adapter", "out"))
    return {"plan": ["ssvdo_kernels.cli", "plan", base, "--outer-rank", "2"], "info": ["ssvdo_kernels.info"],
            "inspect": ["ssvdo_kernels.cli", "inspect", adapter],
            "merge": ["ssvdo_kernels.cli", "merge", base, adapter, "--out", out]}  # fmt: skip


@pytest.mark.parametrize("stdout", ["full", "closed", "pipe"])
@pytest.mark.parametrize("command", ["plan", "inspect", "merge", "info"])
def test_a_stdout_that_cannot_be_written(files, tmp_path, command, stdout):
    """A full one is an error of one line; one that is closed, or that nobody reads to the end, is none."""
    redirected = {"full": ">/dev/full", "closed": ">&-", "pipe": "| true"}[stdout]
    script = f'set -o pipefail; exec 3>&1; "$@" {redirected}'
    done = subprocess.run(["bash", "-c", script, "bash", sys.executable, "-m", *files[command]], capture_output=True,
                          cwd=HERE, text=True)  # fmt: skip
    assert done.returncode == (stdout == "full"), done.stderr
    if stdout != "full":
        assert not done.stderr and not done.stdout
    else:
        assert "stdout cannot be written: No space left on device" in done.stderr and done.stderr.count("\n") == 1
    if command == "merge":
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert (f"{tmp_path / 'out'} is written all the same" in done.stderr) == (stdout == "full")


def test_a_name_is_no_markup(tmp_path):
    folder = tmp_path / ":smile:"
    folder.mkdir()
    save_file({"fc1.weight": torch.ones(12, 4)}, folder / "model.safetensors")
    assert b":smile:" in run("-m", "ssvdo_kernels.cli", "plan", folder, "--outer-rank", "2")


def test_a_name_that_libraries_cannot_open_is_refused(files, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    shutil.copy(tmp_path / "model.safetensors", folder)
    with open(f"{folder}/model.pth", "wb") as file:
        torch.save({"fc1.weight": torch.ones(12, 4)}, file)
    out = str(tmp_path / "out")
    for command in (["merge", f"{folder}/model.safetensors", str(tmp_path / "adapter"), "--out", out],
                    ["merge", f"{folder}/model.pth", str(tmp_path / "adapter"), "--out", out], ["inspect", folder]):
        done = subprocess.run([sys.executable, "-m", "ssvdo_kernels.cli", *command], capture_output=True, cwd=HERE,
                              text=True)  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "/\\udcff" in done.stderr and "not UTF-8" in done.stderr, done.stderr


NAME = "model.encoder.layers.11.feed_forward_macaron.w_1"
ROW = [NAME, "1024 -> 4096", "1,967,616", *map(str, range(100_001, 100_009))]


@pytest.mark.parametrize("width", [30, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_no_table_is_cut(width, terminal):
    text = io.StringIO()
    headings = ["layer", "shape", "trained", *(f"heading {i}" for i in range(8))]
    tabulate(Console(file=text, width=width, force_terminal=terminal, no_color=True), "of [b]", headings, [ROW, ROW])
    lines = text.getvalue().splitlines()
    assert all(text.getvalue().count(cell) >= 2 for cell in ROW) and "of [b]" in text.getvalue()
    assert "\u2026" not in text.getvalue()
    if not terminal:
        assert sum(all(cell in line for cell in ROW) for line in lines) == 2
    elif width == 80:
        assert max(map(len, lines)) <= 80 and not any(line.endswith("heading") for line in lines)


def test_what_is_printed_of_a_model_at_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = nn.ModuleDict({NAME.replace(".", "_"): nn.ModuleDict({"fc1": nn.Linear(8, 24)})})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert main(["plan", str(tmp_path), "--outer-rank", "2"]) == 0
    save_ssvdo(apply_ssvdo(model, SSVDOConfig(outer_rank=2)), tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    for terminal in (True, False):
        text = io.StringIO()
        diagnose(model, console=Console(file=text, force_terminal=terminal))
        assert f"{NAME.replace('.', '_')}.fc1" in text.getvalue() and "\u2026" not in text.getvalue()
    shown = capsys.readouterr().out
    assert shown.count(f"{NAME.replace('.', '_')}.fc1") == 2 and "\u2026" not in shown
    assert "prepared, MB" in shown and "dtype of W0" in shown


def test_version_and_help_say_what_words_mean(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command, words in (("--version", ["ssvdo_kernels 0.1.0"]), ("--help", ["plan", "export-lora"]),
                           ("plan --help", ["p   ", "k   ", "l   ", "folded", "prepared", "--inner-ratio"])):
        with pytest.raises(SystemExit, match="0"):
            main(command.split())
        shown = capsys.readouterr().out
        assert all(word in shown for word in words)
        assert max(map(len, shown.splitlines())) <= 80
