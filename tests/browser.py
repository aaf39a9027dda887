"""A headless Chromium that is controlled over pipes by the DevTools protocol, without further packages."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time


def find():
  """The path of the program; None if it is not installed."""
  return shutil.which('chromium') or shutil.which('chromium-browser')


class Browser:
  """One page. `errors` collects what it logs as an error, and `addresses` every address that it requests."""

  def __init__(self, profile, width=1280, height=900):
    ours_to_theirs, theirs_to_ours = os.pipe(), os.pipe()
    self._read, self._write = theirs_to_ours[0], ours_to_theirs[1]
    ends = [
      fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (ours_to_theirs[0], theirs_to_ours[1])
    ]
    shell = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # --remote-debugging-pipe reads 3 and writes 4
    arguments = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']
    quiet = ['--no-first-run', '--disable-background-networking', '--remote-debugging-pipe']
    command = ['bash', '-c', shell, 'bash', find(), *arguments, *quiet]
    command += [f'--user-data-dir={profile}', 'about:blank']
    self._process = subprocess.Popen(
      command,
      pass_fds=ends,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for end in (*ends, ours_to_theirs[0], theirs_to_ours[1]):
      os.close(end)
    self._numbers, self._rest, self._session = itertools.count(1), b'', None
    self.errors, self.addresses = [], []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')
    self.resize(width, height)

  def resize(self, width, height):
    """The size of the window, in pixels."""
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def _message(self):
    deadline = time.monotonic() + 60
    while b'\0' not in self._rest:
      ready, _, _ = select.select([self._read], [], [], deadline - time.monotonic())
      data = os.read(self._read, 1 << 20) if ready else b''
      assert data, 'the browser has ended, or does not answer'
      self._rest += data
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def call(self, method, **params):
    """The result of a method of the protocol."""
    number = next(self._numbers)
    request = {'id': number, 'method': method, 'params': params}
    request |= {'sessionId': self._session} if self._session else {}
    os.write(self._write, json.dumps(request).encode() + b'\0')
    while True:
      message = self._message()
      if message.get('id') == number:
        assert 'error' not in message, message
        return message['result']
      self._note(message.get('method'), message.get('params', {}))

  def _note(self, event, params):
    if event == 'Runtime.exceptionThrown':
      self.errors.append(json.dumps(params['exceptionDetails'])[:400])
    elif event == 'Runtime.consoleAPICalled' and params['type'] == 'error':
      self.errors.append(json.dumps(params['args'])[:400])
    elif event == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(json.dumps(params['entry'])[:400])
    elif event == 'Network.requestWillBeSent':
      self.addresses.append(params['request']['url'])

  def evaluate(self, expression):
    """The value of a JavaScript expression."""
    found = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
    return found['result'].get('value')

  def wait(self, expression, seconds=120):
    """Waits until the expression is true; returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := self.evaluate(expression)):
      assert time.monotonic() < deadline, f'{expression} is not true: {self.errors}'
      time.sleep(0.1)
    return value

  def screenshot(self, path):
    data = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=True)['data']
    path.write_bytes(base64.b64decode(data))

  def close(self):
    with contextlib.suppress(AssertionError, OSError):
      self._session = None
      self.call('Browser.close')
    self._process.wait(timeout=30)
    os.close(self._read)
    os.close(self._write)
