import pytest
import torch

from retinaface.compression.distillation import distillation_loss, logit_distillation


def random_outputs():
    return torch.randn(2, 50, 2) * 2, torch.randn(2, 50, 4), torch.randn(2, 50, 10)


def test_nothing_to_learn_from_oneself():
    outputs = random_outputs()
    losses = distillation_loss(outputs, outputs)
    assert losses.total.item() == pytest.approx(0, abs=1e-6)


def test_every_part_notices_its_own_difference():
    teacher = random_outputs()
    for index in range(3):
        student = list(teacher)
        student[index] = random_outputs()[index]
        losses = distillation_loss(tuple(student), teacher)
        assert [loss.item() > 1e-3 for loss in losses] == [index == part for part in range(3)]


def test_gradients_reach_the_student_only():
    student = tuple(output.requires_grad_() for output in random_outputs())
    teacher = tuple(output.requires_grad_() for output in random_outputs())
    distillation_loss(student, tuple(output.detach() for output in teacher)).total.backward()
    assert all(output.grad.abs().sum() > 0 for output in student)
    assert all(output.grad is None for output in teacher)


def test_boxes_are_learnt_only_where_the_teacher_is_confident():
    teacher = random_outputs()
    score = teacher[0].softmax(-1)[..., 1]
    student = tuple(output.requires_grad_() for output in random_outputs())
    distillation_loss(student, teacher, confidence=0.6).total.backward()
    for output in student[1:]:
        assert torch.equal(output.grad.abs().sum(-1) > 0, score >= 0.6)


def test_a_teacher_without_faces_gives_finite_gradients():
    teacher = random_outputs()
    teacher[0][..., 1] = -40
    student = tuple(output.requires_grad_() for output in random_outputs())
    losses = distillation_loss(student, teacher)
    losses.total.backward()
    assert losses.boxes == losses.landmarks == 0
    assert all(output.grad.isfinite().all() for output in student)


def test_temperature_against_a_plain_restatement():
    student, teacher = torch.randn(3, 2), torch.randn(3, 2)
    for temperature in (1.0, 4.0):
        wanted = (teacher / temperature).softmax(-1)
        divergence = (wanted * (wanted.log() - (student / temperature).log_softmax(-1))).sum(-1)
        weight = torch.maximum(student.softmax(-1)[:, 1], teacher.softmax(-1)[:, 1])
        expected = temperature**2 * (weight * divergence).sum() / max(weight.sum(), 1)
        torch.testing.assert_close(logit_distillation(student[None], teacher[None], temperature), expected)


def test_faces_and_false_alarms_count_more_than_background():
    """The same difference in logits on a face, on a false alarm of the student, and on plain background."""
    background, face = torch.tensor([6.0, -6.0]), torch.tensor([-2.0, 2.0])
    student = torch.stack([background] * 3)[None].repeat(1, 1, 1)
    teacher = student.clone()
    teacher[0, 0] = face  # a face that the student misses
    student[0, 1] = face  # a false alarm
    student[0, 2] = background + torch.tensor([1.0, -1.0])
    student.requires_grad_()
    logit_distillation(student, teacher, 3.0).backward()
    miss, alarm, plain = student.grad[0].abs().sum(-1)
    assert min(miss, alarm) > 100 * plain


def test_half_precision_is_compared_in_float():
    outputs = tuple(output.bfloat16() for output in random_outputs())
    assert distillation_loss(outputs, outputs).total.dtype == torch.float32
