from pathlib import Path

import pytest

from datamodules import SyntheticFacesDataModule, WiderFaceDataModule
from datamodules.configuration import load_datamodule
from retinaface.errors import InputError

WIDER = "class_path: datamodules.WiderFaceDataModule"
CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_data_sections_of_the_same_files_as_a_training(tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text("data:\n  init_args:\n    batch_size: 3\n    transform:\n      flip: 0.25\n")
    files = [CONFIGS / "default.yaml", CONFIGS / "data" / "wider_face.yaml", CONFIGS / "stage" / "teacher.yaml", later]
    datamodule = load_datamodule(files, tmp_path)
    assert type(datamodule) is WiderFaceDataModule
    assert (datamodule.root, datamodule.batch_size, datamodule.train_size) == (tmp_path, 3, 640)
    assert (datamodule.transform.flip, datamodule.transform.crop_scale) == (0.25, (0.3, 1.0))
    assert load_datamodule(files).root == Path("data/wider_face")


def test_other_data_modules_too(tmp_path):
    datamodule = load_datamodule([CONFIGS / "data" / "synthetic_faces.yaml"], tmp_path)
    assert type(datamodule) is SyntheticFacesDataModule
    assert datamodule.root == tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [("trainer:\n  devices: 1\n", "no data section"), ("data: [", "is no YAML"), ("", "no data section"),
     ("data:\n  class_path: datamodules.Nothing\n", "Nothing"),
     (f"data:\n  {WIDER}\n  init_args:\n    root: a\n    sise: 3\n", "sise"),
     (f"data:\n  {WIDER}\n  init_args:\n    root: a\n    batch_size: 0\n", "batch_size")],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, content, message):
    file = tmp_path / "data.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_datamodule([file])
    if "batch_size" not in message:
        assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        load_datamodule([tmp_path / "nowhere.yaml"])
