"""`blipren push`: a checkpoint on the Hub, all of it or nothing.

Everything goes to a pull request first. When the Hub's own hashes of all files agree with ours, the request is merged
(or the wanted branch is set to it) and tagged. A run that was stopped is simply started again: it finds its request by
the digest of what is to be published, and what the Hub already has is not sent a second time.
"""

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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

from blipren.model_card.build import CardSources, build_card
from blipren.training.commands.push import PushSettings
from blipren.training.errors import UserError
from blipren.training.hub.package import PlannedFile, check_private, collect, is_published, local_bases, read_config

PROTECTED = (".gitattributes", ".gitignore")


@dataclass(frozen=True)
class Plan:
    """What is to be published where. The digest names it: equal content, equal digest."""

    repo: str
    revision: str
    files: list[PlannedFile]

    @property
    def title(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.sha256()}\n".encode())
        return f"Publish {digest.hexdigest()[:16]} on {self.revision}"


def push(settings: PushSettings) -> None:
    """Publishes `settings.model` as `settings.repo`, or with `dry_run` only says what would be sent.

    Raises:
        UserError: when the checkpoint must not or cannot be published, or the Hub refuses or cannot be reached.
    """
    publish_folder(settings)


def publish_folder(settings: PushSettings) -> str | None:
    """As [`push`]; returns the id of the published commit, None for a dry run."""
    with tempfile.TemporaryDirectory(prefix="blipren-push-") as scratch:
        folder = _right_kind(Path(settings.model), settings.bridge, Path(scratch))
        plan = make_plan(folder, settings)
        describe(plan)
        if settings.dry_run:
            print("dry run: nothing was sent")
            return None
        return publish(plan, settings)


def _right_kind(model: Path, bridge: bool, scratch: Path) -> Path:
    """The folder itself where it is of the wanted kind, else a conversion of it in `scratch`."""
    if not model.is_dir():
        raise UserError(f"{model} is not a folder: push takes a checkpoint folder, as `blipren train` leaves it")
    config = read_config(model)
    if bridge:
        for part, base in local_bases(config).items():
            raise UserError(
                f"the bridge stands on a {part} model from the local folder {base}, so nobody else could load it: "
                "publish it in full (without --bridge), or make it on a base from the Hub"
            )
    wanted = "bridge" if bridge else "full"
    if config.get("checkpoint_type", "full") == wanted:
        return model
    from blipren.training.hub.convert import convert_folder

    print(f"{model} is a {config['checkpoint_type']} checkpoint: making a {wanted} one of it")
    convert_folder(model, scratch / "checkpoint", wanted)
    return scratch / "checkpoint"


def make_plan(folder: Path, settings: PushSettings) -> Plan:
    """Files of the checkpoint, the card built from the run, its pictures and evaluation results."""
    config = read_config(folder)
    files = collect(folder, config)
    sources = CardSources(
        model=folder,
        run=Path(settings.run) if settings.run else Path(settings.model),
        evaluation=Path(settings.evaluation) if settings.evaluation else None,
        cache=Path(settings.cache) if settings.cache else None,
        pictures=settings.pictures,
        tag=settings.tag,
        license=settings.license,
        base_licenses={"vision": settings.vision_license, "llm": settings.llm_license},
    )
    for name, content in build_card(settings.repo, sources).items():
        file = PlannedFile(name, content)
        if not is_published(name):
            raise ValueError(f"the card builder made {name}, which is not among the files that may be published")
        check_private(file)
        files.append(file)
    return Plan(settings.repo, settings.revision, sorted(files, key=lambda file: file.name))


def describe(plan: Plan) -> None:
    """Prints every file with its size."""
    width = max(len(file.name) for file in plan.files)
    for file in plan.files:
        print(f"  {file.name:<{width}}  {human_size(file.size):>9}")
    total = sum(file.size for file in plan.files)
    print(f"  {len(plan.files)} files, {human_size(total)}, to {plan.repo} ({plan.revision})")


def human_size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def publish(plan: Plan, settings: PushSettings) -> str:
    """Carries a plan out and returns the id of the published commit. Every step may be repeated without harm."""
    api = HfApi()
    for attempt in range(1, settings.attempts + 1):
        try:
            commit = _publish_once(api, plan, settings)
            break
        except (LocalTokenNotFoundError, RepositoryNotFoundError) as error:
            raise UserError(f"{plan.repo} cannot be written with this token: log in with `hf auth login`") from error
        except OfflineModeIsEnabled as error:
            raise UserError("the Hub is switched off here (HF_HUB_OFFLINE): unset it to publish") from error
        except (HfHubHTTPError, httpx2.TransportError, RuntimeError) as error:
            problem = _transient(error)
            if problem is None:
                raise UserError(f"the Hub refused: {_one_line(error)}") from error
            if attempt == settings.attempts:
                raise UserError(
                    f"the Hub failed {attempt} times, last with: {problem}. {plan.revision} of {plan.repo} is as it "
                    "was, or complete; run the same command again to go on from here"
                ) from error
            print(f"attempt {attempt} of {settings.attempts} failed ({problem}); going on from where it stopped")
            time.sleep(min(2**attempt, 30))
    print(f"published: {api.endpoint}/{plan.repo}/tree/{settings.tag or plan.revision}  (commit {commit})")
    return commit


def _transient(error: BaseException) -> str | None:
    """What went wrong, where trying again may help; None where it cannot. Upload errors come wrapped."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, httpx2.TransportError):
        return _one_line(error) or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _one_line(error) if status is not None and (status >= 500 or status in (408, 409, 412, 429)) else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _publish_once(api: HfApi, plan: Plan, settings: PushSettings) -> str:
    api.create_repo(plan.repo, private=settings.private, exist_ok=True)
    head = _commit_with(api, plan, plan.revision)
    if head is None:
        number = _find_or_open_request(api, plan)
        reference = f"refs/pr/{number}"
        if _commit_with(api, plan, reference) is None:
            _send(api, plan, reference)
        head = _commit_with(api, plan, reference)
        if head is None:
            raise UserError(
                f"what the Hub holds in {reference} of {plan.repo} is not what was sent: {_difference(api, plan, reference)}. "
                f"Nothing was merged; run the command again"
            )
        print(f"all {len(plan.files)} files verified in {reference}")
        head = _release(api, plan, number, head)
    if settings.tag:
        _tag(api, plan, settings.tag, head)
    return head


def _find_or_open_request(api: HfApi, plan: Plan) -> int:
    """The open request of an earlier run with this very content, else a new one."""
    for discussion in api.get_repo_discussions(plan.repo, discussion_type="pull_request"):
        if discussion.title == plan.title and discussion.status in ("draft", "open"):
            print(f"going on with pull request {discussion.num}")
            return discussion.num
    text = "Made by `blipren push`. It is merged when all files are verified; until then main is as it was."
    return api.create_pull_request(plan.repo, title=plan.title, description=text).num


def _listing(api: HfApi, plan: Plan, revision: str) -> dict[str, tuple[int, str]]:
    """Name -> (size, hash) of every file at a revision: SHA-256 for large files, git's SHA-1 for others."""
    tree = api.list_repo_tree(plan.repo, recursive=True, revision=revision)
    files = (entry for entry in tree if hasattr(entry, "blob_id"))
    return {f.path: (f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in files}


def _unwanted(names: list[str], plan: Plan) -> list[str]:
    """Files of an earlier publication that this one no longer has, such as shards; others' files are left alone."""
    wanted = {file.name for file in plan.files}
    return [name for name in names if name not in wanted and name not in PROTECTED and _is_ours_or_harmful(name)]


def _is_ours_or_harmful(name: str) -> bool:
    return is_published(name) or name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))


def _differences(api: HfApi, plan: Plan, revision: str) -> list[str]:
    there = _listing(api, plan, revision)
    wrong = []
    for file in plan.files:
        size, digest = there.get(file.name, (None, ""))
        if size != file.size or digest != (file.sha256() if len(digest) == 64 else file.git_sha1()):
            wrong.append(file.name)
    return wrong + _unwanted(list(there), plan)


def _difference(api: HfApi, plan: Plan, revision: str) -> str:
    return ", ".join(_differences(api, plan, revision)[:3])


def _commit_with(api: HfApi, plan: Plan, revision: str) -> str | None:
    """Id of the commit at `revision` if it holds exactly what is planned, by the Hub's hashes."""
    try:
        commit = api.repo_info(plan.repo, revision=revision).sha
    except RevisionNotFoundError:
        return None
    return commit if not _differences(api, plan, commit) else None


def _send(api: HfApi, plan: Plan, reference: str) -> None:
    """One commit with all files; large ones are uploaded before it, so that it is all or nothing."""
    operations = [
        CommitOperationAdd(file.name, file.source if isinstance(file.source, bytes) else str(file.source))
        for file in plan.files
    ]
    gone = _unwanted(list(_listing(api, plan, reference)), plan)
    operations += [CommitOperationDelete(name) for name in gone]
    try:
        api.create_commit(plan.repo, operations, commit_message=plan.title, revision=reference)
    except (BadRequestError, ValueError) as error:
        raise UserError(f"the Hub refused the files: {_one_line(error)}") from error


def _release(api: HfApi, plan: Plan, number: int, head: str) -> str:
    """Puts the verified commit on the wanted branch: merges into main, points a new branch at it."""
    if plan.revision == "main":
        if api.get_discussion_details(plan.repo, number).status == "draft":
            api.change_discussion_status(plan.repo, number, "open")
        api.merge_pull_request(plan.repo, number)
    else:
        branches = [branch.name for branch in api.list_repo_refs(plan.repo).branches]
        if plan.revision not in branches:
            api.create_branch(plan.repo, branch=plan.revision, revision=head)
        else:
            # the Hub merges only into main; all content is there already, so this is one small, atomic commit
            _send(api, plan, plan.revision)
        api.change_discussion_status(plan.repo, number, "closed")
    published = _commit_with(api, plan, plan.revision)
    if published is None:
        raise UserError(
            f"{plan.revision} of {plan.repo} differs after the merge ({_difference(api, plan, plan.revision)}): somebody "
            "else changed it at the same time. Look at it, and run the command again"
        )
    return published


def _tag(api: HfApi, plan: Plan, tag: str, commit: str) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(plan.repo).tags}
    if tag not in tags:
        api.create_tag(plan.repo, tag=tag, revision=commit)
    elif _commit_with(api, plan, tag) is None:
        raise UserError(f"{plan.repo} already has a tag {tag} with other content: choose another --tag")
