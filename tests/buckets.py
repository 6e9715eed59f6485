"""A bucket `gs://NAME` on this machine: a folder, which fsspec (with it epath and Orbax) and TensorStore see as one.

fsspec is given a file system, TensorStore a server that speaks as much of Google's JSON API as TensorStore uses.
"""

import contextlib
import http.server
import json
import os
import pathlib
import sys
import threading
import types
import urllib.parse

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


def register(root):
  """Makes each folder under `root` a bucket for fsspec, and for Orbax, which asks Google's library for its kind."""

  class Buckets(DirFileSystem):
    protocol = ('gcs', 'gs')

    def __init__(self, **kwargs):
      super().__init__(path=str(root), fs=LocalFileSystem(auto_mkdir=True), **kwargs)

    def _join(self, path):
      return super()._join(path if isinstance(path, list) else str(path).removeprefix('gs://'))

  for name in Buckets.protocol:
    fsspec.register_implementation(name, Buckets, clobber=True)
  google = types.ModuleType('google.cloud.storage')
  google.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
  sys.modules |= {'google.cloud': types.ModuleType('google.cloud'), 'google.cloud.storage': google}
  sys.modules['google.cloud'].storage = google


@contextlib.contextmanager
def open_buckets(root):
  """Serves the folders under `root` as buckets, in this process."""
  register(root)

  class Handler(_Handler):
    home = pathlib.Path(root)

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ['TENSORSTORE_GCS_HTTP_URL'] = f'http://127.0.0.1:{server.server_port}'
  os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'none'
  try:
    yield
  finally:
    server.shutdown()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Objects are files; the generation of an object is the time of its last change."""

  home: pathlib.Path
  protocol_version = 'HTTP/1.1'
  lock = threading.Lock()

  def do_GET(self):
    bucket, name, query = self._request()
    if not name:
      folder = self.home / bucket
      names = sorted(str(x.relative_to(folder)) for x in folder.rglob('*') if x.is_file())
      return self._answer(200, {'items': [self._describe(bucket, x) for x in names
                                          if x.startswith(query.get('prefix', ''))]})
    file = self.home / bucket / name
    if not file.is_file():
      return self._answer(404, {'error': {'code': 404, 'message': 'no such object'}})
    if query.get('alt') != 'media':
      return self._answer(200, self._describe(bucket, name))
    if query.get('ifGenerationNotMatch') == self._generation(file):
      return self._answer(304, b'')
    data, code, headers = file.read_bytes(), 200, {'x-goog-generation': self._generation(file)}
    if 'Range' in self.headers:
      first, _, last = self.headers['Range'].removeprefix('bytes=').partition('-')
      whole = len(data)
      data = data[int(first):int(last) + 1 if last else None] if first else data[-int(last):]
      begin = int(first) if first else whole - len(data)
      code, headers['Content-Range'] = 206, f'bytes {begin}-{begin + len(data) - 1}/{whole}'
    return self._answer(code, data, headers)

  def do_POST(self):
    bucket, name, query = self._request()
    data = self.rfile.read(int(self.headers['Content-Length']))
    file = self.home / bucket / (name or query['name'])
    with self.lock:
      wanted = query.get('ifGenerationMatch')
      if wanted is not None and wanted != (self._generation(file) if file.is_file() else '0'):
        return self._answer(412, {'error': {'code': 412, 'message': 'another generation'}})
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(data)
    return self._answer(200, self._describe(bucket, name or query['name']))

  def do_DELETE(self):
    bucket, name, _ = self._request()
    (self.home / bucket / name).unlink(missing_ok=True)
    return self._answer(204, b'')

  def _request(self):
    url = urllib.parse.urlsplit(self.path)
    parts = url.path.partition('/b/')[2].partition('/o')
    query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
    return parts[0], urllib.parse.unquote(parts[2].removeprefix('/')), query

  def _describe(self, bucket, name):
    file = self.home / bucket / name
    return {'name': name, 'bucket': bucket, 'generation': self._generation(file), 'size': str(file.stat().st_size)}

  def _generation(self, file):
    return str(file.stat().st_mtime_ns)

  def _answer(self, code, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *words):
    pass
