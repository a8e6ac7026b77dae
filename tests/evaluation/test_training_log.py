from retinaface.evaluation.training_log import read_training_log


def write(folder, version, text):
    file = folder / "lightning_logs" / f"version_{version}" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_figures_by_step(tmp_path):
    write(tmp_path, 0, "epoch,lr-AdamW,step,train/loss,train/boxes,val/ap_all\n,0.1,9,,,\n0,,9,2.5,1.0,\n0,,12,,,0.5\n")
    assert read_training_log(tmp_path) == {
        "lr-AdamW": {9: 0.1},
        "train/loss": {9: 2.5},
        "val/ap_all": {12: 0.5},
    }


def test_what_a_resumed_stage_logged_again_holds(tmp_path):
    for version, loss in ((0, 5), (2, 4), (10, 3)):  # by number, not by name
        write(tmp_path, version, f"step,train/loss\n{10 + version},{loss}\n50,{loss}\n")
    assert read_training_log(tmp_path) == {"train/loss": {10: 5, 12: 4, 20: 3, 50: 3}}
    assert list(read_training_log(tmp_path)["train/loss"]) == [10, 12, 20, 50]


def test_logs_that_say_nothing(tmp_path):
    assert read_training_log(tmp_path / "none") == {}
    write(tmp_path, 0, "pruning/macs,step\n5,0\n")
    write(tmp_path, 1, "")
    write(tmp_path, 2, "step,train/loss\n7,1.5\n8,1.2,9,9\n9\n")  # cut off
    write(tmp_path, 3, "train/loss\n1.5\n")
    assert read_training_log(tmp_path) == {"train/loss": {7: 1.5, 8: 1.2}}
