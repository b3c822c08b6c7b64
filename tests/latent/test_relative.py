from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_atm.latent import EmbeddingSet, RelativeProjector, linear_cka

from .reference import relative


@pytest.fixture
def space():
    return EmbeddingSet("a", list(range(30)), torch.randn(30, 7, dtype=torch.float64))


def test_coordinates_are_cosines_to_the_anchors_in_their_order(space):
    anchors = [4, 0, 17, 9]
    found = RelativeProjector(anchors).fit(space).transform(space.embeddings)
    rows = space.embeddings.double().numpy()
    np.testing.assert_allclose(found, relative(rows, rows[anchors]), atol=1e-6)
    assert found.dtype == torch.float32


def test_rotation_and_scale_change_nothing(space):
    anchors = [4, 0, 17, 9]
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    moved = EmbeddingSet("b", space.ids, 300 * space.embeddings.double() @ turn)
    found = [RelativeProjector(anchors).fit(s).transform(s.embeddings) for s in (space, moved)]
    assert float((found[0] - found[1]).abs().max()) < 1e-5


def test_permuted_anchors_permute_columns_and_keep_cka(space):
    anchors, order = [4, 0, 17, 9], [2, 0, 3, 1]
    found = RelativeProjector(anchors).fit(space).transform(space.embeddings)
    other = RelativeProjector([anchors[i] for i in order]).fit(space).transform(space.embeddings)
    torch.testing.assert_close(other, found[:, order])
    assert linear_cka(found, space.embeddings) == pytest.approx(linear_cka(other, space.embeddings), abs=1e-9)


def test_chunks_change_nothing_and_inputs_stay(space):
    projector = RelativeProjector([1, 2, 3]).fit(space)
    before = space.embeddings.clone()
    torch.testing.assert_close(
        projector.transform(space.embeddings, chunk_size=4), projector.transform(space.embeddings), rtol=0, atol=1e-6
    )
    assert torch.equal(space.embeddings, before)
    assert projector.transform(space.embeddings[:0]).shape == (0, 3)


def test_lengths_beyond_float32_squares_are_no_trouble(space):
    anchors = [4, 0, 17]
    found = RelativeProjector(anchors).fit(space).transform(space.embeddings)
    for factor in (1e-30, 1e30):
        scaled = EmbeddingSet("b", space.ids, space.embeddings.double() * factor)
        torch.testing.assert_close(
            RelativeProjector(anchors).fit(scaled).transform(scaled.embeddings), found, rtol=0, atol=1e-5
        )


def test_standardised_dimensions(space):
    rows = space.embeddings.double().numpy().copy()
    rows[:, 2] = 5.0
    flat = EmbeddingSet("a", space.ids, rows)
    rows = flat.embeddings.double().numpy()
    deviation = rows.std(0)
    deviation[2] = 1
    prepared = (rows - rows.mean(0)) / deviation
    found = RelativeProjector([4, 0, 17], standardize=True).fit(flat).transform(flat.embeddings)
    np.testing.assert_allclose(found, relative(prepared, prepared[[4, 0, 17]]), atol=1e-5)


def test_bad_input_is_one_sentence(space):
    with pytest.raises(ValueError, match="1 anchors were given; relative coordinates need at least two"):
        RelativeProjector([3])
    with pytest.raises(ValueError, match="The anchors 3 occur more than once"):
        RelativeProjector([3, 4, 3])
    with pytest.raises(KeyError, match="the space 'a' lacks the ids 77; embed these samples too"):
        RelativeProjector([3, 77]).fit(space)
    with pytest.raises(ValueError, match="call fit"):
        RelativeProjector([3, 4]).transform(space.embeddings)
    projector = RelativeProjector([3, 4]).fit(space)
    with pytest.raises(ValueError, match=r"shape \(30, 6\), and the projector was fitted to a width of 7"):
        projector.transform(space.embeddings[:, :6])
    rows = space.embeddings.clone()
    rows[4] = 0
    with pytest.raises(ValueError, match="the space 'a' is zero at the ids 4, where a cosine means nothing"):
        RelativeProjector([3, 4]).fit(EmbeddingSet("a", space.ids, rows))
    with pytest.raises(ValueError, match="The space is zero at the rows 4,"):
        projector.transform(rows)
