"""The page of `--mode=serve`: a gradio layout for `gallery.py`, and a server that only this machine can reach."""

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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import pictures
from diffusion_distillation.networks.guidance import default_weight
from diffusion_distillation.serving import gallery as galleries
from diffusion_distillation.serving.gallery import Drawn, Gallery
from diffusion_distillation.serving.worker import Done, MainThreadWorker
from diffusion_distillation.system import interrupts

HOST = '127.0.0.1'
TITLE = 'diffusion_distillation'
# The browser itself refuses to load anything from another machine.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'"
)
_STYLE = """
.drawn { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 16px; }
.drawn figure { margin: 0; min-width: 0; max-width: 560px; row-gap: 6px; }
.drawn figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; } /* aligned across figures */
.drawn img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.drawn h3 { margin: 0; align-self: end; overflow-wrap: anywhere; }
.drawn table { width: 100%; margin: 0; align-self: start; border: 0 !important; border-collapse: collapse; font-size: 0.85em; }
.drawn tr, .drawn td { padding: 3px 0; vertical-align: top; border: 0 !important; }
.drawn td:last-child { text-align: right; font-variant-numeric: tabular-nums; padding-left: 4px; overflow-wrap: anywhere; }
.draw-status { min-height: 1.5em; overflow-wrap: anywhere; }
.draw-status.wrong { color: #c81e1e; font-weight: 600; }
.dark .draw-status.wrong { color: #f98080; }
"""


def serve(
  directory: pathlib.Path, port: int, guiding_model: str | os.PathLike[str] | None = None
) -> None:
  """Serves the page until a signal arrives.

  Args:
    directory: a workdir, the directory of a stage, or the folder of a model.
    port: the port on 127.0.0.1; 0 for any free one.
    guiding_model: where a weaker model is that guides the models of the page; None: their predictions without a class do.

  Raises:
    UserError: there is no model, gradio is not installed, or the port is in use.
    Preempted: a signal arrived.
  """
  gallery, worker = Gallery(directory, guiding_model), MainThreadWorker()
  gallery.stages()
  if guiding_model is not None:
    gallery.check_guiding_model()
  uvicorn = _import('uvicorn')
  with _listen(port) as listener:
    application = _application(gallery, worker)
    server = uvicorn.Server(uvicorn.Config(application, log_level='warning'))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]}, daemon=True)
    thread.start()
    try:
      while not server.started:
        if not thread.is_alive():
          raise UserError('the server of the page did not start; its output above says why')
        time.sleep(0.02)
      print(f'http://{HOST}:{listener.getsockname()[1]} shows the page; Ctrl-C ends it', flush=True)
      with interrupts.at_once('serving the page'):
        worker.run()
    finally:
      server.should_exit = True


def _import(name: str) -> Any:
  """Imports a module of the extra `serve`, with telemetry off."""
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
      f'--port={port} cannot be used ({error.strerror}); choose another port, or 0 for any free one'
    ) from error
  return listener


def _application(gallery: Gallery, worker: MainThreadWorker) -> Any:
  """The page as an application that only answers requests to this machine and keeps the browser off the internet."""
  gr, fastapi = _import('gradio'), _import('fastapi')
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  hosts = _import('starlette.middleware.trustedhost').TrustedHostMiddleware
  # Other names are refused, even if they resolve to this address (DNS rebinding).
  app.add_middleware(hosts, allowed_hosts=[HOST, 'localhost'])

  @app.middleware('http')
  async def with_policy(request: Any, call_next: Callable[[Any], Any]) -> Any:
    if _is_foreign(request.headers):
      return fastapi.Response('this page only answers itself', status_code=403)
    response = await call_next(request)
    response.headers['Content-Security-Policy'] = _POLICY
    return response

  plain = ['system-ui', 'sans-serif']
  theme = gr.themes.Default(font=plain, font_mono=['ui-monospace', 'monospace'])  # no web fonts
  return gr.mount_gradio_app(
    app,
    _layout(gr, gallery, worker),
    path='/',
    server_name=HOST,
    footer_links=[],
    ssr_mode=False,
    enable_monitoring=False,
    theme=theme,
    css=_STYLE,
  )


def _is_foreign(headers: Mapping[str, str]) -> bool:
  """Whether a browser sends a request for the page of another site, which could otherwise upload files or draw."""
  origin = headers.get('origin')
  return origin is not None and origin.partition('://')[2] != headers.get('host')


def _layout(gr: Any, gallery: Gallery, worker: MainThreadWorker) -> Any:
  with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
    gr.Markdown(f'## {TITLE}')
    with gr.Row():
      with gr.Column(scale=2, min_width=260):
        stage = gr.Dropdown([], label='stage', allow_custom_value=True)
        steps = gr.Number(label='steps', precision=None)
        sampler = gr.Dropdown(list(samplers.SAMPLERS), label='sampler', allow_custom_value=True)
        label = gr.Dropdown([], label='class', allow_custom_value=True, visible=False)
        prompts = gr.Textbox(label='prompts, one per line', lines=2, max_lines=6, visible=False)
        weight = gr.Number(0, label='guidance', precision=None, visible=False)
        negative = gr.Textbox(label='negative prompt', visible=False)
        seed = gr.Number(0, label='seed')
        num = gr.Radio(list(galleries.NUM_IMAGES), value=16, label='images')
        button = gr.Button('Draw', variant='primary')
      with gr.Column(scale=5, min_width=300):
        status = gr.HTML(_status('Choose a stage and press Draw.'))
        images = gr.HTML()
    settings = [stage, steps, sampler, label, weight, prompts, negative, num]
    choices = functools.partial(_choices, gr, gallery)
    blocks.load(lambda: choices(None), None, settings, api_name='stages', show_progress='hidden')
    stage.input(choices, stage, settings, api_name='choose', show_progress='hidden')
    inputs, draw = (
      [stage, steps, sampler, label, seed, num, weight, prompts, negative],
      functools.partial(_draw, gallery, worker),
    )
    # No limit on the visitors who wait: the worker draws for one at a time, and the others are told that they wait.
    shown = [status, images]
    button.click(draw, inputs, shown, api_name='draw', show_progress='hidden', concurrency_limit=None)
  return blocks


def _choices(gr: Any, gallery: Gallery, stage: Any) -> list[Any]:
  """The finished stages, read anew, and the default settings of one of them: the newest unless `stage` is known."""
  first = stage is None
  try:
    names = list(gallery.stages())
    stage = stage if stage in names else gallery.newest()
    stored = gallery.describe(stage)
    of_texts, guided = galleries.takes_text(stored), gallery.can_be_guided(stored)
    if of_texts and not guided and galleries.TEACHER in names:
      guided = gallery.can_be_guided(gallery.describe(galleries.TEACHER))
  except (UserError, OSError):  # drawing reports it
    return [gr.skip()] * 8
  known = [('all in turn', ''), *((name, name) for name in galleries.classes(stored))]
  return [
    gr.update(choices=names, value=stage),
    gr.update(value=stored.num_steps),
    gr.update(value=stored.sampler),
    gr.update(choices=known, value='', visible=len(known) > 1),
    gr.update(value=default_weight(stored.denoise.conditioning), visible=guided),
    gr.update(visible=of_texts),
    gr.update(visible=of_texts and guided),
    gr.update(value=1) if first and of_texts else gr.skip(),  # large images, of one prompt
  ]


def _draw(gallery: Gallery, worker: MainThreadWorker, *inputs: Any) -> Iterator[tuple[str, str]]:
  """Yields status and images, both HTML, while `gallery.draw(*inputs)` runs; any error becomes a status of one line."""
  yield _status('waiting for the images before these'), ''
  try:
    for answer in worker.submit(functools.partial(gallery.draw, *inputs)):
      if isinstance(answer, Done):
        yield _status('from the same noise:' if len(answer.result) > 1 else ''), _figures(answer.result)
      else:
        yield _status(f'{answer} ...'), ''
  except Exception as error:
    line = ' '.join(str(error).split()) or type(error).__name__
    yield _status(f'error: {line}'[:400], wrong=True), ''


def _status(text: str, wrong: bool = False) -> str:
  return f'<div class="draw-status{" wrong" if wrong else ""}">{html.escape(text)}</div>'


def _figures(drawn: list[Drawn]) -> str:
  """The images of each stage as one picture, with their cost below it, as HTML."""
  parts = []
  for one in drawn:
    sheet = pictures.grid(pictures.enlarge(one.images, 32), math.ceil(math.sqrt(len(one.images))))
    file = io.BytesIO()
    pictures.to_pil(sheet).save(file, format='png')
    data = base64.b64encode(file.getvalue()).decode()
    title = _breakable(one.stage + ' (teacher)' * (one is drawn[0] and len(drawn) > 1))
    rows = ''.join(
      f'<tr><td>{key}</td><td>{_breakable(value)}</td></tr>'
      for key, value in galleries.figures(one).items()
    )
    picture = f'<img src="data:image/png;base64,{data}" alt="{len(one.images)} images of {html.escape(one.stage)}">'
    parts.append(f'<figure><h3>{title}</h3>{picture}<table>{rows}</table></figure>')
  return f'<div class="drawn">{"".join(parts)}</div>'


def _breakable(text: str) -> str:
  """Text as HTML that may be broken after each underscore, so that long names fit on a phone."""
  return html.escape(text).replace('_', '_<wbr>')
