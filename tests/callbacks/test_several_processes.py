"""What several processes learn is what one learns that has all their photos."""

import pytest

pytestmark = pytest.mark.slow


def test_teacher(tiny_root, tiny_checkpoint, tmp_path, make_stage_arguments, run_process, check_half_the_batch):
    options = ["--model.init_args.network.channels=16", f"--model.init_args.weights={tiny_checkpoint}"]
    arguments = make_stage_arguments("teacher", tiny_root, *options)
    assert run_process(arguments, tmp_path).returncode == 0
    check_half_the_batch(arguments, tmp_path / "checkpoints" / "last.ckpt", tmp_path)


def test_pruned_student(pruned_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_run.arguments, pruned_run.checkpoint, tmp_path)


def test_pruned_again_with_regularization(pruned_again_run, tmp_path, check_half_the_batch):
    check_half_the_batch(pruned_again_run.arguments, pruned_again_run.checkpoint, tmp_path)


def test_fake_quantized_student(quantized_run, tmp_path, check_half_the_batch):
    """Ranges and statistics stand still by now; a correlation of features would depend on the batch."""
    options = ["--model.init_args.distillation.feature_loss=cwd"]
    check_half_the_batch([*quantized_run.arguments, *options], quantized_run.checkpoint, tmp_path)
