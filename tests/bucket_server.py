"""An object store on this machine, for tests of buckets.

    with Bucket() as bucket:
      subprocess.run(command, env=bucket.environment)

A process of its own, so that it outlives those that a test kills. It is a
stand-in of Google Cloud Storage that keeps objects in memory; added here are
conditions on generations (which claims need), delays, and failures: answers of
503 and connections that end in the middle of an upload.
"""

import contextlib
from http import server as http_server
import json
import os
import pathlib
import random
import re
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from urllib import parse

NAME = 'test-bucket'
URL = f'gs://{NAME}'
MATCH, NO_MATCH = 'ifGenerationMatch', 'ifGenerationNotMatch'


class Bucket:
  """The store, running. `environment` is for processes that use it."""

  def __init__(self, *, delay_s: float = 0.0, failures: float = 0.0):
    """Each request waits up to `delay_s`; a share of `failures` fails."""
    self._options = [str(delay_s), str(failures)]

  def __enter__(self) -> 'Bucket':
    self._server = subprocess.Popen(
      [sys.executable, __file__, *self._options],
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    url = f'http://127.0.0.1:{int(self._server.stdout.readline())}'
    self._cache = tempfile.TemporaryDirectory()
    self.settings = {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'any',
      # What this service lacks, gcsfs would ask for by gRPC, for a minute.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      'XDG_CACHE_HOME': self._cache.name,
    }
    self.environment = {**os.environ, **self.settings}
    return self

  def __exit__(self, *_):
    self._server.kill()
    self._server.wait()
    self._server.stdout.close()
    self._cache.cleanup()

  def forget_this_machine(self):
    """What follows is as on another machine."""
    for path in pathlib.Path(self._cache.name).iterdir():
      subprocess.run(['rm', '-r', str(path)], check=True)


class _Server(socketserver.ThreadingMixIn, http_server.HTTPServer):
  daemon_threads = True
  request_queue_size = 128


class _NotMet(Exception):
  """The object has another generation than an upload asks for."""


def _objects():
  """The store, which holds an upload to the generation that is `wanted`."""
  from gcp_storage_emulator import storage

  class Objects(storage.Storage):
    wanted = None

    def generation(self, bucket, name):
      try:
        return int(self.get_file_obj(bucket, name)['generation'])
      except Exception:  # there is none
        return 0

    def create_file(self, bucket, name, *args):
      if self.wanted not in (None, str(self.generation(bucket, name))):
        raise _NotMet
      return super().create_file(bucket, name, *args)

  return Objects(use_memory_fs=True)


def _handler(objects, delay_s, failures):
  from gcp_storage_emulator import server

  lock = threading.Lock()

  class Handler(server.RequestHandler):
    def __init__(self, *args):
      super().__init__(objects, *args)

    def do_GET(self):
      self._guarded(super().do_GET)

    def do_POST(self):
      self._guarded(super().do_POST)

    def do_PUT(self):
      self._guarded(super().do_PUT)

    def do_PATCH(self):
      self._guarded(super().do_PATCH)

    def do_DELETE(self):
      self._guarded(super().do_DELETE)

    def _guarded(self, answer):
      time.sleep(random.uniform(0, delay_s))
      if random.random() < failures:
        size = int(self.headers.get('Content-Length') or 0)
        if size and random.random() < 0.5:
          self.rfile.read(size // 2)
          self.connection.close()
        else:
          self.rfile.read(size)
          self._refuse(503)
        return
      query = parse.parse_qs(parse.urlparse(self.path).query)
      with lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        self._generation = self._find_generation()
        if query.get(NO_MATCH) == [str(self._generation)]:
          self._refuse(304)
          return
        objects.wanted = query.get(MATCH, [None])[0]
        try:
          answer()
        except _NotMet:
          self._refuse(412)

    def _find_generation(self):
      """The generation of the object that is read, 0 for none."""
      found = re.fullmatch(
        r'.*/b/([^/]+)/o/(.+)', parse.urlparse(self.path).path
      )
      if not found:
        return 0
      return objects.generation(*map(parse.unquote, found.groups()))

    def end_headers(self):
      if self.command == 'GET' and getattr(self, '_generation', 0):
        self.send_header('x-goog-generation', str(self._generation))
      super().end_headers()

    def _refuse(self, status):
      text = json.dumps({'error': {'code': status, 'message': 'refused'}})
      with contextlib.suppress(OSError):
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

  return Handler


def serve(delay_s: float, failures: float):
  """Serves until the process ends; prints the port."""
  from gcp_storage_emulator.handlers import buckets

  objects = _objects()
  buckets.create_bucket(NAME, objects)
  random.seed(0)
  found = _Server(('127.0.0.1', 0), _handler(objects, delay_s, failures))
  print(found.server_address[1], flush=True)
  found.serve_forever()


if __name__ == '__main__':
  serve(*map(float, sys.argv[1:]))
