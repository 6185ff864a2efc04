"""Commands on consoles that cannot show a name, and in places whose name is outside of ASCII."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, save_ssvdo

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
