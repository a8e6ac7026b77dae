"""What several processes learn is what one learns that has all their photos."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher_arguments(tiny_root, tiny_checkpoint, make_stage_arguments):
    options = ["--model.init_args.network.channels=16", f"--model.init_args.weights={tiny_checkpoint}"]
    return make_stage_arguments("teacher", tiny_root, *options)


def test_two_processes_end_with_the_same_teacher(teacher_arguments, tmp_path, check_two_processes):
    check_two_processes(teacher_arguments, tmp_path)


def test_teacher(teacher_arguments, tmp_path, run_process, check_half_the_batch):
    assert run_process(teacher_arguments, tmp_path).returncode == 0
    check_half_the_batch(teacher_arguments, tmp_path / "checkpoints" / "last.ckpt", tmp_path)


def test_pruned_student(pruned_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_run.arguments, pruned_run.checkpoint, tmp_path)


def test_pruned_again_with_regularization(pruned_again_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_again_run.arguments, pruned_again_run.checkpoint, tmp_path)


def test_fake_quantized_student(quantized_run, tmp_path, check_half_the_batch):
    """Ranges and statistics stand still by now; a correlation of features would depend on the batch."""
    options = ["--model.init_args.distillation.feature_loss=cwd"]
    check_half_the_batch([*quantized_run.arguments, *options], quantized_run.checkpoint, tmp_path)
