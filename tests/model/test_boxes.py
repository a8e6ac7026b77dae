import torch
from torchvision.ops import box_iou

from retinaface.model.anchors import make_anchors
from retinaface.model.boxes import (
    decode_boxes,
    decode_landmarks,
    encode_boxes,
    encode_landmarks,
    pairwise_iou,
    to_xyxy,
)

ANCHORS = make_anchors(64, 96, ((16, 32), (64, 128)), (8, 16))


def random_boxes(*shape):
    centre, size = torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.01
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def test_centre_and_size_become_corners():
    torch.testing.assert_close(to_xyxy(torch.tensor([2.0, 5.0, 4.0, 6.0])), torch.tensor([0.0, 2.0, 4.0, 8.0]))


def test_iou_is_that_of_torchvision():
    boxes, anchors = random_boxes(3, 7), to_xyxy(ANCHORS)
    boxes[0, 0] = anchors[5]
    boxes[1, 1, 2:] = boxes[1, 1, :2]  # no area
    expected = torch.stack([box_iou(picture, anchors) for picture in boxes])
    torch.testing.assert_close(pairwise_iou(boxes, anchors), expected)


def test_decoding_undoes_encoding():
    boxes = random_boxes(2, len(ANCHORS))
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, ANCHORS), ANCHORS), boxes, rtol=1e-4, atol=1e-5)
    landmarks = torch.rand(2, len(ANCHORS), 5, 2)
    deltas = encode_landmarks(landmarks, ANCHORS)
    assert deltas.shape == (2, len(ANCHORS), 10)
    torch.testing.assert_close(decode_landmarks(deltas, ANCHORS), landmarks, rtol=1e-4, atol=1e-5)


def test_deltas_are_those_of_ssd():
    """Offset of the centre by a tenth of the anchor: 1; twice the size: log(2) / 0.2."""
    anchor = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = to_xyxy(torch.tensor([[0.52, 0.46, 0.4, 0.4]]))
    expected = torch.tensor([[1.0, -1.0, 3.4657, 0.0]])
    torch.testing.assert_close(encode_boxes(box, anchor), expected, rtol=1e-4, atol=1e-4)
    landmarks = torch.tensor([0.52, 0.46]).expand(1, 5, 2)
    torch.testing.assert_close(
        encode_landmarks(landmarks, anchor), torch.tensor([[1.0, -1.0] * 5]), rtol=1e-4, atol=1e-4
    )


def test_boxes_without_area_have_finite_deltas():
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]).expand(1, len(ANCHORS), 4)
    assert encode_boxes(boxes, ANCHORS).isfinite().all()
