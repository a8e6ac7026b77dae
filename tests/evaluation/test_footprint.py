import numpy as np
import onnx
import onnx.parser

from retinaface.evaluation.footprint import measure_footprints


def test_file_size_and_peak_memory_of_a_process_of_its_own(tmp_path):
    model = tmp_path / "small.onnx"
    text = '<ir_version: 10, opset_import: ["": 17]> g (float[b,3,h,w] photo) => (float[b,3,h,w] x) {x = Tanh(photo)}'
    onnx.save(onnx.parser.parse_model(text), model)
    ours = np.ones(2**26)  # 512 MiB here, which is nothing to the other process
    (footprint,) = measure_footprints([(model, "onnxruntime")], size=640, batch=4, threads=1)
    assert (footprint.model, footprint.runtime) == (str(model), "onnxruntime")
    assert footprint.file_bytes == model.stat().st_size
    photos = 4 * 3 * 640 * 640 * 4
    assert photos < footprint.peak_bytes < ours.nbytes
