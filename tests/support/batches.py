"""Comparison of micro-batches, to the bit."""


def same(one, other):
    """Assert that two micro-batches have the same tensors."""
    assert (one.teacher is None) == (other.teacher is None)
    for mine, theirs in [(one.student, other.student), *([(one.teacher, other.teacher)] if one.teacher else [])]:
        assert mine.inputs.keys() == theirs.inputs.keys()
        for name, tensor in mine.inputs.items():
            assert tensor.dtype == theirs.inputs[name].dtype
            assert tensor.equal(theirs.inputs[name]), name
        for name in ("positions", "images", "image_tokens", "image_positions", "image_counts"):
            assert getattr(mine, name).equal(getattr(theirs, name)), name
        assert mine.tokens == theirs.tokens
    for name in ("targets", "distilled", "sample_of"):
        assert getattr(one, name).equal(getattr(other, name)), name
    assert (one.samples, one.images, one.origins) == (other.samples, other.images, other.origins)
