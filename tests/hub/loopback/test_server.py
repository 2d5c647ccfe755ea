"""The loopback Hub, held against the real client: if these fail, no other test of publishing means anything."""

import hashlib
import os

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "user/thing"
WEIGHTS = os.urandom(450_000)  # three parts of at most 200,000 bytes


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi(endpoint=hub.url)
    api.create_repo(REPO)
    return api


def add(path: str, content: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, content)


def commit(api: HfApi, *operations, revision: str = "main", **options):
    return api.create_commit(REPO, list(operations), commit_message="change", revision=revision, **options)


def test_large_files_go_up_in_parts_and_come_back_equal(hub, api, tmp_path):
    info = commit(api, add("model.safetensors", WEIGHTS), add("config.json", b"{}"), add("code/a.py", b"x = 1\n"))
    parts = [path for method, path in hub.requests if method == "PUT"]
    assert [path.rsplit("/", 1)[1] for path in parts] == ["1", "2", "3"]
    path = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
    assert open(path, "rb").read() == WEIGHTS
    folder = snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path)
    assert sorted(os.listdir(folder)) == [".gitattributes", "code", "config.json", "model.safetensors"]
    assert folder.endswith(info.oid)
    checked = api.verify_repo_checksums(REPO, local_dir=folder, revision=info.oid)
    assert checked.checked_count == 4 and not checked.mismatches and not checked.missing_paths


def test_a_file_that_is_there_is_not_sent_again(hub, api):
    first = commit(api, add("model.safetensors", WEIGHTS))
    hub.requests.clear()
    second = commit(api, add("model.safetensors", WEIGHTS))
    assert second.oid == first.oid
    assert not [path for method, path in hub.requests if method == "PUT"]


def test_ranges(hub, api, tmp_path):
    import huggingface_hub

    commit(api, add("model.safetensors", WEIGHTS))
    session = huggingface_hub.utils.get_session()
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    url = f"{hub.cdn_url}/cdn/{REPO}/{oid}"
    answer = session.get(url, headers={"Range": "bytes=100-199"})
    assert answer.status_code == 206 and answer.content == WEIGHTS[100:200]
    assert answer.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    assert session.get(url, headers={"Range": "bytes=-7"}).content == WEIGHTS[-7:]
    assert session.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_a_broken_download_goes_on_where_it_broke(hub, api, tmp_path, path):
    content = WEIGHTS if path == "model.safetensors" else b'{"a": "' + b"b" * 60_000 + b'"}'
    commit(api, add(path, content))
    hub.faults.add("truncate", "GET", "cdn" if path == "model.safetensors" else "resolve", after_bytes=30_000)
    downloaded = hf_hub_download(REPO, path, endpoint=hub.url, cache_dir=tmp_path)
    assert open(downloaded, "rb").read() == content


def test_pull_request_branch_tag_and_merge(hub, api, tmp_path):
    commit(api, add("a.txt", b"one"))
    request = api.create_pull_request(REPO, title="New weights", description="")
    assert request.status == "draft" and request.git_reference == "refs/pr/1"
    commit(api, add("b.txt", b"two"), CommitOperationDelete("a.txt"), revision="refs/pr/1")
    assert api.list_repo_files(REPO) == [".gitattributes", "a.txt"]
    assert sorted(api.list_repo_files(REPO, revision="refs/pr/1")) == [".gitattributes", "b.txt"]
    commit(api, add("c.txt", b"three"))
    api.change_discussion_status(REPO, 1, "open")
    api.merge_pull_request(REPO, 1)
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "b.txt", "c.txt"]
    assert api.get_discussion_details(REPO, 1).status == "merged"
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="old", revision="v1")
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert {ref.name for ref in refs.branches} == {"main", "old"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")


def test_conflicting_requests_are_not_merged(hub, api):
    commit(api, add("a.txt", b"one"))
    api.create_pull_request(REPO, title="Mine", description="")
    commit(api, add("a.txt", b"mine"), revision="refs/pr/1")
    commit(api, add("a.txt", b"theirs"))
    with pytest.raises(HfHubHTTPError, match="409"):
        api.merge_pull_request(REPO, 1)
    assert hub.repository(REPO).read("main", "a.txt") == b"theirs"


def test_commits_are_all_or_nothing(hub, api):
    before = api.repo_info(REPO).sha
    with pytest.raises(RemoteEntryNotFoundError):
        commit(api, add("a.txt", b"one"), CommitOperationDelete("missing.txt"))
    with pytest.raises(HfHubHTTPError, match="412"):
        commit(api, add("a.txt", b"one"), parent_commit="0" * 40)
    assert api.repo_info(REPO).sha == before


def test_what_is_not_there_is_told_apart(hub, api, tmp_path):
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "missing.json", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9", endpoint=hub.url, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("user/other")


def test_private_repositories_need_the_token(hub):
    api = HfApi(endpoint=hub.url)
    api.create_repo("user/secret", private=True)
    assert api.repo_info("user/secret").private
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("user/secret", token=False)
    with pytest.raises(HfHubHTTPError):
        api.create_repo("user/second", token="hf_wrong")


def test_faults_strike_where_they_are_put(hub, api):
    hub.faults.add("status", "POST", "/commit/", times=1, status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        commit(api, add("a.txt", b"one"))
    commit(api, add("a.txt", b"one"))
    hub.faults.add("drop", "PUT", "/upload/", times=1)
    commit(api, add("model.safetensors", WEIGHTS))
    assert hub.repository(REPO).read("main", "model.safetensors") == WEIGHTS
    hub.faults.add("stop", "GET", "/api/models")
    with pytest.raises(Exception, match="(?i)disconnect|closed|reset"):
        api.repo_info(REPO)
    with pytest.raises(Exception, match="(?i)disconnect|closed|reset"):
        api.repo_info(REPO)
    hub.faults.clear()
    assert api.repo_info(REPO).id == REPO
