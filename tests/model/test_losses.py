import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.ops import box_iou

from retinaface.model.anchors import make_anchors
from retinaface.model.boxes import encode_boxes, encode_landmarks, to_xyxy
from retinaface.model.losses import (
    Targets,
    assign_targets,
    detection_loss,
    mean_over_processes,
    own_divisor,
    shared_divisor,
)

ANCHORS = make_anchors(96, 96, ((16, 32), (64, 96)), (8, 16))


def random_faces(batch, faces):
    """Faces of which some are ignored, some padding, some without landmarks, and one has no area."""
    centre, size = torch.rand(batch, faces, 2), torch.rand(batch, faces, 2) * 0.4 + 0.03
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
    boxes[0, 0, 2:] = boxes[0, 0, :2]
    labels = torch.tensor([1, 1, -1, 0])[torch.randint(4, (batch, faces))]
    labels[0, 0] = 1
    return boxes, torch.rand(batch, faces, 5, 2), torch.rand(batch, faces) < 0.5, labels


def plain_assignment(boxes, landmarks, has_landmarks, labels, anchors, threshold=0.35):
    """Picture by picture, face by face."""
    batch, count = len(boxes), len(anchors)
    anchor_labels = torch.zeros(batch, count, dtype=torch.int64)
    matches = torch.full((batch, count), -1)
    for picture in range(batch):
        iou = box_iou(boxes[picture], to_xyxy(anchors))
        for anchor in range(count):
            best = 0.0
            for face in range(len(labels[picture])):
                if labels[picture, face] != 0 and iou[face, anchor] > best and iou[face, anchor] >= threshold:
                    best = iou[face, anchor]
                    matches[picture, anchor] = face
        for label in (-1, 1):  # a real face comes last, so it wins an anchor that an ignored one would take too
            for face in range(len(labels[picture])):
                if labels[picture, face] == label:
                    matches[picture, iou[face].argmax()] = face
        for anchor in range(count):
            if matches[picture, anchor] >= 0:
                anchor_labels[picture, anchor] = labels[picture, matches[picture, anchor]]
    return anchor_labels, matches


@pytest.mark.parametrize("faces", [1, 5, 20])
def test_targets_against_a_plain_restatement(faces):
    """With 20 faces the comparison runs in two parts."""
    truth = random_faces(3, faces)
    targets = assign_targets(*truth, ANCHORS)
    labels, matches = plain_assignment(*truth, ANCHORS)
    assert torch.equal(targets.labels, labels)
    assert (labels == 1).any()
    boxes, landmarks, has_landmarks, _ = truth
    for picture, anchor in (labels == 1).nonzero().tolist():
        face = matches[picture, anchor]
        own = ANCHORS[anchor : anchor + 1]
        torch.testing.assert_close(
            targets.box_deltas[picture, anchor], encode_boxes(boxes[picture, face][None], own)[0]
        )
        torch.testing.assert_close(
            targets.landmark_deltas[picture, anchor], encode_landmarks(landmarks[picture, face][None], own)[0]
        )
        assert targets.has_landmarks[picture, anchor] == has_landmarks[picture, face]
    assert not targets.has_landmarks[labels != 1].any()
    assert all(value.isfinite().all() for value in targets)


def test_every_face_gets_an_anchor_however_small():
    boxes = torch.tensor([[[0.501, 0.501, 0.502, 0.502], [0.1, 0.1, 0.1, 0.1]]])
    targets = assign_targets(boxes, torch.zeros(1, 2, 5, 2), torch.zeros(1, 2).bool(), torch.ones(1, 2).long(), ANCHORS)
    assert (targets.labels == 1).sum() == 2


def test_ignored_faces_take_their_anchors_out_of_the_loss():
    box = to_xyxy(ANCHORS[40])[None, None]
    nothing = torch.zeros(1, 1, 5, 2), torch.ones(1, 1).bool()
    face = assign_targets(box, *nothing, torch.tensor([[1]]), ANCHORS)
    ignored = assign_targets(box, *nothing, torch.tensor([[-1]]), ANCHORS)
    padding = assign_targets(box, *nothing, torch.tensor([[0]]), ANCHORS)
    assert torch.equal(ignored.labels, -face.labels)
    assert not ignored.has_landmarks.any()
    assert face.has_landmarks.any()
    assert not padding.labels.any()


def random_outputs(batch, scale=2.0):
    count = len(ANCHORS)
    outputs = [torch.randn(batch, count, width) * scale for width in (2, 4, 10)]
    return tuple(output.requires_grad_() for output in outputs)


def plain_loss(outputs, targets):
    logits, boxes, landmarks = outputs
    classes = box_sum = landmark_sum = 0.0
    positives = with_landmarks = 0
    for picture in range(len(logits)):
        face = targets.labels[picture] == 1
        background = targets.labels[picture] == 0
        scores = F.log_softmax(logits[picture], dim=-1)
        classes += -scores[face, 1].sum()
        hardest = (-scores[background, 0]).sort(descending=True).values
        classes += hardest[: 7 * max(int(face.sum()), 1)].sum()
        box_sum += F.smooth_l1_loss(boxes[picture][face], targets.box_deltas[picture][face], reduction="sum")
        known = targets.has_landmarks[picture]
        landmark_sum += F.smooth_l1_loss(
            landmarks[picture][known], targets.landmark_deltas[picture][known], reduction="sum"
        )
        positives += int(face.sum())
        with_landmarks += int(known.sum())
    return classes / max(positives, 1), 2 * box_sum / max(positives, 1), landmark_sum / max(with_landmarks, 1)


@pytest.mark.parametrize("faces", [1, 5])
def test_loss_against_a_plain_restatement(faces):
    targets = assign_targets(*random_faces(3, faces), ANCHORS)
    outputs = random_outputs(3)
    losses = detection_loss(outputs, targets)
    for ours, theirs in zip(losses, plain_loss(outputs, targets), strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs))
    torch.testing.assert_close(losses.total, sum(losses))


def test_no_more_negatives_than_there_is_background():
    """With faces all over, seven negatives a positive are more than there are anchors."""
    targets = assign_targets(*random_faces(1, 70), ANCHORS)
    assert 8 * (targets.labels == 1).sum() > len(ANCHORS)
    outputs = random_outputs(1)
    torch.testing.assert_close(detection_loss(outputs, targets).classes, plain_loss(outputs, targets)[0])


@pytest.mark.parametrize("without", [slice(0, 1), slice(None)], ids=["one picture", "the batch"])
def test_without_faces_loss_and_gradients_are_finite(without):
    boxes, landmarks, has_landmarks, labels = random_faces(2, 3)
    labels[without] = 0
    outputs = random_outputs(2)
    losses = detection_loss(outputs, assign_targets(boxes, landmarks, has_landmarks, labels, ANCHORS))
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.classes > 0
    assert all(output.grad.isfinite().all() for output in outputs)
    assert (outputs[0].grad[without].abs().sum(dim=(1, 2)) > 0).all()  # each picture gives negatives
    assert not outputs[1].grad[without].any()


def test_gradients_stay_finite_with_ignored_and_huge_values():
    boxes, landmarks, has_landmarks, labels = random_faces(2, 5)
    outputs = random_outputs(2, scale=1e4)
    detection_loss(outputs, assign_targets(boxes, landmarks, has_landmarks, labels, ANCHORS)).total.backward()
    assert all(output.grad.isfinite().all() for output in outputs)


def test_half_precision_outputs_are_compared_in_float():
    outputs = tuple(output.detach().bfloat16() for output in random_outputs(2))
    assert detection_loss(outputs, assign_targets(*random_faces(2, 3), ANCHORS)).total.dtype == torch.float32


def test_the_hardest_are_the_same_however_many_are_looked_for(monkeypatch):
    targets, outputs = assign_targets(*random_faces(2, 70), ANCHORS), random_outputs(2)
    found = detection_loss(outputs, targets)
    monkeypatch.setattr("retinaface.model.losses._most_wanted", lambda _, anchors: anchors)  # as on a GPU
    torch.testing.assert_close(detection_loss(outputs, targets), found)


def test_nothing_waits_for_the_device(no_waiting):
    truth, outputs = random_faces(2, 70), random_outputs(2)
    with no_waiting:
        detection_loss(outputs, assign_targets(*truth, ANCHORS)).total.backward()
    with pytest.raises(AssertionError, match="waits"), no_waiting:
        truth[0][truth[3] == 1]


def test_the_profiler_sees_no_waiting(no_waiting):
    """Reading a value on the host is an operation, also inside others."""
    waits = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}
    truth, outputs = random_faces(2, 70), random_outputs(2)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        targets = assign_targets(*truth, ANCHORS)
        detection_loss(outputs, targets).total.backward()
    assert not waits & {event.key for event in profiler.key_averages()}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        int(targets.labels.max())
    assert waits & {event.key for event in profiler.key_averages()}


def test_mean_over_processes_is_the_loss_of_one_with_all_pictures(in_two_processes):
    """The first process has nearly all faces; with its own count each would weigh less than those of the second."""
    *places, labels = random_faces(4, 6)
    labels[:2], labels[2:, 1:] = 1, 0
    outputs = random_outputs(4)

    def losses(own, divisor):
        targets = assign_targets(*(value[own] for value in places), labels[own], ANCHORS)
        return torch.stack([*detection_loss(tuple(output[own] for output in outputs), targets, divisor=divisor)])

    whole = losses(slice(None), own_divisor)
    for divisor in (shared_divisor, own_divisor):
        first, second = in_two_processes(lambda own, d=divisor: losses(own, d), slice(0, 2), slice(2, 4))
        assert torch.allclose((first + second) / 2, whole) == (divisor is shared_divisor)


def test_what_is_not_a_number_in_one_process_stays_there(in_two_processes):
    first, second = in_two_processes(
        lambda own: own / shared_divisor(own), torch.tensor([torch.nan, 2.0]), torch.ones(2) * 4
    )
    assert second.tolist() == [2, pytest.approx(4 / 3)]
    assert first.isnan().tolist() == [True, False]


def test_means_over_processes_keep_what_is_not_a_number_where_it_is(in_two_processes):
    first, second = in_two_processes(mean_over_processes, torch.tensor([torch.nan, 2.0]), torch.ones(2) * 4)
    assert second.tolist() == [2, 3]
    assert first.isnan().tolist() == [True, False]
    assert first[1] == 3


def test_without_other_processes_the_own_counts_are_shared():
    counts = torch.tensor([0, 3])
    assert shared_divisor(counts).tolist() == own_divisor(counts).tolist() == [1, 3]


def test_all_runs_where_tensors_have_no_values():
    """On the meta device nothing can depend on a value."""
    truth = tuple(value.to("meta") for value in random_faces(2, 70))
    outputs = tuple(output.detach().to("meta") for output in random_outputs(2))
    targets = assign_targets(*truth, ANCHORS.to("meta"))
    assert isinstance(targets, Targets)
    assert detection_loss(outputs, targets).total.shape == ()
