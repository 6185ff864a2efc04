"""The differentiable operations of an SSVD-O layer: preparation, the small-side transforms, the adapted linear map."""
