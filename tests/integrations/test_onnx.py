"""ONNX by both exporters: what is exported gives the layer's outputs, and what cannot be says what can."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from ssvdo_kernels import SSVDOConfig, apply_ssvdo, remove_ssvdo

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
    apply_ssvdo(model, SSVDOConfig(outer_rank=4, target_modules=("0", "2")))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1)
    return model.eval()


def exported(model, file, dynamo):
    torch.onnx.export(model, (X,), file, dynamo=dynamo)
    session = runtime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo, merged", [(False, False), (False, True), (True, True)])
def test_what_is_exported_gives_the_same_outputs(tmp_path, dynamo, merged):
    model = net()
    want = model(X).detach()
    made = remove_ssvdo(model, merge=True) if merged else model
    torch.testing.assert_close(exported(made, str(tmp_path / "model.onnx"), dynamo), want)


@pytest.mark.filterwarnings("ignore")
def test_the_newer_exporter_says_what_does_where_the_layer_is_not_merged(tmp_path):
    with pytest.raises(Exception, match=r"dynamo=False, or remove_ssvdo\(model, merge=True\) first"):
        exported(net(), str(tmp_path / "model.onnx"), True)
