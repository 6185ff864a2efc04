"""Trained checkpoints of ESPnet's SSVD, by its equations written out; no ESPnet is needed."""

import pytest
import torch

from ssvdo_kernels.integrations.espnet import from_espnet_ssvd


def ssvd_checkpoint(rows, columns, k, merged, rank=None, rotation_map="linear"):
    """A checkpoint by ESPnet's formulas, and the weight that it means."""
    torch.manual_seed(0)
    tall = torch.randn(max(rows, columns), min(rows, columns), dtype=torch.float64)
    if rank is not None:
        tall = tall[:, :rank] @ torch.randn(rank, tall.shape[1], dtype=torch.float64)
    u, s, v = torch.linalg.svd(tall, full_matrices=False)
    delta, gate, packed = torch.randn(k) * 0.3, torch.tensor([0.7]), 0.1 * torch.randn(k * (k - 1) // 2)
    i, j = torch.triu_indices(k, k, 1)
    S, eye = torch.zeros(k, k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
    S[i, j] -= packed.double()
    S[j, i] += packed.double()
    A = eye + 2 * S if rotation_map == "linear" else torch.linalg.solve(eye - S, eye + S)
    sigma = s.clone()
    sigma[:k] += (delta * torch.sigmoid(gate)).double()
    turned = torch.cat([A @ v[:k], v[k:]])
    meant, base = (u * sigma) @ turned, tall
    if rows < columns:
        meant, base = meant.mT, base.mT
    tensors = {"u": u.float(), "v": v.float(), "s_pre": s.float(), "s": delta, "gate": gate, "K_vec": packed,
               "weight": (meant if merged else base).float().contiguous(), "bias": torch.randn(rows),
               "svd_initialized": torch.tensor(True), "K_triu_idx": torch.stack([i, j])}  # fmt: skip
    return {f"encoder.w.{name}": t for name, t in tensors.items()}, meant


@pytest.mark.parametrize("rows, columns, k, rank", [
    (24, 8, 4, None), (8, 24, 4, None), (10, 10, 10, None), (24, 8, 1, None), (24, 8, 5, 3), (8, 24, 8, 6)])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("rotation_map", ["linear", "cayley"])
def test_a_trained_ssvd_checkpoint_gives_the_same_outputs(rows, columns, k, rank, merged, rotation_map):
    state, meant = ssvd_checkpoint(rows, columns, k, merged, rank, rotation_map)
    made = from_espnet_ssvd(state, rotation_map)
    assert made["encoder.w"].adapter.factors.null == (0 if rank is None else k - rank)
    assert set(made) == {"encoder.w"} and made["encoder.w"].adapter.shape.k == k
    x = torch.randn(5, columns)
    want = x.double() @ meant.mT + state["encoder.w.bias"].double()
    assert torch.allclose(made["encoder.w"](x).double(), want, atol=1e-4)
    made["encoder.w"].merge()
    assert torch.allclose(made["encoder.w"](x).double(), want, atol=1e-4)


def test_what_is_no_ssvd_checkpoint_is_refused():
    state, _ = ssvd_checkpoint(24, 8, 4, True)
    with pytest.raises(ValueError, match="no ESPnet SSVD layer"):
        from_espnet_ssvd({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"stands without \['gate'\]"):
        from_espnet_ssvd({k: v for k, v in state.items() if "gate" not in k})
    with pytest.raises(ValueError, match="before the layer was factorised"):
        from_espnet_ssvd({**state, "encoder.w.svd_initialized": torch.tensor(False)})


@pytest.mark.parametrize("rotation_map, other", [("linear", "cayley"), ("cayley", "linear")])
def test_a_weight_that_was_merged_with_the_other_map_is_refused(rotation_map, other):
    state, _ = ssvd_checkpoint(24, 8, 4, True, rotation_map=rotation_map)
    with pytest.raises(ValueError, match=rf"w\.weight was merged with rotation_map='{rotation_map}', not '{other}'"):
        from_espnet_ssvd(state, other)
    with pytest.raises(ValueError, match=r"rotation_map='expm' is unknown; allowed: 'linear', 'cayley'"):
        from_espnet_ssvd(state, "expm")
