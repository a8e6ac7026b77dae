import math

import pytest
import torch

from retinaface.model.anchors import make_anchors


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 50)])
def test_anchors_against_loops(height, width):
    sizes, strides = ((16, 32), (64,)), (8, 16)
    expected = []
    for level, stride in zip(sizes, strides, strict=True):
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                for size in level:
                    x, y = (column + 0.5) * stride / width, (row + 0.5) * stride / height
                    expected.append([x, y, size / width, size / height])
    torch.testing.assert_close(make_anchors(height, width, sizes, strides), torch.tensor(expected))


def test_anchors_are_made_once():
    assert make_anchors(32, 32, ((16,),), (8,)) is make_anchors(32, 32, ((16,),), (8,))
