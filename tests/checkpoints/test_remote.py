"""Downloads, from a server on this machine that answers as the hub and as any file server do."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from autoalign.api import load
from autoalign.checkpoints import remote
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.remote import is_remote
from autoalign.errors import CheckpointError, DependencyError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """Serves files, by path, and a repository of them; keeps what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.announced: dict[str, int | None] = {}  # lengths that are not those of the files; None for none
        self.resumed = threading.Event()  # what stalls goes on
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/name"):
            names = [name.removeprefix("/hub/") for name in self.server.files if name.startswith("/hub/")]
            if "/tree/" in path:
                sizes = {name: len(self.server.files["/hub/" + name]) for name in names}
                tree = [{"type": "file", "oid": "0" * 40, "path": name, "size": size} for name, size in sizes.items()]
                return self.send(json.dumps(tree).encode(), "application/json")
            info: dict[str, Any] = {"id": "owner/name", "sha": COMMIT}
            info["siblings"] = [{"rfilename": name} for name in names]
            info |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
            return self.send(json.dumps(info).encode(), "application/json")
        if path.startswith("/owner/name/resolve/"):
            path = "/hub/" + path.split("/", 5)[-1]
        if path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        content = self.server.files.get(path)
        if content is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self.send(content, "application/octet-stream")

    def send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        path = self.path.partition("?")[0]
        length = self.server.announced.get(path, len(content))
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            if path.startswith("/stalled"):
                self.wfile.flush()
                self.server.resumed.wait(20)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    constants: Any = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    yield server
    server.resumed.set()
    server.shutdown()
    server.server_close()


def tensors() -> dict[str, Tensor]:
    return {"net.fc.weight": torch.ones(2, 3), "net.fc.bias": torch.arange(2.0)}


def add_shards(server: Server, prefix: str) -> None:
    listed = {}
    for number, (key, tensor) in enumerate(tensors().items(), start=1):
        listed[key] = f"model-0000{number}-of-00002.safetensors"
        server.files[prefix + listed[key]] = save({key: tensor})
    server.files[prefix + "model.safetensors.index.json"] = json.dumps({"weight_map": listed}).encode()


def assert_loads(address: str) -> None:
    model = nn.Linear(3, 2)
    alignment = load(model, address, strict=True)
    assert alignment.coverage == 1
    assert torch.equal(model.weight, tensors()["net.fc.weight"])
    assert torch.equal(model.bias, tensors()["net.fc.bias"])


def files_asked(server: Server) -> set[str]:
    return {path.rpartition("/")[2] for path in server.asked if "/resolve/" in path}


def test_a_sharded_repository_is_loaded_and_only_its_files_are_downloaded(server: Server) -> None:
    add_shards(server, "/hub/")
    server.files["/hub/config.json"] = b'{"num_attention_heads": 3}'
    server.files["/hub/pytorch_model.bin"] = b"another"
    server.files["/hub/tokenizer.json"] = b"{}"
    server.files["/hub/model.fp16.safetensors"] = b"a variant"
    assert_loads("hf://owner/name")
    names = {"model.safetensors.index.json", "config.json"}
    assert files_asked(server) == names | {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert open_checkpoint("hf://owner/name@main").config["num_attention_heads"] == 3
    assert open_checkpoint("hf://owner/name").path == "hf://owner/name"


def test_what_was_downloaded_is_found_without_a_connection(server: Server) -> None:
    server.files["/hub/model.safetensors"] = save(tensors())
    assert_loads("hf://owner/name")
    server.shutdown()
    server.server_close()
    assert_loads("hf://owner/name")


@pytest.mark.parametrize(
    ("names", "address", "taken"),
    [
        (("model.safetensors", "pytorch_model.bin"), "hf://owner/name", "model.safetensors"),
        (("pytorch_model.bin", "flax_model.msgpack", "optimizer.bin"), "hf://owner/name", "pytorch_model.bin"),
        (("a.safetensors", "b.safetensors"), "hf://owner/name@v1.0/b.safetensors", "b.safetensors"),
        (("model.safetensors", "unet/diffusion.safetensors"), "hf://owner/name/unet", "diffusion.safetensors"),
        (("model.safetensors", "unet/diffusion.safetensors"), "hf://owner/name", "model.safetensors"),
    ],
)
def test_one_checkpoint_of_a_repository_is_taken(
    server: Server, tmp_path: Path, names: tuple[str, ...], address: str, taken: str
) -> None:
    torch.save(tensors(), tmp_path / "a")
    for name in names:
        server.files[f"/hub/{name}"] = (
            save(tensors()) if name.endswith("safetensors") else (tmp_path / "a").read_bytes()
        )
    assert_loads(address)
    assert files_asked(server) == {taken}


def test_addresses_that_lead_to_no_checkpoint(server: Server) -> None:
    server.files["/hub/README.md"] = b"a card"
    with pytest.raises(CheckpointError, match=r"holds no checkpoint. Nothing was downloaded. It has README.md"):
        open_checkpoint("hf://owner/name")
    server.files |= {"/hub/a.safetensors": b"", "/hub/b.safetensors": b""}
    with pytest.raises(CheckpointError, match=r"several checkpoints.*Name one of them: hf://owner/name/a.safetensors"):
        open_checkpoint("hf://owner/name")
    with pytest.raises(CheckpointError, match=r"'hf://owner/other' could not be downloaded \(\w+"):
        open_checkpoint("hf://owner/other")
    for address in ("hf://name", "hf://a/b@c@d", "hf://../x", "hf://"):
        with pytest.raises(CheckpointError, match=r"is not an address such as|could not be downloaded"):
            open_checkpoint(address)
    assert files_asked(server) == set()


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/passwd", "http://127.0.0.1/x", "a\\b"])
def test_an_index_that_leads_elsewhere_is_not_followed(server: Server, name: str) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    server.files |= {"/hub/model.safetensors.index.json": index, "/x/model.safetensors.index.json": index}
    for address in ("hf://owner/name", f"{server.address}/x/model.safetensors.index.json"):
        with pytest.raises(CheckpointError, match=r"and only files in its own folder are read"):
            open_checkpoint(address)


def test_files_and_indices_by_address(server: Server) -> None:
    server.files["/a/model.safetensors"] = save(tensors())
    server.files["/b/model.safetensors"] = save({"x.weight": torch.zeros(1)})
    assert_loads(f"{server.address}/a/model.safetensors?download=true")
    other = open_checkpoint(f"{server.address}/b/model.safetensors")
    assert (list(other), other.format) == (["x.weight"], "safetensors")  # not the first, which has the same name
    add_shards(server, "/c/")
    assert_loads(f"{server.address}/c/model.safetensors.index.json")
    asked = list(server.asked)
    assert_loads(f"{server.address}/c/model.safetensors.index.json")
    assert server.asked == asked  # from the cache


def test_hashes_are_checked(server: Server) -> None:
    content = save(tensors())
    digest = hashlib.sha256(content).hexdigest()
    server.files |= {f"/model-{digest[:8]}.safetensors": content, "/model-0123abcd.safetensors": content, "/m": content}
    assert_loads(f"{server.address}/model-{digest[:8]}.safetensors")
    assert_loads(f"{server.address}/m#sha256={digest}")
    for address in ("/model-0123abcd.safetensors", "/m2#sha256=" + "0" * 64):
        server.files["/m2"] = content
        with pytest.raises(CheckpointError, match=r"could not be downloaded \(RuntimeError: invalid hash value"):
            open_checkpoint(server.address + address)
        with pytest.raises(CheckpointError, match=r"invalid hash value"):  # nothing is left of it
            open_checkpoint(server.address + address)
    with pytest.raises(CheckpointError, match=r"was downloaded before and has another hash"):
        open_checkpoint(f"{server.address}/m#sha256={'1' * 64}")
    with pytest.raises(CheckpointError, match=r"is not a hash such as"):
        open_checkpoint(f"{server.address}/m#md5=1")


def test_plain_http_is_for_this_machine_only() -> None:
    with pytest.raises(CheckpointError, match=r"plain http, where anyone on the way can change it"):
        open_checkpoint("http://example.com/model.safetensors")


def test_a_server_that_sends_nothing_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT_SECONDS", 0.3)
    server.files["/stalled.safetensors"] = save(tensors())
    server.announced["/stalled.safetensors"] = 10**6
    with pytest.raises(CheckpointError, match=r"could not be downloaded \(TimeoutError: nothing came for"):
        open_checkpoint(f"{server.address}/stalled.safetensors")
    assert not server.resumed.is_set()
    assert cached() == []


def cached() -> list[str]:
    return [path.name for path in Path(torch.hub.get_dir()).rglob("*") if path.is_file()]


def test_a_download_that_is_cut_short_is_not_kept(server: Server) -> None:
    content = save(tensors())
    server.files["/m.safetensors"], server.announced["/m.safetensors"] = content[:-4], len(content)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"RuntimeError: {len(content) - 4} of {len(content)} bytes came"):
            open_checkpoint(f"{server.address}/m.safetensors")
        assert cached() == []
    server.files["/m.safetensors"] = content
    assert_loads(f"{server.address}/m.safetensors")


@pytest.mark.parametrize("announced", [True, False])
def test_a_download_has_a_largest_size(server: Server, monkeypatch: pytest.MonkeyPatch, announced: bool) -> None:
    content = save(tensors())
    server.files["/m.safetensors"] = content
    if not announced:
        server.announced["/m.safetensors"] = None
    limit = "_MAX_BYTES" if announced else "_MAX_UNANNOUNCED_BYTES"
    monkeypatch.setattr(remote, limit, len(content) - 1)
    with pytest.raises(CheckpointError, match=r"RuntimeError: it has (more than )?\d+ bytes, (and|which) .*allowed or"):
        open_checkpoint(f"{server.address}/m.safetensors")
    assert cached() == []
    monkeypatch.setattr(remote, limit, len(content))
    assert_loads(f"{server.address}/m.safetensors")


@pytest.mark.parametrize("to", ["http://127.0.0.2:{}/m", "http://example.com/m", "ftp://127.0.0.1:{}/m", "file:///m"])
def test_a_redirect_leads_nowhere_that_is_refused_itself(server: Server, to: str) -> None:
    server.files["/m"] = save(tensors())
    server.redirects |= {"/there": "/m", "/elsewhere": to.format(server.server_address[1])}
    assert_loads(f"{server.address}/there")
    asked = len(server.asked)
    with pytest.raises(CheckpointError, match=r"it redirects to '.*', which is not followed|is not allowed"):
        open_checkpoint(f"{server.address}/elsewhere")
    assert server.asked[asked:] == ["/elsewhere"]


def test_no_other_machine_redirects_to_this_one() -> None:
    assert remote._is_allowed("https://example.com/a", is_local=False)
    assert remote._is_allowed("http://localhost/a", is_local=True)
    assert not remote._is_allowed("http://localhost/a", is_local=False)
    assert not remote._is_allowed("http://[::1/a", is_local=True)


@pytest.mark.parametrize("name", ["%2e%2e", "a%00b"])
def test_names_that_no_file_can_have(server: Server, name: str) -> None:
    with pytest.raises(CheckpointError, match="names no file"):
        open_checkpoint(f"{server.address}/{name}")
    assert server.asked == []


def test_what_is_not_there_is_said_to_be(server: Server) -> None:
    with pytest.raises(CheckpointError, match=r"could not be downloaded \(HTTPError: HTTP Error 404"):
        open_checkpoint(f"{server.address}/absent.safetensors")
    with pytest.raises(CheckpointError, match=r"names no file"):
        open_checkpoint(server.address)


def test_only_addresses_are_remote(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a")
    assert not is_remote(tmp_path / "a")
    assert not is_remote("hf:/x")
    assert_loads(str(tmp_path / "a"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        DependencyError, match=r"huggingface_hub, which is not installed.*pip install 'autoalign\[hub\]'"
    ):
        open_checkpoint("hf://owner/name")
