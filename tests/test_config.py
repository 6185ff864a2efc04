"""Every bad value is refused by name; sizes and budgets."""

import pytest

from ssvdo_kernels.config import LayerShape, SSVDOConfig


@pytest.mark.parametrize("name, value", [
    ("inner_ratio", 0), ("inner_ratio", -0.1), ("inner_ratio", 1.01), ("inner_ratio", float("nan")),
    ("inner_ratio", True), ("inner_ratio", "half"), ("outer_rank", -1), ("outer_rank", 1.5), ("outer_rank", True),
    ("tau", 0), ("tau", -1e-3), ("tau", float("inf")), ("init_angle", -1), ("init_angle", float("nan")),
    ("neumann_terms", 0), ("outer_scale", 0), ("outer_scale", -1.0), ("outer_scale", "wide"),
    ("rotation", "givens"), ("outer", "none"), ("orientation", "left"), ("path", "fast"), ("backend", "cuda"),
    ("target_modules", 3), ("exclude_modules", [1, 2]),
])  # fmt: skip
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.*allowed: "):
        SSVDOConfig(**{name: value})


def test_dictionary_round_trip():
    config = SSVDOConfig(inner_ratio=0.3, outer_scale=1.0, target_modules=["fc1", "fc2"], exclude_modules="x.*")
    assert SSVDOConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown config keys \['colour'\]"):
        SSVDOConfig.from_dict({"colour": 1})


def test_budgets_of_the_papers():
    assert LayerShape.of(4096, 1024, SSVDOConfig(inner_ratio=0.5, outer_rank=64)).parameters == 327_936
    assert LayerShape.of(1024, 4096, SSVDOConfig(inner_ratio=0.5, outer_rank=64)).parameters == 327_936
    shape = LayerShape.of(1024, 1024, SSVDOConfig(inner_ratio=0.4, outer_rank=0))
    assert shape.k == 409 and 380 * shape.parameters == 31_861_100  # OWSM-1B, SSVD


def test_smallest_and_largest_sizes():
    assert LayerShape.of(100, 10, SSVDOConfig(inner_ratio=0.01, outer_rank=0)).k == 1
    assert LayerShape.of(100, 10, SSVDOConfig(inner_ratio=1.0, outer_rank=10)).width == 10
    with pytest.raises(ValueError, match=r"outer_rank=11 .* 100 x 10; .*min\(d, c\) = 10"):
        LayerShape.of(100, 10, SSVDOConfig(outer_rank=11))
    with pytest.raises(ValueError, match=r"outer_rank=3 .*min\(d, c\) = 2"):
        LayerShape.of(12, 10, SSVDOConfig(outer_rank=3))
    with pytest.raises(ValueError, match="empty"):
        LayerShape.of(0, 10, SSVDOConfig())


def test_orientation():
    def transposed(m, n, orientation):
        return LayerShape.of(m, n, SSVDOConfig(outer_rank=0, orientation=orientation)).transposed

    assert [transposed(8, 4, "auto"), transposed(4, 8, "auto"), transposed(4, 4, "auto")] == [False, True, False]
    assert transposed(4, 4, "output") and not transposed(4, 4, "input")
    assert not transposed(8, 4, "input") and transposed(4, 8, "output")
    with pytest.raises(ValueError, match="orientation='output' does not fit a weight of 8 x 4"):
        transposed(8, 4, "output")
