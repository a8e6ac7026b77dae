"""Distillation: the student learns to say what the frozen teacher says (arXiv:1503.02531)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from retinaface.model.losses import Losses
from retinaface.model.network import Outputs


def distillation_loss(student: Outputs, teacher: Outputs, temperature: float = 3.0, confidence: float = 0.3) -> Losses:
    """Distils class logits, boxes and landmarks.

    Args:
        student: ``class_logits (B, A, 2)``, ``box_deltas (B, A, 4)``, ``landmark_deltas (B, A, 10)``.
        teacher: The same from the teacher, without gradients.
        temperature: Softens both class distributions.
        confidence: Teacher's face score from which its boxes and landmarks are worth learning.

    Returns:
        The three losses, all normalised by the weight of the anchors that count.
    """
    student_logits, student_boxes, student_landmarks = (output.float() for output in student)
    teacher_logits, teacher_boxes, teacher_landmarks = (output.float() for output in teacher)
    score = teacher_logits.softmax(dim=-1)[..., 1]
    confident = torch.where(score >= confidence, score, 0.0)
    total = confident.sum().clamp(min=1)
    return Losses(
        classes=logit_distillation(student_logits, teacher_logits, temperature),
        boxes=(F.smooth_l1_loss(student_boxes, teacher_boxes, reduction="none").sum(-1) * confident).sum() / total,
        landmarks=(F.smooth_l1_loss(student_landmarks, teacher_landmarks, reduction="none").sum(-1) * confident).sum()
        / total,
    )


def logit_distillation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from the teacher's to the student's softened class distribution.

    Each anchor counts by the larger of the two face scores: faces, the teacher's doubts and the student's false alarms,
    not the 99 % of background that both are sure of. Scaled by the squared temperature as in arXiv:1503.02531.

    Args:
        student_logits: ``(B, A, 2)``.
        teacher_logits: ``(B, A, 2)``.
        temperature: Softens both.

    Returns:
        A scalar, normalised by the sum of the weights.
    """
    divergence = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    weight = torch.maximum(student_logits.softmax(-1)[..., 1], teacher_logits.softmax(-1)[..., 1]).detach()
    return temperature**2 * (weight * divergence).sum() / weight.sum().clamp(min=1)
