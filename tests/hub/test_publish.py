"""`blipren push` against the loopback Hub: what is sent, what is refused, and that main is never half of anything."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, snapshot_download

from blipren.training.checkpoint_config import is_local
from blipren.training.commands.push import PushSettings, run
from blipren.training.errors import UsageError, UserError
from blipren.training.hub.publish import collect_files, publish
from blipren.training.hub.upload import Upload
from tests.hub.checkpoint_files import write_checkpoint, write_evaluation, write_run

REPO = "user/blipren-tiny"
LICENSES = {"vision_license": "apache-2.0", "llm_license": "apache-2.0"}


@pytest.fixture
def model(tmp_path):
    return write_run(write_checkpoint(tmp_path / "run"))


def settings(model, **options) -> PushSettings:
    return PushSettings(model=str(model), repo=REPO, **LICENSES | options)


def published(hub, revision="main") -> dict[str, bytes]:
    repo = hub.repository(REPO)
    return {name: repo.read(revision, name) for name in repo.files(revision)}


def test_everything_that_is_needed_and_nothing_else(hub, model, tmp_path, capsys):
    evaluation = write_evaluation(tmp_path / "evaluation")
    publish(settings(model, evaluation=str(evaluation), tag="v1"))
    files = published(hub)
    assert sorted(files) == [
        ".eval_results/captioning.yaml",
        ".eval_results/vqa.yaml",
        ".gitattributes",
        "README.md",
        "config.json",
        "configuration_blipren.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_blipren.py",
        "pictures/attention.png",
        "pictures/curves.png",
        "pictures/example.png",
        "pictures/samples.png",
        "processing_blipren.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert not content.startswith((b"\x80\x02", b"\x80\x04", b"PK")), name
    repo = hub.repository(REPO)
    assert repo.refs["refs/tags/v1"] == repo.refs["refs/heads/main"]
    assert repo.discussions[1].status == "merged"
    assert [p.rsplit("/", 1)[1] for m, p in hub.requests if m == "PUT" and p[-1] in "123" and p[-2] == "/"] == [
        "1",
        "2",
        "3",
    ]
    assert "published: " in capsys.readouterr().out
    folder = snapshot_download(REPO, revision="v1", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert open(os.path.join(folder, "model.safetensors"), "rb").read() == files["model.safetensors"]


def test_a_second_push_sends_nothing_and_a_change_only_itself(hub, model):
    publish(settings(model, tag="v1"))
    head = hub.repository(REPO).refs["refs/heads/main"]
    hub.requests.clear()
    publish(settings(model, tag="v1"))
    assert hub.repository(REPO).refs["refs/heads/main"] == head
    assert not [path for method, path in hub.requests if method in ("PUT",) or "/commit/" in path]
    write_checkpoint(model, seed=1, shards=2)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="already has a tag v1 with other content"):
        publish(settings(model, tag="v1"))
    publish(settings(model, tag="v2"))
    files = published(hub)
    assert "model.safetensors" not in files and "model-00002-of-00002.safetensors" in files
    assert hub.repository(REPO).resolve("v1") == head


def test_files_that_others_put_there_stay(hub, model):
    api = HfApi(endpoint=hub.url)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b"thanks", path_in_repo="NOTES.txt", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"\x80\x04", path_in_repo="pytorch_model.bin", repo_id=REPO)
    publish(settings(model))
    assert "NOTES.txt" in published(hub) and "pytorch_model.bin" not in published(hub)


def test_private_branch_and_dry_run(hub, model, capsys):
    publish(settings(model, dry_run=True))
    out = capsys.readouterr().out
    assert "model.safetensors" in out and "524.7 KB" in out and "nothing was sent" in out
    assert not hub.repositories
    publish(settings(model, private=True, revision="try"))
    repo = hub.repository(REPO)
    assert repo.private and list(repo.files("main")) == [".gitattributes"]
    assert "model.safetensors" in repo.files("try")
    write_checkpoint(model, seed=2)
    publish(settings(model, revision="try"))
    assert published(hub, "try")["model.safetensors"] == (model / "model.safetensors").read_bytes()


FAULTS = [
    ("drop", "PUT", r"/upload/"),
    ("status", "PUT", r"/upload/"),
    ("lost", "PUT", r"/upload/"),
    ("drop", "POST", r"/complete/"),
    ("drop", "POST", r"/preupload/"),
    ("status", "POST", r"/commit/"),
    ("drop", "POST", r"/commit/"),
    ("lost", "POST", r"/commit/"),
    ("lost", "POST", r"/discussions$"),
    ("drop", "POST", r"/status$"),
    ("status", "POST", r"/merge$"),
    ("lost", "POST", r"/merge$"),
    ("drop", "POST", r"/tag/"),
    ("lost", "POST", r"/tag/"),
    ("lost", "POST", r"/repos/create"),
]


@pytest.mark.parametrize("kind,method,path", FAULTS, ids=[f"{k} {p}" for k, _, p in FAULTS])
def test_a_fault_is_survived(hub, model, kind, method, path):
    fault = hub.faults.add(kind, method, path)
    publish(settings(model, tag="v1"))
    assert fault.taken == 1
    assert published(hub)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert hub.repository(REPO).resolve("v1") == hub.repository(REPO).resolve("main")


STOPS = [
    ("PUT", r"/upload/.*/2$"),
    ("POST", r"/complete/"),
    ("POST", r"/commit/"),
    ("POST", r"/status$"),
    ("POST", r"/merge$"),
]


@pytest.mark.parametrize("method,path", STOPS, ids=[p for _, p in STOPS])
def test_a_stop_in_the_middle_leaves_main_alone_and_is_gone_on_from(hub, model, method, path, capsys):
    """The Hub goes away in the middle, the command gives up; started again later it goes on with the same request."""
    publish(settings(model))
    before = published(hub)
    write_checkpoint(model, seed=3)
    hub.faults.add("stop", method, path)
    with pytest.raises(UserError, match="run the same command again"):
        publish(settings(model, attempts=1))
    assert published(hub) == before
    hub.faults.clear()
    hub.requests.clear()
    publish(settings(model))
    assert published(hub)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert len(hub.repository(REPO).discussions) == 2
    assert "continuing with pull request 2" in capsys.readouterr().out
    if path not in (r"/upload/.*/2$", r"/complete/"):
        assert not [p for m, p in hub.requests if m == "PUT"], "what is there was sent again"


def test_what_the_hub_changed_is_not_merged(hub, model, monkeypatch):
    """A file that arrives different (here: replaced in the request behind our back) is found by its hash."""
    send = Upload.send

    def send_and_tamper(upload, reference):
        send(upload, reference)
        upload.api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, revision=reference)

    monkeypatch.setattr(Upload, "send", send_and_tamper)
    with pytest.raises(UserError, match="config.json"):
        publish(settings(model))
    assert list(published(hub)) == [".gitattributes"]


def test_a_refused_token_is_said(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="log in|Invalid credentials"):
        publish(settings(model))


def change_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_refusals(model, tmp_path):
    """Each of these ends before anything is sent: the real Hub is switched off here."""
    local = {"vision": {"id": str(tmp_path)}, "llm": {"id": "org/llm"}}
    change_config(model, base_models=local, checkpoint_type="bridge")
    with pytest.raises(UserError, match="vision model from the local folder"):
        publish(settings(model, bridge=True))
    write_checkpoint(model)
    cases = [
        (lambda: (model / "modeling_blipren.py").unlink(), "lacks modeling_blipren.py"),
        (lambda: (model / "configuration_blipren.py").unlink(), "lacks configuration_blipren.py"),
        (lambda: change_config(model, auto_map=None), "no auto_map"),
        (lambda: (model / "tokenizer.json").unlink(), "has no processor"),
        (lambda: (model / "model.safetensors").rename(model / "weights.bin"), "only safetensors"),
        (lambda: os.truncate(model / "model.safetensors", 5000), "damaged or truncated"),
        (lambda: (model / "model.safetensors").write_bytes(b"\x80\x04 a pickle"), "not a safetensors file"),
        (lambda: (model / "chat_template.jinja").write_text("{# /home/me/template #}"), "local path '/home/me"),
        (lambda: change_config(model, note="see /root/notes"), "local path '/root/notes'"),
        (lambda: change_config(model, model_type="llava"), "not a BLIPren checkpoint"),
        (lambda: (model / "config.json").write_text("{"), "is damaged"),
        (lambda: (model / "config.json").unlink(), "no config.json"),
    ]
    for damage, message in cases:
        (model / "chat_template.jinja").unlink(missing_ok=True)
        write_checkpoint(model)
        damage()
        with pytest.raises(UserError, match=message):
            publish(settings(model, dry_run=True))
    with pytest.raises(UserError, match="is not a folder"):
        run(settings(tmp_path / "missing"))
    write_checkpoint(model, shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002"):
        publish(settings(model, dry_run=True))


@pytest.mark.parametrize("options", [{"repo": "thing"}, {"attempts": 0}, {"revision": "refs/pr/1"}])
def test_wrong_use(options):
    with pytest.raises(UsageError):
        PushSettings(**{"model": "x", "repo": REPO} | options)


def test_a_full_checkpoint_over_local_bases_keeps_only_their_names(tmp_path):
    base = tmp_path / "towers"
    base.mkdir()
    bases = {"vision": {"id": str(base), "sha256": "1" * 64}, "llm": {"id": "org/llm", "revision": "b" * 40}}
    model = write_checkpoint(tmp_path / "model", bases)
    files = collect_files(model, settings(model))
    config = json.loads(next(f.source for f in files if f.name == "config.json"))
    assert config["base_models"]["vision"] == {"id": "towers", "sha256": "1" * 64}
    assert "_name_or_path" not in config["vision_config"]
    assert config["base_models"]["llm"]["id"] == "org/llm"


def test_ids_and_folders_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert not is_local("org/model") and not is_local("gpt2")
    assert all(is_local(text) for text in ("/a/b", "./a", "../a", "~/a", "a/b/c", "org/here", "C:\\a"))


def test_the_command_itself(hub, model, tmp_path):
    """The real command in its own process, with nothing but environment variables to find the Hub by."""
    environment = os.environ | hub.environment(str(tmp_path / "home"))
    command = [sys.executable, "-m", "blipren.training.cli", "push", str(model), REPO, "--tag", "v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "published: " in done.stdout.splitlines()[-1]
    assert "model.safetensors" in published(hub, "v1")
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "switched off" in done.stderr and "Traceback" not in done.stderr
