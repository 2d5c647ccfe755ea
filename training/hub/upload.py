"""Upload files to a Hub repository: all of them or none.

Everything goes to a pull request first. When the Hub's own hashes of all files equal ours, the request is merged (or the
wanted branch is set to it) and tagged. An upload that was stopped is started again by the same command: it finds its
request by a digest of the files, and what the Hub already has is not sent a second time.
"""

import hashlib
import time
import warnings
from dataclasses import dataclass

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from blipren.training.commands.push import UploadSettings
from blipren.training.errors import UserError, one_line
from blipren.training.hub.published_files import PublishedFile, is_published

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
TRANSIENT_STATUS = (408, 409, 412, 429)  # and all from 500 on


def upload(files: list[PublishedFile], repo: str, settings: UploadSettings, repo_type: str = "model") -> str:
    """Publish files as the content of a repository. Every step may be repeated without harm.

    Args:
        repo_type: `model`, or `space` for a Space of Gradio.

    Returns:
        The id of the published commit.

    Raises:
        UserError: the Hub refuses, or fails `settings.attempts` times.
    """
    api = HfApi()
    target = Upload(api, files, repo, settings, repo_type)
    for attempt in range(1, settings.attempts + 1):
        try:
            commit = target.run()
            break
        except (LocalTokenNotFoundError, RepositoryNotFoundError) as error:
            raise UserError(f"{repo} cannot be written with this token: log in with `hf auth login`") from error
        except OfflineModeIsEnabled as error:
            raise UserError("the Hub is switched off here (HF_HUB_OFFLINE): unset it to publish") from error
        except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
            reason = transient_failure(error)
            if reason is None:
                raise UserError(f"the Hub refused: {one_line(error)}") from error
            if attempt == settings.attempts:
                raise UserError(
                    f"the Hub failed {attempt} times, last with: {reason}. {settings.revision} of {repo} is unchanged or "
                    "complete; run the same command again to continue"
                ) from error
            print(f"attempt {attempt} of {settings.attempts} failed ({reason}); continuing from where it stopped")
            time.sleep(min(2**attempt, 30))
    place = f"spaces/{repo}" if repo_type == "space" else repo
    print(f"published: {api.endpoint}/{place}/tree/{settings.tag or settings.revision}  (commit {commit})")
    return commit


def transient_failure(error: BaseException) -> str | None:
    """Return the reason of a failure that may not happen again; None for others. Upload errors come wrapped."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, httpx2.TransportError):
        return one_line(error) or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    return one_line(error) if status is not None and (status >= 500 or status in TRANSIENT_STATUS) else None


@dataclass(frozen=True)
class Upload:
    """Files on their way to a repository."""

    api: HfApi
    files: list[PublishedFile]
    repo: str
    settings: UploadSettings
    repo_type: str = "model"

    @property
    def title(self) -> str:
        """Title of the pull request: equal files, equal title."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.sha256()}\n".encode())
        return f"Publish {digest.hexdigest()[:16]} on {self.settings.revision}"

    def run(self) -> str:
        """Do whatever is not done yet, and return the published commit."""
        sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
        self.api.create_repo(self.repo, repo_type=self.repo_type, private=self.settings.private, exist_ok=True, **sdk)
        commit = self.complete_commit(self.settings.revision)
        if commit is None:
            number = self.find_or_open_request()
            reference = f"refs/pr/{number}"
            if self.complete_commit(reference) is None:
                self.send(reference)
            head = self.complete_commit(reference)
            if head is None:
                raise UserError(
                    f"the Hub holds other files in {reference} of {self.repo} than were sent: "
                    f"{', '.join(self.differing_files(reference)[:3])}. Nothing was merged; run the command again"
                )
            print(f"all {len(self.files)} files verified in {reference}")
            commit = self.release(number, head)
        if self.settings.tag:
            self.add_tag(self.settings.tag, commit)
        return commit

    def find_or_open_request(self) -> int:
        """Return the number of the open request that an earlier run made for these files, else of a new one."""
        for discussion in self.api.get_repo_discussions(
            self.repo, discussion_type="pull_request", repo_type=self.repo_type
        ):
            if discussion.title == self.title and discussion.status in ("draft", "open"):
                print(f"continuing with pull request {discussion.num}")
                return discussion.num
        text = "Made by `blipren push`. It is merged when all files are verified; until then main stays as it was."
        return self.api.create_pull_request(
            self.repo, title=self.title, description=text, repo_type=self.repo_type
        ).num

    def files_at(self, revision: str) -> dict[str, tuple[int, str]]:
        """Return size and hash of every file at a revision: SHA-256 of files in LFS, git's SHA-1 of others."""
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision, repo_type=self.repo_type)
        files = (entry for entry in tree if hasattr(entry, "blob_id"))
        return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files}

    def outdated(self, names: list[str]) -> list[str]:
        """Return files of an earlier publication, such as shards, and pickles. Other files of the repository stay."""
        ours = ("blipren/", "app.py", "model.json") if self.repo_type == "space" else ()
        wanted = {file.name for file in self.files}
        return [
            name
            for name in names
            if name not in wanted and (name.startswith(ours) if ours else is_published(name) or name.endswith(PICKLES))
        ]

    def differing_files(self, revision: str) -> list[str]:
        """Return the names of the files that are missing, different or outdated at a revision."""
        there = self.files_at(revision)
        differing = []
        for file in self.files:
            size, digest = there.get(file.name, (None, ""))
            if size != file.size or digest != (file.sha256() if len(digest) == 64 else file.git_sha1()):
                differing.append(file.name)
        return differing + self.outdated(list(there))

    def complete_commit(self, revision: str) -> str | None:
        """Return the commit at a revision if it holds exactly the files, by the Hub's hashes; else None."""
        try:
            commit = self.api.repo_info(self.repo, revision=revision, repo_type=self.repo_type).sha
        except RevisionNotFoundError:
            return None
        return commit if not self.differing_files(commit) else None

    def send(self, reference: str) -> None:
        """Commit all files at once; large ones are uploaded before it."""
        operations = [
            CommitOperationAdd(file.name, file.source if isinstance(file.source, bytes) else str(file.source))
            for file in self.files
        ]
        operations += [CommitOperationDelete(name) for name in self.outdated(list(self.files_at(reference)))]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the memory's
                self.api.create_commit(
                    self.repo, operations, commit_message=self.title, revision=reference, repo_type=self.repo_type
                )
        except (BadRequestError, ValueError) as error:
            raise UserError(f"the Hub refused the files: {one_line(error)}") from error

    def release(self, number: int, head: str) -> str:
        """Put the verified commit of request `number` on the wanted branch, and return the branch's commit."""
        api, revision = self.api, self.settings.revision
        if revision == "main":
            if api.get_discussion_details(self.repo, number, repo_type=self.repo_type).status == "draft":
                api.change_discussion_status(self.repo, number, "open", repo_type=self.repo_type)
            api.merge_pull_request(self.repo, number, repo_type=self.repo_type)
        else:
            if revision not in [
                branch.name for branch in api.list_repo_refs(self.repo, repo_type=self.repo_type).branches
            ]:
                api.create_branch(self.repo, branch=revision, revision=head, repo_type=self.repo_type)
            else:
                # the Hub merges only into main; it has all content already, so this is one small, atomic commit
                self.send(revision)
            api.change_discussion_status(self.repo, number, "closed", repo_type=self.repo_type)
        published = self.complete_commit(revision)
        if published is None:
            raise UserError(
                f"{revision} of {self.repo} differs after the merge ({', '.join(self.differing_files(revision)[:3])}): "
                "somebody else changed it at the same time. Look at it, and run the command again"
            )
        return published

    def add_tag(self, tag: str, commit: str) -> None:
        if tag not in [
            reference.name for reference in self.api.list_repo_refs(self.repo, repo_type=self.repo_type).tags
        ]:
            self.api.create_tag(self.repo, tag=tag, revision=commit, repo_type=self.repo_type)
        elif self.complete_commit(tag) is None:
            raise UserError(f"{self.repo} already has a tag {tag} with other content: choose another --tag")
