import json
import re
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import onnx
import pytest
import torch

from retinaface.__main__ import main
from retinaface.compression.calibration import CalibrationPictures, CalibrationSettings, calibrate
from retinaface.compression.quantization import QuantizationSettings, prepare_for_training
from retinaface.compression.structure import load_float_network
from retinaface.cpus import saturates_int8
from retinaface.data.annotations import load_split, read_image
from retinaface.delivery import web
from retinaface.delivery.export import INPUT_NAME, OUTPUT_NAMES, export_onnx
from retinaface.delivery.letterbox import letterbox, to_photo, without_padding
from retinaface.delivery.runtime import Detector, load_detector
from retinaface.delivery.session import open_session
from retinaface.delivery.web import PACKAGE, PACKAGE_VERSION, write_page
from retinaface.errors import InputError
from retinaface.model.anchors import make_anchors
from retinaface.model.network import NetworkConfig
from retinaface.model.postprocess import postprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NODE = shutil.which("node")
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


@pytest.fixture
def package(tmp_path):
    """Looks like the unpacked npm package."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": PACKAGE, "version": PACKAGE_VERSION}))
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (folder / "dist" / name).write_text(f"content of {name}")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "page"


def make_photo(height, width, seed=0):
    """Smooth colours with noise, BGR."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    return np.clip(smooth + generator.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


# The folder


def test_page_holds_all_that_it_needs(onnx_files, package, out):
    model = onnx_files["float"]
    write_page(model, out, package)
    assert (out / "model.onnx").read_bytes() == model.read_bytes()
    assert (out / "ort.js").read_text() == "content of ort.wasm.bundle.min.mjs"
    assert (out / "ort-wasm-simd-threaded.wasm").is_file()
    html, script = (out / "index.html").read_text(), (out / "page.js").read_text()
    named = re.findall(r'(?:src|href)="([^"]+)"', html) + re.findall(r'from "./([^"]+)"', script)
    named += re.findall(r'fetchFile\("([^"]+)"\)', script)
    named.remove("data:,")
    assert len(named) == 6
    assert all((out / name).is_file() for name in named)
    ours = [
        path.read_text() for path in out.iterdir() if path.suffix in {".html", ".css", ".js"} and path.stem != "ort"
    ]
    assert not re.search("https?://", "".join(ours))


def test_every_element_that_the_script_asks_for_is_in_the_page():
    html = (web._PAGE / "index.html").read_text()
    wanted = set(re.findall(r'element\("([^"]+)"\)', (web._PAGE / "page.js").read_text()))
    assert len(wanted) > 10
    assert wanted <= set(re.findall(r'id="([^"]+)"', html))


def with_shape(model, path, batch, size=("height", "width")):
    """Copies a file and says that it takes this many pictures of this size; an export would take seconds."""
    content = onnx.load(model)
    for axis, value in zip(content.graph.input[0].type.tensor_type.shape.dim, (batch, 3, *size), strict=True):
        axis.Clear()
        setattr(axis, "dim_param" if isinstance(value, str) else "dim_value", value)
    onnx.save(content, path)
    return path


def test_facts_are_those_of_the_detector(onnx_files, package, out, tmp_path):
    write_page(onnx_files["float"], out, package)
    facts = json.loads((out / "model.json").read_text())
    assert (facts["name"], facts["size"], facts["input"]) == ("float.onnx", None, "images")
    assert facts["anchor_sizes"] == [[16, 32], [64, 128], [256, 512]]
    assert (facts["strides"], facts["variances"], facts["mean_bgr"]) == ([8, 16, 32], [0.1, 0.2], [104, 117, 123])
    assert facts["smallest_picture"] == 64
    assert facts["defaults"] == {"score_threshold": 0.5, "nms_threshold": 0.4, "top_k": 5000, "keep": 750}
    write_page(with_shape(onnx_files["float"], tmp_path / "fixed.onnx", 1, (96, 128)), out, package)
    facts = json.loads((out / "model.json").read_text())  # in place of the first
    assert (facts["name"], facts["size"]) == ("fixed.onnx", [96, 128])
    assert [path.name for path in out.parent.iterdir()] == ["page"]


def test_command_says_how_to_look_at_it(onnx_files, package, out, capsys):
    main(["web", str(onnx_files["float"]), "--out", str(out), "--runtime", str(package)])
    assert f"python -m http.server --directory {out}" in capsys.readouterr().out.replace("\n", "")


def test_other_folders_are_left_alone(onnx_files, package, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_page(onnx_files["float"], folder, package)  # empty: nothing is lost
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match=r"mine: holds letter.txt, which is not part of such a page"):
        write_page(onnx_files["float"], folder, package)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_models_that_the_page_cannot_run_are_refused(onnx_files, tiny_checkpoint, package, out, tmp_path):
    with pytest.raises(InputError, match=r"tiny.ckpt: browsers run ONNX files only; write one with"):
        write_page(tiny_checkpoint, out, package)
    pairs = with_shape(onnx_files["float"], tmp_path / "pairs.onnx", 2)
    with pytest.raises(InputError, match=r"pairs.onnx: takes 2 pictures per call; expected 1 or any"):
        write_page(pairs, out, package)
    assert not out.exists()


# The package


def test_another_package_is_refused(onnx_files, package, out):
    (package / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(InputError, match=r"package: lacks dist/ort-wasm-simd-threaded.wasm"):
        write_page(onnx_files["float"], out, package)
    (package / "package.json").write_text(json.dumps({"name": PACKAGE, "version": "1.2.3"}))
    with pytest.raises(InputError, match=rf"holds onnxruntime-web 1.2.3; expected {PACKAGE} {PACKAGE_VERSION}"):
        write_page(onnx_files["float"], out, package)
    with pytest.raises(InputError, match="no npm package"):
        write_page(onnx_files["float"], out, out.parent / "nowhere")
    assert not list(out.parent.iterdir())


def put_npm(folder, monkeypatch, script):
    """Puts a program called npm where programs are looked for."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_without_npm_or_network_it_says_what_to_do(onnx_files, out, tmp_path, monkeypatch):
    put_npm(tmp_path / "bin", monkeypatch, "echo 'npm error network ENOTFOUND' >&2; exit 1")
    with pytest.raises(InputError, match=r"cannot download it \(npm error network ENOTFOUND\).*--runtime"):
        write_page(onnx_files["float"], out)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm is not installed; install it, or unpack .* --runtime"):
        write_page(onnx_files["float"], out)
    assert not list(out.parent.iterdir())


def test_what_npm_gives_is_checked(onnx_files, package, out, tmp_path, monkeypatch):
    name = f"{PACKAGE}-{PACKAGE_VERSION}.tgz"
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.add(package, "package")
    put_npm(tmp_path / "bin", monkeypatch, f"cp '{tmp_path / name}' .")
    with pytest.raises(InputError, match=f"what npm downloaded is not version {PACKAGE_VERSION} as published"):
        write_page(onnx_files["float"], out)
    monkeypatch.setattr(web, "_require_integrity", lambda archive, remedy: None)
    write_page(onnx_files["float"], out)
    assert (out / "ort.js").read_text() == "content of ort.wasm.bundle.min.mjs"


# The script, in Node


def run_script(tmp_path, lines, arrays):
    """Runs JavaScript on arrays, given as ``name`` in files, and gives what it returns."""
    if NODE is None:
        pytest.skip("no Node; install it to test the page's script")
    shutil.copy(web._PAGE / "detector.js", tmp_path / "detector.mjs")
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(array.tobytes())
    kinds = {np.dtype(np.uint8): "Uint8Array", np.dtype(np.float32): "Float32Array"}
    reads = [
        f'const {name} = new {kinds[array.dtype]}(new Uint8Array(readFileSync("{name}")).buffer);'
        for name, array in arrays.items()
    ]
    head = [
        'import { readFileSync } from "node:fs";',
        'import { findFaces, place, resize, toInput } from "./detector.mjs";',
    ]
    (tmp_path / "run.mjs").write_text("\n".join([*head, *reads, *lines]))
    done = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize("size", [(213, 320), (427, 640), (100, 67), (1, 1)])
def test_photos_are_resized_as_opencv_does(tmp_path, size):
    photo = make_photo(450, 801)
    rgba = cv2.cvtColor(photo, cv2.COLOR_BGR2RGBA)
    lines = [
        f"const resized = resize({{ width: 801, height: 450, data: rgba }}, {size[1]}, {size[0]});",
        "process.stdout.write(resized);",
    ]
    found = np.frombuffer(run_script(tmp_path, lines, {"rgba": rgba}), np.uint8).reshape(*size, 4)
    wanted = cv2.resize(photo, size[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(found[..., 2::-1], wanted)


@pytest.mark.parametrize(
    ("photo_size", "size"),
    [((120, 200), None), ((40, 90), None), ((41, 37), None), ((333, 500), (96, 160)), ((50, 30), (96, 160))],
)
def test_input_and_faces_are_those_of_python(tmp_path, photo_size, size):
    photo = make_photo(*photo_size)
    config = NetworkConfig()
    boxed = letterbox([photo], size)
    height, width = boxed.images.shape[2:]
    anchors = len(make_anchors(height, width, config.anchor_sizes, config.strides))
    raw = tuple(torch.randn(1, anchors, count) for count in (2, 4, 10))
    (wanted,) = postprocess(without_padding(raw, boxed, config), (height, width), config, 0.5, 0.3, 60, 20)
    wanted = to_photo(wanted, boxed.scales[0])
    facts = {
        "size": size,
        "anchor_sizes": config.anchor_sizes,
        "strides": config.strides,
        "variances": [0.1, 0.2],
        "mean_bgr": [104, 117, 123],
        "smallest_picture": 64,
        "defaults": {"nms_threshold": 0.3, "top_k": 60, "keep": 20},
    }
    lines = [
        f"const facts = {json.dumps(facts)};",
        f"const [height, width] = {list(photo_size)};",
        "const where = place(width, height, facts, 0);",
        "const [class_logits, box_deltas, landmark_deltas] = [logits, boxes, points].map((data) => ({ data }));",
        "const outputs = { class_logits, box_deltas, landmark_deltas };",
        "const input = Array.from(toInput({ width, height, data: rgba }, where, facts));",
        "const size = [where.height, where.width];",
        "console.log(JSON.stringify({ size, input, ...findFaces(outputs, where, facts, 0.5) }));",
    ]
    names = ("logits", "boxes", "points")
    arrays = {"rgba": cv2.cvtColor(photo, cv2.COLOR_BGR2RGBA)} | {
        name: each.numpy() for name, each in zip(names, raw, strict=True)
    }
    found = json.loads(run_script(tmp_path, lines, arrays))
    assert found["size"] == [height, width]
    np.testing.assert_array_equal(np.float32(found["input"]), boxed.images.numpy().ravel())
    assert len(wanted.scores) > 5
    assert_same(found, wanted)


def assert_same(found, wanted):
    """Floats are added up in another order: boxes differed by 2e-4 pixels at most, scores by 1e-6.

    So faces whose scores are nearly equal can change places.
    """
    assert len(found["scores"]) == len(wanted.scores)
    order = torch.cdist(wanted.boxes.double(), torch.tensor(found["boxes"]).double()).argmin(dim=1)
    assert len(order.unique()) == len(order)
    np.testing.assert_allclose(np.array(found["scores"])[order], wanted.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.array(found["boxes"])[order], wanted.boxes, rtol=0, atol=0.01)
    np.testing.assert_allclose(np.array(found["landmarks"])[order], wanted.landmarks, rtol=0, atol=0.01)


# The page, in a browser

# Opens the page for each query and sends what it found to the server.
WATCHER = """<!DOCTYPE html><body><script>
for (const query of QUERIES) {
  const frame = document.createElement("iframe");
  frame.src = `index.html?${query}`;
  document.body.append(frame);
  const timer = setInterval(() => {
    const found = frame.contentDocument?.getElementById("detections")?.textContent;
    if (!found) return;
    clearInterval(timer);
    fetch(`found?${query}`, { method: "POST", body: found });
  }, 100);
}
</script>"""


# Does with the page what a person does, and sends what it found after each step.
PERSON = """<!DOCTYPE html><body><iframe src="index.html"></iframe><script>
const STEPS = {
  drop: async (page, file) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(file);
    page.getElementById("stage").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
  },
  score: async (page) => {
    page.getElementById("score").value = 0.64;
    page.getElementById("score").dispatchEvent(new Event("input"));
  },
  side: async (page) => {
    page.getElementById("side").value = 320;
    page.getElementById("side").dispatchEvent(new Event("change"));
    await until(() => page.getElementById("sizes").textContent.includes("320"));  // the looks before are over
  },
  camera: async (page) => {
    page.getElementById("camera").click();
    await until(() => page.getElementById("camera").textContent === "Stop camera");
    page.getElementById("detections").textContent = "";
  },
  stopped: async (page) => {
    page.getElementById("camera").click();
    await until(() => page.getElementById("camera").textContent === "Use camera");
  },
};
async function until(condition) {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 100));
}
document.querySelector("iframe").addEventListener("load", async ({ target }) => {
  const page = target.contentDocument;
  const file = new File([await (await fetch("photo.png")).blob()], "photo.png");
  await until(() => !page.getElementById("choose").disabled);
  for (const [step, act] of Object.entries(STEPS)) {
    if (step !== "stopped") page.getElementById("detections").textContent = "";
    await act(page, file);
    await until(() => page.getElementById("detections").textContent);
    const found = JSON.parse(page.getElementById("detections").textContent);
    found.sizes = page.getElementById("sizes").textContent;
    await fetch(`found?${step}`, { method: "POST", body: JSON.stringify(found) });
  }
});
</script>"""


class Server(ThreadingHTTPServer):
    """Offers a folder, and collects what the watcher sends."""

    def __init__(self, folder, queries, headers, watcher):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.queries, self.headers, self.watcher = queries, headers, watcher
        self.found = {}
        self.complete = threading.Event()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def end_headers(self):
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self):
        if self.path != "/watch.html":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.watcher.encode())

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.found[self.path.partition("?")[2]] = json.loads(content)
        self.send_response(204)
        self.end_headers()
        if len(self.server.found) == len(self.server.queries):
            self.server.complete.set()


def open_in_browser(folder, queries, profile, headers, watcher=None, more_flags=()):
    server = Server(folder, queries, headers, watcher or WATCHER.replace("QUERIES", json.dumps(queries)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    flags += more_flags
    address = f"http://127.0.0.1:{server.server_port}/watch.html"
    with subprocess.Popen([CHROMIUM, *flags, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
        try:
            assert server.complete.wait(300), f"after five minutes the browser gave {list(server.found)} of {queries}"
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
            server.server_close()
    return [server.found[query] for query in queries]


def downloaded_page(model, out):
    if CHROMIUM is None:
        pytest.skip("no Chromium; install it to test the page in a browser")
    try:
        write_page(model, out)
    except InputError as error:
        if str(error).startswith(PACKAGE):
            pytest.skip(str(error))
        raise
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("headers", "threads"), [({}, 1), (ISOLATION, None)], ids=["plain", "isolated"])
def test_browser_finds_what_python_finds(onnx_files, out, tmp_path, headers, threads):
    page = downloaded_page(onnx_files["float"], out)
    for name, size in (("photo", (240, 400)), ("small", (40, 90))):
        cv2.imwrite(str(page / f"{name}.png"), make_photo(*size))
    queries = ["photo=photo.png&side=0", "photo=photo.png&side=320&score=0.6", "photo=small.png", "photo=absent.png"]
    whole, shrunk, small, absent = open_in_browser(page, queries, tmp_path / "profile", headers)
    detector = load_detector(onnx_files["float"], threads=1)
    photo = read_image(page / "photo.png")
    fewer = detector.detect(cv2.resize(photo, (320, 192), interpolation=cv2.INTER_LINEAR), 0.6)
    wanted = [
        detector.detect(photo),
        to_photo(fewer, torch.tensor([0.8, 0.8])),
        detector.detect(read_image(page / "small.png")),
    ]
    for found, faces in zip((whole, shrunk, small), wanted, strict=True):
        assert len(faces.scores) > 5
        assert_same(found, faces)
        assert found["milliseconds"] > 0
        assert threads is None or found["threads"] == threads
    assert absent == {"error": "absent.png: the server says 404 File not found"}


@pytest.mark.slow
def test_a_person_drops_a_photo_moves_the_sliders_and_uses_the_camera(onnx_files, out, tmp_path):
    page = downloaded_page(onnx_files["float"], out)
    photo = make_photo(240, 400)
    cv2.imwrite(str(page / "photo.png"), photo)
    frame = cv2.cvtColor(make_photo(240, 320), cv2.COLOR_BGR2YUV_I420).tobytes()
    (tmp_path / "camera.y4m").write_bytes(b"YUV4MPEG2 W320 H240 F30:1 Ip C420jpeg\nFRAME\n" + frame)
    camera = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    camera += [f"--use-file-for-fake-video-capture={tmp_path / 'camera.y4m'}"]
    steps = ["drop", "score", "side", "camera", "stopped"]
    dropped, scored, sided, filmed, stopped = open_in_browser(page, steps, tmp_path / "profile", {}, PERSON, camera)
    detector = load_detector(onnx_files["float"], threads=1)
    assert_same(dropped, detector.detect(photo))
    assert_same(scored, detector.detect(photo, 0.64))
    assert len(scored["scores"]) < len(dropped["scores"])
    fewer = detector.detect(cv2.resize(photo, (320, 192), interpolation=cv2.INTER_LINEAR), 0.64)
    assert_same(sided, to_photo(fewer, torch.tensor([0.8, 0.8])))
    for found in (filmed, stopped):
        assert re.findall("[0-9]+", found["sizes"]) == ["320", "240", "320", "240"]  # the camera's, and as seen
        assert len(found["scores"]) > 5


# INT8


def assert_alike(found, wanted, scores_apart, pixels_apart, threshold=0.5):
    """What one finds clearly above the threshold, the other finds too, at nearly the same place and score."""
    ours, scores = torch.tensor(found["boxes"]), torch.tensor(found["scores"])
    distances = torch.cdist(wanted.boxes.double(), ours.double(), p=torch.inf)  # of the edge that differs most
    for own, nearest in ((wanted.scores, distances.amin(dim=1)), (scores, distances.amin(dim=0))):
        missing = nearest[own > threshold + scores_apart].max()
        assert missing < pixels_apart, f"nothing nearer than {missing} pixels"
    pairs = distances < pixels_apart
    apart, edges = (scores - wanted.scores[:, None]).abs()[pairs], distances[pairs]
    print(f"{len(ours)} and {len(wanted.boxes)} faces, scores {apart.max():.4f}, edges {edges.max():.3f} pixels apart")
    assert apart.max() < scores_apart


@pytest.fixture
def int8_student(reference, tmp_path):
    """The public network in INT8 but for its first stage, as the recipes leave it."""
    network, _ = load_float_network(reference / "weights" / "mobilenet025_widerface.pth")
    prepared = prepare_for_training(network, QuantizationSettings(keep_float=("backbone.stage1",)))
    samples = load_split(reference / "masks_wider", "train")
    calibrate(prepared, CalibrationPictures(samples, 8), CalibrationSettings())
    export_onnx(prepared, tmp_path / "student.onnx")
    return tmp_path / "student.onnx"


@pytest.mark.slow
@pytest.mark.reference
def test_browser_finds_what_python_finds_in_int8(int8_student, reference, out, tmp_path):
    """The same faces on two crowd photos, scores within .05 and edges within 3 pixels.

    INT8 sums are whole numbers and the same everywhere, but the first stage computes in float, in another order in the
    browser: a value on the other side of a rounding step moves what follows by a step. .023 and 1.6 pixels were
    measured. Without INT8 dot products ONNX Runtime cuts sums off in Python, which is no matter here, and the browser
    does not: .029 and 2.5 pixels, and two of 390 faces at .50 more.
    """
    page = downloaded_page(int8_student, out)
    photos = sorted((reference / "photos").glob("*.jpg"))
    for photo in photos:
        cv2.imwrite(str(page / f"{photo.stem}.png"), read_image(photo))  # browsers and OpenCV decode JPEG differently
    queries = [f"photo={photo.stem}.png&side=0" for photo in photos]
    session = open_session(int8_student, 1, {"session.x64quantprecision": "1"} if saturates_int8() else None)

    def run(images):
        return tuple(map(torch.from_numpy, session.run(list(OUTPUT_NAMES), {INPUT_NAME: images.numpy()})))

    detector = Detector(NetworkConfig(), run, "onnxruntime")
    for photo, found in zip(photos, open_in_browser(page, queries, tmp_path / "profile", {}), strict=True):
        faces = detector.detect(read_image(photo))
        assert len(faces.scores) > 20
        assert found["milliseconds"] > 0
        print(f"{photo.name}: {found['milliseconds']:.0f} ms with {found['threads']} threads")
        assert_alike(found, faces, scores_apart=0.05, pixels_apart=3)
