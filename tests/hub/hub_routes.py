"""What each route of the Hub answers. Every function takes the call and returns an answer, or raises one."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml
from hub_store import MAIN, Blob, Repo, User, kept_in_lfs

if TYPE_CHECKING:
    from hub_server import HubServer

DATE = "2026-01-02T03:04:05.000Z"
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass(frozen=True)
class Answer:
    """A reply: a status, headers, and a body that is JSON unless it is bytes."""

    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One request on its way through the server."""

    hub: "HubServer"
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    parts: dict[str, str]
    token: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Refused(Exception):
    """Ends a call with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Elsewhere(Exception):
    """Ends a call with a redirect to another path of this server."""


def answer(route: str, call: Call) -> Answer:
    """Carry out a call."""
    try:
        found = HANDLERS[route](call)
    except Refused as refused:
        headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
        return Answer(refused.status, {"error": str(refused)}, headers)
    except Elsewhere as elsewhere:
        return Answer(307, {}, {"Location": str(elsewhere)})
    return found if isinstance(found, Answer) else Answer(200, found)


def user_of(call: Call) -> User | None:
    if call.token is None:
        return None
    if call.token not in call.hub.store.users:
        raise Refused(401, "Invalid credentials in Authorization header")
    return call.hub.store.users[call.token]


def repo_of(call: Call, write: bool = False, content: bool = False) -> Repo:
    """Return the repository that a call is about, if its user may see, write, or read the files of it."""
    kind, id = (call.parts.get("kind") or "models").removesuffix("s"), call.parts["id"]
    user, store = user_of(call), call.hub.store
    if (kind, id) in store.moved:
        raise Elsewhere(call.path.replace(id, store.moved[kind, id], 1))
    repo = store.repos.get((kind, id))
    owns = repo is not None and may_write(user, repo.owner)
    reader = (
        repo is not None and user is not None and (repo.owner in (user.name, *user.orgs) or user.name in repo.granted)
    )
    if repo is None or (repo.private and not reader):
        raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
    if write and not owns:
        raise Refused(403 if user else 401, "You don't have the required permissions to write to this repository")
    if content and repo.gated and not reader:
        raise Refused(403 if user else 401, f"Access to {kind} {id} is restricted.", "GatedRepo")
    return repo


def may_write(user: User | None, namespace: str) -> bool:
    return user is not None and user.role != "read" and namespace in (user.name, *user.orgs)


def revision_of(repo: Repo, call: Call) -> str:
    sha = repo.resolve(call.parts.get("revision") or "main")
    if sha is None:
        raise Refused(404, f"Invalid rev id: {call.parts.get('revision')}", "RevisionNotFound")
    return sha


def whoami(call: Call) -> Any:
    user = user_of(call)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.orgs]
    return {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth}


def create(call: Call) -> Any:
    user, told = user_of(call), call.json
    if user is None:
        raise Refused(401, "Invalid username or password.")
    namespace, kind = told.get("organization") or user.name, told.get("type") or "model"
    id = f"{namespace}/{told['name']}"
    if not may_write(user, namespace):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    url = {"url": f"{call.hub.url}/{'' if kind == 'model' else kind + 's/'}{id}", "name": id, "id": id}
    if (kind, id) in call.hub.store.repos:
        message = f"You already created this {kind} repo"
        return Answer(409, {"error": message, **url}, {"X-Error-Message": message})
    call.hub.store.add(id, type=kind, private=told.get("visibility") == "private")
    return url


def _by_body(call: Call) -> Call:
    """Let the id in a request's body stand for one in its path."""
    told = call.json
    user = user_of(call)
    namespace = told.get("organization") or (user.name if user else "")
    call.parts.update(kind=(told.get("type") or "model") + "s", id=f"{namespace}/{told['name']}")
    return call


def delete(call: Call) -> Any:
    repo = repo_of(_by_body(call), write=True)
    del call.hub.store.repos[repo.type, repo.id]
    return {}


def move(call: Call) -> Any:
    told = call.json
    kind = told.get("type") or "model"
    call.parts.update(kind=kind + "s", id=told["fromRepo"])
    repo_of(call, write=True)
    call.hub.store.move(told["fromRepo"], told["toRepo"], kind)
    return {}


def settings(call: Call) -> Any:
    repo, told = repo_of(call, write=True), call.json
    repo.gated = told.get("gated", repo.gated)
    if "visibility" in told:
        repo.private = told["visibility"] == "private"
    return {"private": repo.private, "gated": repo.gated}


def auth_check(call: Call) -> Any:
    repo_of(call, write="write" in call.parts, content=True)
    return {}


def info(call: Call) -> Any:
    repo = repo_of(call)
    sha, header = revision_of(repo, call), repo.header()
    files = repo.commits[sha].files
    tags = header.get("tags") or []
    return {
        "_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.owner, "sha": sha, "lastModified": DATE,
        "createdAt": DATE, "private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0,
        "tags": [*tags, *([f"library:{header['library_name']}"] if "library_name" in header else [])],
        "pipeline_tag": header.get("pipeline_tag"), "library_name": header.get("library_name"), "cardData": header,
        "siblings": [sibling(name, blob, "blobs" in call.query) for name, blob in sorted(files.items())],
    }  # fmt: skip


def sibling(name: str, blob: Blob, details: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": name}
    if details:
        row |= {"size": len(blob.content), "blobId": blob.oid}
    if details and blob.lfs:
        row["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return row


def refs(call: Call) -> Any:
    repo = repo_of(call)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    places = {"refs/heads/": "branches", "refs/tags/": "tags", "refs/pr/": "pullRequests"}
    for ref, sha in repo.refs.items():
        start = next(place for place in places if ref.startswith(place))
        name = ref if start == "refs/pr/" else ref.removeprefix(start)
        found[places[start]].append({"name": name, "ref": ref, "targetCommit": sha})
    return found


def commits(call: Call) -> Any:
    repo = repo_of(call)
    sha: str | None = revision_of(repo, call)
    found = []
    while sha:
        commit = repo.commits[sha]
        found.append({"id": sha, "title": commit.title, "message": "", "date": DATE, "authors": [{"user": repo.owner}]})
        sha = commit.parent
    return found


def entry(path: str, blob: Blob) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.lfs:
        row["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return row


def tree(call: Call) -> Any:
    repo = repo_of(call)
    files = repo.commits[revision_of(repo, call)].files
    below = f"{call.parts['path'].rstrip('/')}/" if "path" in call.parts else ""
    inside = {path: blob for path, blob in files.items() if path.startswith(below)}
    if below and not inside:
        raise Refused(404, f"{below} does not exist", "EntryNotFound")
    folders = {path[: i.start()] for path in inside for i in re.finditer("/", path) if i.start() >= len(below)}
    deep = call.query.get("recursive", "false").lower() in ("true", "1")
    folders = {name for name in folders if deep or "/" not in name[len(below) :]}
    rows = [{"type": "directory", "path": n, "oid": hashlib.sha1(n.encode()).hexdigest(), "size": 0} for n in folders]
    rows += [entry(path, blob) for path, blob in inside.items() if deep or "/" not in path[len(below) :]]
    return sorted(rows, key=lambda row: row["path"])


def paths_info(call: Call) -> Any:
    repo = repo_of(call)
    files = repo.commits[revision_of(repo, call)].files
    rows = []
    for path in parse_qs(call.body.decode()).get("paths", []):
        if path in files:
            rows.append(entry(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            rows.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0})
    return rows


def preupload(call: Call) -> Any:
    to_pull_request = "create_pr" in call.query
    repo = repo_of(call, write=not to_pull_request)
    files = repo.commits[revision_of(repo, call)].files
    rows = []
    for told in call.json["files"]:
        large = kept_in_lfs(told["path"], base64.b64decode(told["sample"]), told["size"])
        row = {"path": told["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if told["path"] in files:
            blob = files[told["path"]]
            row["oid"] = blob.sha256 if blob.lfs else blob.oid
        rows.append(row)
    return {"files": rows}


def xet_token(call: Call) -> Any:
    raise Refused(404, "There is no xet storage here")


def lfs_batch(call: Call) -> Any:
    repo = repo_of(call, write="ref" in call.json)
    place = f"lfs/{repo.type}s/{repo.id}"
    rows = []
    for told in call.json["objects"]:
        row = {"oid": told["oid"], "size": told["size"]}
        if repo.stored(told["oid"]) is None:
            upload = {"href": f"{call.hub.storage}/{place}/{told['oid']}"}
            row["actions"] = {"upload": upload, "verify": {"href": f"{call.hub.url}/{place}/verify"}}
        rows.append(row)
    return {"transfer": "basic", "objects": rows}


def _stored_in(call: Call) -> Repo:
    return call.hub.store.repos[call.parts["kind"].removesuffix("s"), call.parts["id"]]


def lfs_upload(call: Call) -> Any:
    if hashlib.sha256(call.body).hexdigest() == call.parts["oid"]:  # storage drops what is not what it should be
        _stored_in(call).uploads[call.parts["oid"]] = call.body
    return {}


def lfs_verify(call: Call) -> Any:
    held = repo_of(call).stored(call.json["oid"])
    if held is None or len(held) != call.json["size"]:
        raise Refused(400, "The uploaded file does not have the announced hash and size")
    return {}


def storage(call: Call) -> Any:
    content = _stored_in(call).stored(call.parts["oid"])
    if content is None:
        raise Refused(404, "NoSuchKey")
    return _ranged(call, content, Answer(200, content, {"Content-Type": "application/octet-stream"}))


def _ranged(call: Call, content: bytes, whole: Answer) -> Answer:
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    if not found:
        return whole
    start, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
    place = {"Content-Range": f"bytes {start}-{last}/{len(content)}"}
    return Answer(206, content[start : last + 1], {**whole.headers, **place})


def resolve(call: Call) -> Any:
    repo = repo_of(call, content=True)
    sha, path = revision_of(repo, call), call.parts["path"]
    if path not in repo.commits[sha].files:
        message = f"Entry not found: {path}"
        headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": sha}
        return Answer(404, {"error": message}, headers)
    blob = repo.commits[sha].files[path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain", "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return _ranged(call, blob.content, Answer(200, blob.content, headers))
    linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    place = f"{call.hub.storage}/storage/{repo.type}s/{repo.id}/{blob.sha256}"
    return Answer(302, b"", {**headers, **linked, "Location": place})


def commit(call: Call) -> Any:
    to_pull_request = "create_pr" in call.query
    repo = repo_of(call, write=not to_pull_request)
    user = user_of(call)
    if user is None or user.role == "read":
        raise Refused(403 if user else 401, "You don't have the required permissions")
    base = revision_of(repo, call)
    lines = [json.loads(line) for line in call.body.splitlines() if line]
    header = lines[0]["value"]
    parent = header.get("parentCommit")
    if parent and not to_pull_request and not base.startswith(parent):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    add, remove = _changes(repo, lines[1:], repo.commits[base].files)
    url = f"{call.hub.url}/{'' if repo.type == 'model' else repo.type + 's/'}{repo.id}"
    if to_pull_request:
        number = len(repo.pulls) + 1
        done = repo.write(add, header["summary"], remove, f"refs/pr/{number}", parent or base)
        repo.pulls.append({"num": number, "title": header["summary"], "author": user.name, "status": "open"})
        pull = {"pullRequestUrl": f"{url}/discussions/{number}"}
        return {"success": True, "commitOid": done.sha, "commitUrl": f"{url}/commit/{done.sha}", **pull}
    given = call.parts["revision"]
    ref = given if given.startswith("refs/") else MAIN if given == "main" else f"refs/heads/{given}"
    done = repo.write(add, header["summary"], remove, ref)
    return {"success": True, "commitOid": done.sha, "commitUrl": f"{url}/commit/{done.sha}"}


def _changes(
    repo: Repo, lines: list[dict[str, Any]], files: dict[str, Blob]
) -> tuple[dict[str, Blob], tuple[str, ...]]:
    """Return files to write and to delete; refuse the whole commit if one of them is not possible."""
    add, remove = {}, []
    for line in lines:
        value = line["value"]
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"Invalid path {path}")
        if line["key"] == "file":
            add[path] = Blob(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            held = repo.stored(value["oid"])
            if held is None:
                raise Refused(400, f"LFS object {value['oid']} was not uploaded")
            add[path] = Blob(held, lfs=True)
        elif line["key"] == "deletedFile" and path not in files:
            raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            remove.append(path if line["key"] == "deletedFile" else path.rstrip("/") + "/")
    if "README.md" in add:
        problems, _ = yaml_problems(add["README.md"].content.decode())
        if problems:
            raise Refused(400, "; ".join(problems))
    return add, tuple(remove)


def discussions(call: Call) -> Any:
    repo = repo_of(call)
    rows = [
        {**pull, "author": {"name": pull["author"]}, "createdAt": DATE, "isPullRequest": True,
         "repo": {"name": repo.id, "type": repo.type}}
        for pull in repo.pulls
    ]  # fmt: skip
    return {"discussions": rows, "count": len(rows), "start": 0}


def validate(call: Call) -> Any:
    problems, notes = yaml_problems(call.json["content"])
    body = {"errors": [{"message": text} for text in problems], "warnings": [{"message": text} for text in notes]}
    return Answer(400 if problems else 200, body)


def yaml_problems(card: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings about the header of a card."""
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML: {str(error).splitlines()[0]}"], []
    if not isinstance(header, dict):
        return ["YAML metadata must be a mapping"], []
    problems = [f'"{key}" must be a string' for key in STRINGS if not isinstance(header.get(key, ""), str)]
    for key in ("tags", "datasets", "metrics", "base_model", "language"):
        value = header.get(key, [])
        if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))):
            problems.append(f'"{key}" must be a string or a list of strings')
    if header.get("base_model_relation", "finetune") not in RELATIONS:
        problems.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for name in ("base_model", "datasets"):
        for value in [header[name]] if isinstance(header.get(name), str) else header.get(name) or []:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                problems.append(f'"{name}" must name repositories, found {value}')
    return problems + _index_problems(header.get("model-index", [])), []


STRINGS = ("license", "library_name", "pipeline_tag", "base_model_relation", "extra_gated_prompt")


def _index_problems(index: Any) -> list[str]:
    try:
        for model in index:
            assert isinstance(model["name"], str), "name"
            for result in model["results"]:
                assert isinstance(result["task"]["type"], str), "task.type"
                assert isinstance(result["dataset"]["type"], str), "dataset.type"
                assert isinstance(result["dataset"]["name"], str), "dataset.name"
                for metric in result["metrics"]:
                    assert isinstance(metric["type"], str), "metrics.type"
                    assert isinstance(metric["value"], int | float | str | dict), "metrics.value"
    except (AssertionError, KeyError, TypeError) as error:
        return [f'"model-index" is not well formed: {error}']
    return []


HANDLERS: dict[str, Callable[[Call], Any]] = {
    "agent": lambda call: {"standardEnvVars": [], "harnesses": {}},
    "whoami": whoami,
    "validate": validate,
    "create": create,
    "delete": delete,
    "move": move,
    "settings": settings,
    "auth-check": auth_check,
    "info": info,
    "refs": refs,
    "commits": commits,
    "tree": tree,
    "paths-info": paths_info,
    "preupload": preupload,
    "commit": commit,
    "discussions": discussions,
    "resolve": resolve,
    "xet-token": xet_token,
    "lfs-batch": lfs_batch,
    "lfs-upload": lfs_upload,
    "lfs-verify": lfs_verify,
    "storage": storage,
}
