"""The page: errors are one line; and its server in a process of its own, over HTTP and in a browser."""

import json
import re
import signal
import sys
import threading
import types
import urllib.error
import urllib.request

import pytest

from diffusion_distillation.errors import Preempted, UserError
from diffusion_distillation.serving import page
from diffusion_distillation.serving.worker import Done, MainThreadWorker
from diffusion_distillation.stages import model
from diffusion_distillation.system import interrupts
from tests import browser, tiny
from tests.stages.model_test import UNET, stored

STUDENT = 'distilled_with_a_long_name'
INPUTS = (STUDENT, 2, 'ddim', '', 0, 4, 0, '', '')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """With a teacher and a student."""
  directory = tmp_path_factory.mktemp('workdir')
  model.write(directory / 'base' / 'model', stored(UNET, num_steps=4))
  student = stored(UNET, num_steps=1, seed=1, sampler='multistep_consistency')
  model.write(directory / STUDENT / 'model', student)
  return directory


@pytest.mark.parametrize('missing', ['uvicorn', 'gradio'])
def test_without_gradio_one_line_says_what_to_install(workdir, monkeypatch, missing):
  monkeypatch.setitem(sys.modules, 'uvicorn', types.ModuleType('uvicorn'))
  monkeypatch.setitem(sys.modules, missing, None)
  with pytest.raises(UserError, match=r"needs gradio: pip install 'diffusion_distillation\[serve\]'"):
    page.serve(workdir, 0)


def test_flags_of_sampling_are_refused(workdir):
  for flag in ('--stage=base', '--steps=2', '--noclip_x', '--weights=last'):
    code, out, err = tiny.run_cli('--mode=serve', f'--workdir={workdir}', flag)
    assert (code, out) == (UserError.exit_code, '')
    assert re.fullmatch(
      r'error: --(stage|steps|clip_x|weights) does not apply to --mode=serve: .*\n', err
    )


def test_only_this_machine_is_listened_to_and_a_busy_port_is_one_line():
  with page._listen(0) as listener:
    host, port = listener.getsockname()
    assert host == '127.0.0.1'
    with pytest.raises(UserError, match=f'--port={port} cannot be used'):
      page._listen(port)


def test_the_pages_of_other_sites_may_not_use_the_server():
  host = {'host': '127.0.0.1:7860'}
  assert not page._is_foreign(host) and not page._is_foreign(host | {'origin': 'http://127.0.0.1:7860'})
  for origin in ('http://example.org', 'http://127.0.0.1:8000', 'null'):
    assert page._is_foreign(host | {'origin': origin})


def test_work_is_done_in_turn_in_the_main_thread_until_a_signal_comes():
  worker, heard = MainThreadWorker(), []

  def visit():
    heard.extend(worker.submit(lambda report: report('begun') or threading.current_thread()))
    try:
      list(worker.submit(lambda report: 1 / 0))
    except ZeroDivisionError:
      heard.append('failed')
    interrupts.request('SIGINT')

  visitor = threading.Thread(target=visit, daemon=True)
  visitor.start()
  try:
    with pytest.raises(Preempted, match='SIGINT'):
      worker.run()
  finally:
    visitor.join(timeout=10)
    interrupts.uninstall()
  assert heard == ['begun', Done(threading.main_thread()), 'failed']


def test_whatever_is_wrong_is_one_line_on_the_page():
  class Broken:
    def draw(self, *asked):
      raise RuntimeError('out of\nmemory <script>')

  class Now:
    def submit(self, work):
      yield Done(work(print))

  *_, (status, images) = page._draw(Broken(), Now(), *INPUTS)
  assert status == '<div class="draw-status wrong">error: out of memory &lt;script&gt;</div>'
  assert images == ''


@pytest.fixture
def served(workdir):
  """The process of a server, and its address."""
  pytest.importorskip('gradio')
  process = tiny.start_main('--mode=serve', f'--workdir={workdir}', '--port=0')
  try:
    line = process.stdout.readline()
    yield process, re.match(r'http://127\.0\.0\.1:\d+', line)[0]
  finally:
    process.kill()
    process.communicate()


def ask(address, *inputs):
  """What the API of the page answers: (status, images), both HTML."""
  data = json.dumps({'data': inputs}).encode()
  request = urllib.request.Request(
    f'{address}/gradio_api/call/draw', data, {'Content-Type': 'application/json'}
  )
  with urllib.request.urlopen(request) as answer:
    event = json.load(answer)['event_id']
  with urllib.request.urlopen(f'{address}/gradio_api/call/draw/{event}') as stream:
    *_, last = re.findall(r'^data: (\[.*)$', stream.read().decode(), re.MULTILINE)
  return json.loads(last)


def listeners(port):
  """The addresses, as in /proc, on which something listens on the port."""
  found = []
  for name in ('tcp', 'tcp6'):
    with open(f'/proc/net/{name}') as table:
      rows = [row.split() for row in table.readlines()[1:]]
    found += [row[1] for row in rows if row[3] == '0A' and row[1].endswith(f':{port:04X}')]
  return found


@pytest.mark.slow
def test_the_server_draws_listens_to_this_machine_alone_and_ends_as_all_modes_do(served):
  process, address = served
  assert listeners(int(address.rpartition(':')[2])) == [
    f'0100007F:{int(address.rpartition(":")[2]):04X}'
  ]
  status, images = ask(address, *INPUTS)
  assert 'from the same noise' in status and images.count('data:image/png;base64,') == 2
  assert re.findall(r'<td>steps</td><td>(\d+)</td>', images) == ['4', '2']
  for wrong in (('nobody', *INPUTS[1:]), (STUDENT, 0, *INPUTS[2:]), (STUDENT, 'x', *INPUTS[2:])):
    status, images = ask(address, *wrong)
    assert 'draw-status wrong' in status and 'error: ' in status and images == ''
  with pytest.raises(urllib.error.HTTPError, match='400'):  # a name of elsewhere that leads here
    urllib.request.urlopen(urllib.request.Request(address, headers={'Host': 'example.org'}))
  with pytest.raises(
    urllib.error.HTTPError, match='403'
  ):  # another site, whose page is open in the browser
    upload = urllib.request.Request(
      f'{address}/gradio_api/upload', b'', {'Origin': 'http://example.org'}
    )
    urllib.request.urlopen(upload)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert process.returncode == Preempted.exit_code and 'Traceback' not in out + err
  assert err.splitlines()[-1].startswith('error: stopped by SIGINT while serving the page; ')


@pytest.mark.slow
def test_a_browser_shows_pictures_and_asks_nobody_else(served, tmp_path):
  if browser.find() is None:
    pytest.skip('there is no chromium')
  _, address = served
  shown = browser.Browser(tmp_path)
  try:
    shown.call('Page.navigate', url=address)
    shown.wait("[...document.querySelectorAll('input')].some(i => i.value === '" + STUDENT + "')")
    shown.evaluate(
      "[...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'Draw').click()"
    )
    shown.wait(
      "[...document.querySelectorAll('.drawn img')].filter(i => i.naturalWidth > 0).length == 2"
    )
    for width in (1280, 390):
      shown.resize(width, 844)
      inside = (
        "[...document.querySelectorAll('.drawn *')].every(e => right(e) <= right(e.closest('.drawn')))"
      )
      assert shown.evaluate(f'{{const right = e => e.getBoundingClientRect().right; {inside}}}')
      assert shown.evaluate('document.documentElement.scrollWidth') <= width
      shown.screenshot(tmp_path / f'{width}.png')
    assert shown.errors == []
    elsewhere = [a for a in shown.addresses if not a.startswith((address, 'data:', 'blob:', 'about:'))]
    assert elsewhere == []
  finally:
    shown.close()
