"""The page of `--mode=serve`: a layout in gradio over `gallery.py`, and its server on this machine alone."""

import base64
import functools
import html
import importlib
import io
import math
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import pictures
from diffusion_distillation.serving import gallery as galleries
from diffusion_distillation.serving.desk import Desk, Done
from diffusion_distillation.serving.gallery import Drawn, Gallery
from diffusion_distillation.system import interrupts

HOST = '127.0.0.1'
TITLE = 'diffusion_distillation'
# The browser itself refuses whatever is not on this machine.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
_STYLE = """
.drawn { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 16px; }
.drawn figure { margin: 0; min-width: 0; max-width: 560px; }
.drawn img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.drawn h3 { margin: 0 0 6px; overflow-wrap: anywhere; }
.drawn table { width: 100%; margin-top: 6px; border: 0 !important; border-collapse: collapse; font-size: 0.9em; }
.drawn tr, .drawn td { padding: 3px 0; vertical-align: top; border: 0 !important; }
.drawn td:last-child { text-align: right; font-variant-numeric: tabular-nums; padding-left: 8px; }
.said { min-height: 1.5em; overflow-wrap: anywhere; }
.said.wrong { color: #c81e1e; font-weight: 600; }
.dark .said.wrong { color: #f98080; }
"""


def serve(directory: pathlib.Path, port: int) -> None:
  """Serves the page until a signal comes.

  Args:
    directory: a workdir, the directory of a stage, or the folder of a model.
    port: of 127.0.0.1; 0 for any that is free.

  Raises:
    UserError: there is no model, gradio is not installed, or the port is taken.
    Preempted: a signal came.
  """
  gallery, desk = Gallery(directory), Desk()
  gallery.stages()
  uvicorn = _import('uvicorn')
  with _listen(port) as listener:
    config = uvicorn.Config(_application(gallery, desk), log_level='warning')
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]}, daemon=True)
    thread.start()
    try:
      while not server.started:
        if not thread.is_alive():
          raise UserError('the server of the page did not start; see its output above')
        time.sleep(0.02)
      print(f'http://{HOST}:{listener.getsockname()[1]} shows the page; Ctrl-C ends it', flush=True)
      with interrupts.at_once('serving the page'):
        desk.work()
    finally:
      server.should_exit = True


def _import(name: str) -> Any:
  """A module of the extra; nothing else imports it, and nothing of it is reported to anybody."""
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"--mode=serve needs gradio: pip install 'diffusion_distillation[serve]', or in a clone "
      f"pip install -c constraints.txt -e '.[serve]' ({error})"
    ) from error


def _listen(port: int) -> socket.socket:
  listener = socket.socket()
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((HOST, port))
    listener.listen()
  except OSError as error:
    listener.close()
    raise UserError(
      f'--port={port} cannot be had ({error.strerror}); name another, or 0 for any that is free'
    ) from error
  return listener


def _application(gallery: Gallery, desk: Desk) -> Any:
  """The page in an application that answers this machine alone, and keeps the browser from the internet."""
  gr, fastapi = _import('gradio'), _import('fastapi')
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  hosts = _import('starlette.middleware.trustedhost').TrustedHostMiddleware
  app.add_middleware(hosts, allowed_hosts=[HOST, 'localhost'])  # no name of elsewhere that leads here

  @app.middleware('http')
  async def with_policy(request: Any, call_next: Callable[[Any], Any]) -> Any:
    response = await call_next(request)
    response.headers['Content-Security-Policy'] = _POLICY
    return response

  plain = ['system-ui', 'sans-serif']
  theme = gr.themes.Default(font=plain, font_mono=['ui-monospace', 'monospace'])  # none to be fetched
  return gr.mount_gradio_app(
    app,
    _layout(gr, gallery, desk),
    path='/',
    server_name=HOST,
    footer_links=[],
    ssr_mode=False,
    enable_monitoring=False,
    theme=theme,
    css=_STYLE,
  )


def _layout(gr: Any, gallery: Gallery, desk: Desk) -> Any:
  with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
    gr.Markdown(f'## {TITLE}')
    with gr.Row():
      with gr.Column(scale=2, min_width=260):
        stage = gr.Dropdown([], label='stage', allow_custom_value=True)
        steps = gr.Number(label='steps', precision=None)
        sampler = gr.Dropdown(list(samplers.SAMPLERS), label='sampler', allow_custom_value=True)
        label = gr.Dropdown([], label='class', allow_custom_value=True, visible=False)
        seed = gr.Number(0, label='seed')
        num = gr.Radio(list(galleries.NUMS), value=16, label='images')
        button = gr.Button('Draw', variant='primary')
      with gr.Column(scale=5, min_width=300):
        said = gr.HTML(_say('Choose a stage and draw.'))
        shown = gr.HTML()
    own = [stage, steps, sampler, label]
    choices = functools.partial(_choices, gr, gallery)
    blocks.load(lambda: choices(None), None, own, api_name='stages', show_progress='hidden')
    stage.input(choices, stage, own, api_name='choose', show_progress='hidden')
    inputs, show = [*own, seed, num], functools.partial(_show, gallery, desk)
    button.click(show, inputs, [said, shown], api_name='draw', show_progress='hidden')
  return blocks


def _choices(gr: Any, gallery: Gallery, stage: Any) -> list[Any]:
  """The finished stages, of which there may be more by now, and the settings of one, by default the newest."""
  try:
    names = list(gallery.stages())
    stage = stage if stage in names else gallery.newest()
    stored = gallery.describe(stage)
  except (UserError, OSError):  # drawing says so
    return [gr.skip()] * 4
  known = [('all in turn', ''), *((name, name) for name in galleries.classes(stored))]
  return [
    gr.update(choices=names, value=stage),
    gr.update(value=stored.num_steps),
    gr.update(value=stored.sampler),
    gr.update(choices=known, value='', visible=len(known) > 1),
  ]


def _show(
  gallery: Gallery, desk: Desk, stage: Any, steps: Any, sampler: Any, label: Any, seed: Any, num: Any
) -> Iterator[tuple[str, str]]:
  """What the page says, and shows, while it is drawn and when it is there. Whatever is wrong is one line."""
  yield _say('waiting for its turn'), ''
  try:
    for answer in desk.ask(lambda tell: gallery.draw(stage, steps, sampler, label, seed, num, tell)):
      if isinstance(answer, Done):
        yield _say('from the same noise:' if len(answer.result) > 1 else ''), _figures(answer.result)
      else:
        yield _say(f'{answer} ...'), ''
  except Exception as error:
    line = ' '.join(str(error).split()) or type(error).__name__
    yield _say(f'error: {line}'[:400], wrong=True), ''


def _say(text: str, wrong: bool = False) -> str:
  return f'<div class="said{" wrong" if wrong else ""}">{html.escape(text)}</div>'


def _figures(drawn: list[Drawn]) -> str:
  """A sheet of each stage's images, with what they cost below."""
  parts = []
  for one in drawn:
    sheet = pictures.grid(pictures.enlarge(one.images, 32), math.ceil(math.sqrt(len(one.images))))
    file = io.BytesIO()
    pictures.to_pil(sheet).save(file, format='png')
    data = base64.b64encode(file.getvalue()).decode()
    name = html.escape(one.stage)
    title = f'{name} (teacher)' if one is drawn[0] and len(drawn) > 1 else name
    rows = ''.join(
      f'<tr><td>{key}</td><td>{html.escape(value)}</td></tr>'
      for key, value in galleries.figures(one).items()
    )
    picture = f'<img src="data:image/png;base64,{data}" alt="{len(one.images)} images of {name}">'
    parts.append(f'<figure><h3>{title}</h3>{picture}<table>{rows}</table></figure>')
  return f'<div class="drawn">{"".join(parts)}</div>'
