"""A loopback stand-in for the Hugging Face Hub: what `huggingface_hub` and timm ask of the real one, and its faults.

Speaks the HTTP interface of the client: repositories with commits, branches, tags and pull requests; preupload, LFS
batch, basic and multipart upload, ndjson commits; model info, trees, and downloads that redirect LFS files to a `CDN`
(the same server by another host name, as the client must not send its token there).
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Dict, List, Optional
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WHEN = '2026-01-01T00:00:00.000Z'
LFS_SUFFIXES = ('.safetensors', '.bin', '.png', '.onnx', '.wasm')
LICENSES = {'apache-2.0', 'mit', 'cc-by-nc-4.0', 'cc-by-4.0', 'other'}
RELATIONS = {'adapter', 'finetune', 'merge', 'quantized'}
REPO_ID = re.compile(r'[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}')


def wrong_in_index(model: dict) -> list[str]:
    """What the Hub does not take in an entry of a card's `model-index`."""
    errors = []
    if not model.get('name') or not isinstance(model.get('results'), list):
        errors.append('"model-index[].name" and "results" are required')
    for result in model.get('results') or []:
        if not (result.get('task', {}).get('type') and result.get('dataset', {}).get('type')
                and result['dataset'].get('name') and result.get('metrics')):
            errors.append('"model-index[].results[]" needs task.type, dataset.type, dataset.name and metrics')
        if not all('type' in m and 'value' in m for m in result.get('metrics') or []):
            errors.append('"metrics" need type and value')
    return errors


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    sdk: Optional[str] = None  # of a Space
    refs: Dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    commits: Dict[str, Dict[str, str]] = field(default_factory=dict)  # commit -> path -> oid
    messages: Dict[str, str] = field(default_factory=dict)  # commit -> summary
    pulls: List[Dict] = field(default_factory=list)

    def commit(self, files: Dict[str, str], message: str, ref: str = 'main') -> str:
        sha = hashlib.sha1(json.dumps([self.refs.get(ref), len(self.commits), files, message]).encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> Optional[str]:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    method: str
    path: str  # regular expression
    do: Callable
    times: int = 1
    after: int = 0  # requests that match and still go well


@dataclass
class Request:
    method: str
    path: str
    authorized: Optional[str]
    host: str
    status: Optional[int] = None


class HubServer:
    """Start with `with HubServer() as hub`; the client's endpoint is `hub.url`."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.blobs: Dict[str, bytes] = {}  # git SHA-1 or LFS SHA-256 -> content
        self.parts: Dict[str, Dict[int, bytes]] = {}
        self.tokens = {'hf_writerWriter01': 'my-org', 'hf_readerReader01': 'reader'}  # token -> namespace
        self.multipart_above: Optional[int] = None
        self.faults: List[Fault] = []
        self.log: List[Request] = []
        self.lock = threading.RLock()
        handler = type('Handler', (_Handler,), dict(hub=self))
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.port = self.server.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.cdn = f'http://localhost:{self.port}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    # what tests say and ask

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: self.blobs[oid] for path, oid in repo.commits[repo.resolve(revision)].items()}

    def put(self, repo_id: str, files: Dict[str, bytes], private: bool = False, ref: str = 'main') -> str:
        """Commit to a repository behind the client's back; the files are all that it holds then."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private=private))
            oids = {}
            for path, data in files.items():
                oid = hashlib.sha256(data).hexdigest() if path.endswith(LFS_SUFFIXES) else git_oid(data)
                self.blobs[oid] = data
                oids[path] = oid
            return repo.commit(oids, 'put', ref)

    def count(self, method: str, path: str) -> int:
        return sum(r.method == method and bool(re.search(path, r.path)) for r in self.log)

    def fail(self, method: str, path: str, status: int, message: str = 'Internal Error', times: int = 1, after=0):
        """Answer requests with a status."""
        self.faults.append(Fault(method, path, lambda h: h.error(status, message), times, after))

    def cut(self, path: str, keep: int = 1000, times: int = 1):
        """Announce a whole file, send `keep` bytes of it and close the connection."""
        def do(handler):
            handler.keep = keep
            return False
        self.faults.append(Fault('GET', path, do, times))

    def refuse(self, method: str, path: str, times: int = 1):
        """Close the connection without an answer."""
        def do(handler):
            handler.close_connection = True
            handler.connection.shutdown(2)
            return True
        self.faults.append(Fault(method, path, do, times))

    def corrupt(self, path: str, times: int = 1):
        """Deliver a file with some bytes changed, of the same size and with the same headers."""
        def do(handler):
            handler.spoil = True
            return False
        self.faults.append(Fault('GET', path, do, times))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    hub: HubServer
    keep: Optional[int] = None
    spoil = False

    def log_message(self, *args):
        pass

    def reply(self, code, body=b'', headers=None, kind='application/json'):
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.request_log.status = code
        size = len(data)
        if self.spoil and data:
            middle = size // 2
            data = data[:middle] + bytes(b ^ 0x55 for b in data[middle:middle + 8]) + data[middle + 8:]
        self.send_response(code)
        for key, value in {'Content-Type': kind, 'Content-Length': str(size), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            if self.keep is not None and len(data) > self.keep:
                data = data[:self.keep]
                self.close_connection = True
            self.wfile.write(data)
            if self.close_connection:
                self.wfile.flush()
        return True

    def error(self, code, message, kind=None):
        """As the Hub says it: `X-Error-Code` is what the client makes its exceptions of."""
        headers = {'X-Error-Message': message, **({'X-Error-Code': kind} if kind else {})}
        return self.reply(code, {'error': message}, headers)

    def handle_request(self):
        hub = self.hub
        self.keep, self.spoil = None, False
        self.url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(self.url.query).items()}
        authorization = self.headers.get('Authorization')
        self.request_log = Request(self.command, self.path, authorization, self.headers.get('Host', ''))
        self.user = hub.tokens.get((authorization or '').removeprefix('Bearer '))
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        with hub.lock:
            hub.log.append(self.request_log)
            for fault in hub.faults:
                if fault.method == self.command and fault.times > 0 and re.search(fault.path, self.path):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    if fault.do(self):
                        return
            if authorization and self.user is None and not self.url.path.startswith('/cdn/'):
                self.error(401, 'Invalid credentials in Authorization header')
                return
            self.route()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def route(self):
        path, method = self.url.path, self.command
        routes = [
            ('GET', r'/api/whoami-v2', self.whoami),
            ('POST', r'/api/repos/create', self.create),
            ('POST', r'/api/validate-yaml', self.validate_yaml),
            ('POST', r'/(?:spaces/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch', self.lfs_batch),
            ('PUT', r'/lfs/(?P<oid>\w{64})', self.lfs_put),
            ('PUT', r'/lfs/(?P<oid>\w{64})/(?P<part>\d+)', self.lfs_part),
            ('POST', r'/lfs/(?P<oid>\w{64})/complete', self.lfs_complete),
            ('POST', r'/lfs/(?P<oid>\w{64})/verify', self.lfs_verify),
            ('POST', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)', self.preupload),
            ('POST', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)', self.commit),
            ('POST', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)', self.paths_info),
            ('GET', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)', self.tree),
            ('GET', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/refs', self.refs),
            ('GET', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)/discussions', self.discussions),
            ('GET', r'/api/(?:models|spaces)/(?P<repo_id>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?', self.info),
            ('GET', r'/cdn/(?P<oid>\w+)', self.cdn),
            ('GET', r'/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<file>.+)', self.resolve),
        ]
        for verb, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match and method in (verb, 'HEAD' if verb == 'GET' else verb):
                return answer(**{key: value and unquote(value) for key, value in match.groupdict().items()})
        return self.error(404, f'the stand-in knows no {method} {path}')

    # accounts and repositories

    def whoami(self):
        if self.user is None:
            return self.error(401, 'Invalid credentials in Authorization header')
        return self.reply(200, {'type': 'user', 'name': self.user, 'orgs': [], 'auth': {'type': 'access_token'}})

    def repo(self, repo_id, write=False):
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split('/')[0]):
            self.error(401 if self.user is None else 404, 'Repository not found', 'RepoNotFound')
            return None
        if write and self.user != repo_id.split('/')[0] and 'create_pr' not in self.query:
            self.error(403, 'Forbidden: you must use a write token to upload to a repository.')
            return None
        return repo

    def head(self, repo, revision):
        sha = repo.resolve(revision or 'main')
        if sha is None:
            self.error(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha

    def create(self):
        asked = json.loads(self.body)
        repo_id = f'{asked.get("organization") or self.user}/{asked["name"]}'
        if self.user is None:
            return self.error(401, 'Invalid username or password.')
        if not REPO_ID.fullmatch(repo_id) or repo_id.endswith('.git'):
            return self.error(400, f'Invalid repo name: {asked["name"]}')
        if self.user != repo_id.split('/')[0]:
            return self.error(403, "You don't have the rights to create a model under this namespace")
        url = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self.hub.repos:
            return self.reply(409, dict(url, error='You already created this model repo'))
        repo = self.hub.repos[repo_id] = Repo(asked.get('visibility') == 'private', asked.get('sdk'))
        data = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'
        self.hub.blobs[git_oid(data)] = data
        repo.commit({'.gitattributes': git_oid(data)}, 'initial commit')
        return self.reply(200, url)

    def validate_yaml(self):
        """Rules of the Hub for metadata that a card can break."""
        content = json.loads(self.body)['content']
        match = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as e:
            data, errors = {}, [f'bad YAML: {e}']
        if not isinstance(data, dict):
            data, errors = {}, errors or ['no metadata']
        if data.get('license') is not None and data['license'] not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}')
        if data.get('license') == 'other' and not (data.get('license_name') and data.get('license_link')):
            errors.append('"license_name" and "license_link" are required with license: other')
        if data.get('base_model_relation') not in {None, *RELATIONS}:
            errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
        models = data.get('base_model') or []
        for key, ids in (('base_model', [models] if isinstance(models, str) else models),
                         ('datasets', data.get('datasets') or [])):
            errors += [f'"{key}" with value "{i}" is not valid' for i in ids if not REPO_ID.fullmatch(i)]
        if not all(isinstance(tag, str) for tag in data.get('tags') or []):
            errors.append('"tags" must be strings')
        for model in data.get('model-index') or []:
            errors += wrong_in_index(model)
        return self.reply(400 if errors else 200, {'errors': [{'message': e} for e in errors], 'warnings': []})

    # uploads

    def preupload(self, repo_id, rev):
        repo = self.repo(repo_id, write=True)
        sha = repo and self.head(repo, rev)
        if sha:
            files = repo.commits[sha]
            self.reply(200, {'commitOid': sha, 'files': [
                {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(LFS_SUFFIXES) else 'regular',
                 'shouldIgnore': False, 'oid': files.get(f['path'])} for f in json.loads(self.body)['files']]})

    def lfs_batch(self, repo_id):
        if not self.user or not self.repo(repo_id, write=repo_id.split('/')[0] == self.user):
            return None if self.user else self.error(401, 'Unauthorized')
        objects = []
        for o in json.loads(self.body)['objects']:
            oid, size, link = o['oid'], o['size'], f'{self.hub.url}/lfs/{o["oid"]}'
            entry = {'oid': oid, 'size': size}
            if oid not in self.hub.blobs:
                upload = {'href': link, 'header': {}}
                chunk = self.hub.multipart_above
                if chunk and size > chunk:
                    parts = {str(i + 1): f'{link}/{i + 1}' for i in range(-(-size // chunk))}
                    upload = {'href': f'{link}/complete', 'header': {'chunk_size': str(chunk), **parts}}
                entry['actions'] = {'upload': upload, 'verify': {'href': f'{link}/verify', 'header': {}}}
            objects.append(entry)
        return self.reply(200, {'transfer': 'basic', 'objects': objects}, kind='application/vnd.git-lfs+json')

    def store(self, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            return self.error(400, 'the content does not have this SHA-256')
        self.hub.blobs[oid] = data
        return self.reply(200)

    def lfs_put(self, oid):
        return self.store(oid, self.body)

    def lfs_part(self, oid, part):
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return self.reply(200, headers={'ETag': f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid):
        return self.store(oid, b''.join(data for _, data in sorted(self.hub.parts.pop(oid, {}).items())))

    def lfs_verify(self, oid):
        return self.reply(200, {}) if oid in self.hub.blobs else self.error(404, 'not uploaded')

    def commit(self, repo_id, rev):
        repo = self.repo(repo_id, write=True)
        sha = repo and self.head(repo, rev)
        if not sha:
            return None
        files, message = dict(repo.commits[sha]), ''
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item['key'], item['value']
            if key == 'header':
                message = value['summary']
            elif key == 'file':
                data = base64.b64decode(value['content'])
                files[value['path']] = git_oid(data)
                self.hub.blobs[git_oid(data)] = data
            elif key == 'lfsFile':
                if value['oid'] not in self.hub.blobs:
                    return self.error(400, f'{value["path"]} was not uploaded')
                files[value['path']] = value['oid']
            elif key == 'deletedFile':
                if files.pop(value['path'], None) is None:
                    return self.error(404, "A file with this name doesn't exist", 'EntryNotFound')
        answer = {'success': True}
        ref = rev
        if 'create_pr' in self.query:
            number = len(repo.pulls) + 1
            ref = f'refs/pr/{number}'
            repo.refs[ref] = sha
            repo.pulls.append({
                'num': number, 'title': message, 'status': 'open', 'isPullRequest': True, 'createdAt': WHEN,
                'author': {'name': self.user}, 'repo': {'name': repo_id, 'type': 'model'}})
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
        new = repo.commit(files, message, ref)
        return self.reply(200, dict(answer, commitOid=new, commitUrl=f'{self.hub.url}/{repo_id}/commit/{new}'))

    # questions

    def entry(self, path, oid):
        data = self.hub.blobs[oid]
        out = {'type': 'file', 'path': path, 'oid': git_oid(data), 'size': len(data)}
        return dict(out, lfs={'oid': oid, 'size': len(data), 'pointerSize': 134}) if len(oid) == 64 else out

    def tree(self, repo_id, rev):
        repo = self.repo(repo_id)
        sha = repo and self.head(repo, rev)
        if sha:
            self.reply(200, [self.entry(p, oid) for p, oid in sorted(repo.commits[sha].items())])

    def paths_info(self, repo_id, rev):
        repo = self.repo(repo_id)
        sha = repo and self.head(repo, rev)
        if sha:
            files = repo.commits[sha]
            self.reply(200, [self.entry(p, files[p]) for p in json.loads(self.body)['paths'] if p in files])

    def refs(self, repo_id):
        repo = self.repo(repo_id)
        if repo:
            branches = [{'name': n, 'ref': f'refs/heads/{n}', 'targetCommit': s}
                        for n, s in repo.refs.items() if not n.startswith('refs/')]
            self.reply(200, {'branches': branches, 'tags': [], 'converts': []})

    def discussions(self, repo_id):
        repo = self.repo(repo_id)
        if repo:
            self.reply(200, {'discussions': repo.pulls, 'count': len(repo.pulls), 'start': 0})

    def info(self, repo_id, rev=None):
        repo = self.repo(repo_id)
        sha = repo and self.head(repo, rev)
        if sha:
            files = repo.commits[sha]
            card = {}
            if 'README.md' in files:
                match = re.match(r'---\n(.*?)\n---\n', self.hub.blobs[files['README.md']].decode(), re.DOTALL)
                card = yaml.safe_load(match[1]) if match else {}
            self.reply(200, {
                '_id': sha[:24], 'id': repo_id, 'modelId': repo_id, 'author': repo_id.split('/')[0], 'sha': sha,
                'lastModified': WHEN, 'createdAt': WHEN, 'private': repo.private, 'disabled': False, 'gated': False,
                'sdk': repo.sdk, 'downloads': 0, 'likes': 0, 'tags': card.get('tags', []), 'cardData': card,
                'library_name': card.get('library_name'), 'pipeline_tag': card.get('pipeline_tag'),
                'siblings': [{'rfilename': p} for p in sorted(files)], 'spaces': []})

    def resolve(self, repo_id, rev, file):
        repo = self.repo(repo_id)
        sha = repo and self.head(repo, rev)
        if not sha:
            return None
        oid = repo.commits[sha].get(file)
        if oid is None:
            return self.reply(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': sha})
        data = self.hub.blobs[oid]
        headers = {'X-Repo-Commit': sha, 'ETag': f'"{oid}"'}
        if len(oid) == 64:
            return self.reply(302, b'', {
                **headers, 'X-Linked-ETag': f'"{oid}"', 'X-Linked-Size': str(len(data)),
                'Location': f'{self.hub.cdn}/cdn/{oid}'})
        return self.reply(200, data, headers, 'text/plain')

    def cdn(self, oid):
        data = self.hub.blobs[oid]
        headers = {'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'}
        wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if not wanted:
            return self.reply(200, data, headers, 'application/octet-stream')
        start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers['Content-Range'] = f'bytes {start}-{end}/{len(data)}'
        return self.reply(206, data[start:end + 1], headers, 'application/octet-stream')
