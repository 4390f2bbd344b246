"""Rotary embedding: exact properties, and the factors of the reference."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import golden, rel_l2
from wan.nets.rope import apply_rope, grid_positions, rope_angles


def rotate(x, positions):
    angles = rope_angles(positions)
    return apply_rope(x, angles.cos().float(), angles.sin().float())


def test_positions_follow_the_token_order_frame_row_column():
    positions = grid_positions(torch.tensor([[0, 8], [5, 2]]), height=2, width=3)
    expected = [[[t, row, col] for t in times for row in range(2) for col in range(3)] for times in ([0, 8], [5, 2])]
    assert positions.tolist() == expected


def test_angles_are_the_position_times_the_frequency_of_each_pair():
    (angles,) = rope_angles(torch.tensor([[3, 5, 7]]))
    assert angles.shape == (64,)
    assert angles.dtype == torch.float64
    for axis, (start, dim, position) in enumerate([(0, 44, 3), (22, 42, 5), (43, 42, 7)]):
        for j in (0, 1, dim // 2 - 1):
            assert float(angles[start + j]) == pytest.approx(position * 10_000 ** (-2 * j / dim), rel=1e-12), axis


def test_a_rotation_is_a_multiplication_of_complex_numbers_and_keeps_the_norm():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 128)
    positions = torch.randint(0, 5000, (2, 5, 3))
    factors = torch.polar(torch.ones(1, dtype=torch.float64), rope_angles(positions))[:, :, None]
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * factors).flatten(-2)
    rotated = rotate(x, positions)
    assert rel_l2(rotated, expected) < 1e-6
    assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("shift", [[1, 0, 0], [0, 4, 9], [3000, 2, 1]])
def test_scores_depend_on_relative_positions_only(shift):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 128)
    at_q, at_k = torch.tensor([[[2, 3, 4]]]), torch.tensor([[[9, 1, 0]]])
    score = (rotate(q, at_q) * rotate(k, at_k)).sum()
    moved = (rotate(q, at_q + torch.tensor(shift)) * rotate(k, at_k + torch.tensor(shift))).sum()
    assert_close(moved, score, rtol=1e-4, atol=1e-4)
    assert abs(score - (q * k).sum()) > 0.1


def test_position_zero_changes_nothing_and_the_dtype_stays():
    x = torch.randn(1, 2, 1, 128).bfloat16()
    assert torch.equal(rotate(x, torch.zeros(1, 2, 3, dtype=torch.long)), x)


@pytest.mark.parametrize(
    ("name", "times", "height", "width"),
    [("natural_2_2_3", [0, 1], 2, 3), ("0_8_2_2_3", [0, 8], 2, 3), ("0_5_10_3_2_2", [0, 5, 10], 2, 2)],
)
def test_factors_match_the_reference(name, times, height, width):
    reference = golden("rope")
    (angles,) = rope_angles(grid_positions(torch.tensor([times]), height, width))
    assert rel_l2(angles.cos(), reference[f"{name}_real"][:, 0]) < 1e-12
    assert rel_l2(angles.sin(), reference[f"{name}_imag"][:, 0]) < 1e-12


def test_angles_match_the_tables_of_the_reference():
    reference = golden("rope")
    for name, rows in (("first64", torch.arange(64)), ("rows", torch.tensor([100, 500, 1023]))):
        angles = rope_angles(rows[:, None].expand(-1, 3))
        assert rel_l2(angles.cos(), reference[f"table_real_{name}"]) < 1e-12
        assert rel_l2(angles.sin(), reference[f"table_imag_{name}"]) < 1e-12


def test_rotated_values_match_the_reference():
    reference = golden("rope")
    positions = grid_positions(torch.tensor([[0, 8]]), 2, 3)
    assert rel_l2(rotate(reference["x"], positions), reference["x_rotated_0_8"]) < 1e-6
