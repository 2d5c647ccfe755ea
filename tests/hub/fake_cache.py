"""A folder laid out as the Hub cache keeps it, so that `user/name` loads offline and without any server."""

import hashlib
import shutil
from pathlib import Path


def lay_out_cache(
    hf_home: str | Path, repo_id: str, folder: str | Path, revisions: tuple[str, ...] = ("main",)
) -> str:
    """Copies `folder` into `hf_home`/hub as repository `repo_id` and returns the commit id (from the content).

    Call it again with another folder and revision name to give the repository a second revision. A process that uses
    it needs the environment HF_HOME=`hf_home` and HF_HUB_OFFLINE=1.
    """
    folder, storage = Path(folder), Path(hf_home) / "hub" / f"models--{repo_id.replace('/', '--')}"
    digest = hashlib.sha1(repo_id.encode())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} holds no files to lay out as {repo_id}")
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    commit = digest.hexdigest()
    snapshot = storage / "snapshots" / commit
    shutil.copytree(folder, snapshot, dirs_exist_ok=True)
    for revision in revisions:
        reference = storage / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return commit
