"""Taking it elsewhere: ONNX export, runtimes and detection on photos."""
