"""Drives a headless browser by the Chrome DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys

BINARY = shutil.which('chromium') or shutil.which('chromium-browser')


class Browser:
  """Chromium with one page.

    with Browser() as browser:
      browser.open('file:///report.html#page=1', width=390)
      browser.run('document.title')
  """

  def __init__(self):
    (read_there, self._out), (self._in, write_there) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_there, write_there)]
    start = 'import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])'
    self._process = subprocess.Popen(  # the protocol is read from 3 and written to 4
        [sys.executable, '-c', start, *map(str, theirs), BINARY, '--headless', '--no-sandbox', '--disable-gpu',
         '--remote-debugging-pipe', 'about:blank'], pass_fds=theirs, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    for fd in (read_there, write_there, *theirs):
      os.close(fd)
    self._number, self._buffer, self._session = 0, b'', None
    page, = [x for x in self.send('Target.getTargets')['targetInfos'] if x['type'] == 'page']
    self._session = self.send('Target.attachToTarget', targetId=page['targetId'], flatten=True)['sessionId']
    self.send('Page.enable')

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._session = None
    try:
      self.send('Browser.close')
      self._process.wait(timeout=20)
    finally:
      self._process.kill()
      os.close(self._out)
      os.close(self._in)

  def send(self, method, **params):
    """Sends a command and returns its result."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._next()
      if answer.get('id') == self._number:
        assert 'error' not in answer, answer
        return answer['result']

  def _next(self):
    while b'\0' not in self._buffer:
      some = os.read(self._in, 1 << 20)
      assert some, 'the browser ended'
      self._buffer += some
    message, self._buffer = self._buffer.split(b'\0', 1)
    return json.loads(message)

  def open(self, address, width=1280, height=900):
    """Opens a page in a window of this size (emulating a phone if narrow) and waits until it has loaded."""
    self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    self.send('Emulation.setTouchEmulationEnabled', enabled=width < 600)
    self.send('Page.navigate', url='about:blank')  # a change after the # alone would not load the page again
    self.send('Page.navigate', url=address)
    assert self.run('new Promise(done => document.readyState === "complete" ? done(innerWidth) : '
                    'addEventListener("load", () => done(innerWidth)))') == width

  def run(self, script):
    """Evaluates a JavaScript expression and returns its value."""
    found = self.send('Runtime.evaluate', expression=script, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def press(self, key):
    """Presses a key: Tab, Enter, ArrowRight, ..."""
    codes = {'Tab': 9, 'Enter': 13, 'Escape': 27, 'End': 35, 'Home': 36, 'ArrowLeft': 37, 'ArrowUp': 38,
             'ArrowRight': 39, 'ArrowDown': 40}
    for kind in ('rawKeyDown', 'keyUp'):
      self.send('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

  def move(self, x, y):
    """Moves the mouse."""
    self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def tap(self, x, y):
    """Touches the screen for a moment."""
    self.send('Input.dispatchTouchEvent', type='touchStart', touchPoints=[{'x': x, 'y': y}])
    self.send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])
    self.run('new Promise(done => setTimeout(done, 300))')

  def screenshot(self, path):
    """Writes a screenshot of the window as a PNG file."""
    path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot')['data']))
