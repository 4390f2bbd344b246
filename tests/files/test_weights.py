"""Weights by name, from a hub on this machine that speaks as much of its protocol as a download needs."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils.errors import ConfigError
from wan.files.weights import RELEASES
from wan.models.options import CLIPConfig, DiTConfig, ReleaseConfig, T5Config, VAEConfig

ROOT = Path(__file__).parents[2]


@dataclass
class Hub:
    """Files by `repository/path`; what was asked for; how many bytes of a file are sent before the line is cut."""

    address: str
    files: dict[str, bytes]
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, file, Range
    cut_after: int | None = None
    tampered: bool = False
    status: int = 200


@pytest.fixture
def hub() -> Iterator[Hub]:
    contents = {f"{file.repository}/{file.path}": file.name.encode() * 5000 for file in RELEASES["i2v-480p"]}
    served = Hub("", contents)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, send: bool) -> None:
            repository, _, path = self.path.partition("?")[0][1:].partition("/resolve/main/")
            name = f"{repository}/{path}"
            served.asked.append((self.command, name, self.headers.get("Range")))
            content = served.files.get(name)
            if content is None or served.status != 200:
                self.send_response(served.status if served.status != 200 else 404)
                if served.status != 500:
                    self.send_header("X-Error-Code", "GatedRepo" if served.status == 403 else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].split("-")[0])
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if send:
                body = bytes(len(content)) if served.tampered else content
                self.wfile.write(body[begin : served.cut_after])
                if served.cut_after is not None:
                    self.close_connection = True

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


def weights(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "wan.files.weights", *(arguments or ("i2v-480p",)), "--to", str(folder / "models")]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def one_line_of(done: subprocess.CompletedProcess) -> str:
    """The error of a run that ended with 1; progress bars write on lines of their own."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def assert_complete(hub: Hub, folder: Path) -> None:
    for file in RELEASES["i2v-480p"]:
        assert (folder / "models" / file.name).read_bytes() == hub.files[f"{file.repository}/{file.path}"]
    assert {path.name for path in (folder / "models").iterdir()} == {
        file.name.partition("/")[0] for file in RELEASES["i2v-480p"]
    }


def test_what_is_missing_is_fetched_and_what_is_there_is_left(hub, tmp_path):
    done = weights(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_complete(hub, tmp_path)
    assert "wan2.1_i2v_480p_14B_bf16.safetensors" in done.stdout and "MB" in done.stdout
    (tmp_path / "models" / "Wan2.1_VAE.pth").write_bytes(b"cut")
    hub.asked.clear()
    again = weights(hub, tmp_path)
    assert again.returncode == 0 and again.stdout.count("is there") == len(RELEASES["i2v-480p"]) - 1
    assert [name for method, name, _ in hub.asked if method == "GET" and name in hub.files] == [
        "Wan-AI/Wan2.1-I2V-14B-480P/Wan2.1_VAE.pth"
    ]
    assert_complete(hub, tmp_path)


def test_the_scripts_find_the_files_in_their_folder(hub, tmp_path):
    weights(hub, tmp_path)
    folder = tmp_path / "models"
    release = ReleaseConfig(ckpt_dir=folder)
    assert release.fill(DiTConfig()).dit == folder / "wan2.1_i2v_480p_14B_bf16.safetensors"
    assert release.fill(VAEConfig()).vae == folder / "Wan2.1_VAE.pth"
    assert release.fill(T5Config()) == T5Config(
        t5=folder / "models_t5_umt5-xxl-enc-bf16.pth", t5_tokenizer=folder / "tokenizer"
    )
    assert release.fill(CLIPConfig()).clip == folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def test_of_several_dits_the_task_or_the_user_chooses(tmp_path):
    for file in {*RELEASES["i2v-480p"], *RELEASES["flf2v-720p"]}:
        (tmp_path / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / file.name).touch()
    release = ReleaseConfig(ckpt_dir=tmp_path)
    for task in ("i2v-14B", "flf2v-14B"):
        assert f"_{task.removesuffix('-14B')}_" in release.fill(DiTConfig(task=task)).dit.name
    with pytest.raises(ConfigError, match="choose one with --dit"):
        release.fill(DiTConfig())
    (tmp_path / RELEASES["i2v-720p"][0].name).touch()
    with pytest.raises(ConfigError, match=r"i2v_480p.*i2v_720p.*choose one with --dit"):
        release.fill(DiTConfig(task="i2v-14B"))
    assert release.fill(VAEConfig()).vae == tmp_path / "Wan2.1_VAE.pth"


def test_comfyuis_folders_serve_as_well(tmp_path):
    names = {"dit": "diffusion_models/wan2.1_i2v_480p_14B_bf16.safetensors", "vae": "vae/wan_2.1_vae.safetensors"}
    names |= {"t5": "text_encoders/umt5_xxl_fp16.safetensors", "clip": "clip_vision/clip_vision_h.safetensors"}
    for name in names.values():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    release = ReleaseConfig(ckpt_dir=tmp_path)
    for section in (DiTConfig, VAEConfig, T5Config, CLIPConfig):
        name = section.__name__.removesuffix("Config").lower()
        assert getattr(release.fill(section()), name) == tmp_path / names[name]


def test_a_download_that_was_cut_goes_on_where_it_was(hub, tmp_path):
    large = next(iter(hub.files))
    hub.files[large] *= 12_000_000 // len(hub.files[large])  # the hub's library writes pieces of 10 MB
    hub.cut_after = 11_000_000
    assert "run this again" in one_line_of(weights(hub, tmp_path))
    assert not (tmp_path / "models" / "wan2.1_i2v_480p_14B_bf16.safetensors").exists()
    hub.cut_after = None
    hub.asked.clear()
    assert weights(hub, tmp_path).returncode == 0
    assert ("GET", large, "bytes=10485760-") in hub.asked
    assert_complete(hub, tmp_path)


def test_a_file_that_arrives_otherwise_is_not_kept(hub, tmp_path):
    hub.tampered = True
    assert "did not arrive as" in one_line_of(weights(hub, tmp_path))
    assert not list((tmp_path / "models").glob("*.safetensors"))


@pytest.mark.parametrize(("status", "words"), [(404, "not there"), (403, "hf auth login"), (500, "cannot be reached")])
def test_a_hub_that_refuses_is_one_line(status, words, hub, tmp_path):
    hub.status = status
    assert words in one_line_of(weights(hub, tmp_path))


def test_no_hub_is_one_line(hub, tmp_path):
    hub.address = "http://127.0.0.1:9"
    assert "the hub cannot be reached" in one_line_of(weights(hub, tmp_path))


def test_an_unknown_name_is_one_line(hub, tmp_path):
    assert "i2v-480p" in one_line_of(weights(hub, tmp_path, "i2v-480"))
    assert not hub.asked
