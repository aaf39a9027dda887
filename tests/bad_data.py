"""Command lines that ask for images which cannot be had, for cli_test.py."""

import json
import shutil
import zipfile

from PIL import Image

from tests import tiny

# As there: {workdir} is not there, nor is {copy}; {typo} is a file, {directory} is empty; the rest is what `images` makes.
TRAIN = ['--config=configs/digits.py', '--workdir={workdir}']
SAMPLE = ['--mode=sample', '--workdir={finished}', '--out=x.png']
SHAPES = [*TRAIN, '--config.dataset.name=shapes']
FOLDER = [*TRAIN, '--config.dataset.name=folder']
PREPARE = ['--mode=prepare', TRAIN[0]]
CASES = {
  'no such data set': (
    [*TRAIN, '--config.dataset.name=cifr10'],
    [
      "dataset.name='cifr10' is not known",
      'digits, shapes, captioned_shapes, folder',
      "did you mean 'cifar10'?",
    ],
  ),
  'no such data set of ours': (
    [*TRAIN, '--config.dataset.name=shape'],
    ["dataset.name='shape' is not known", "did you mean 'shapes'?"],
  ),
  'no data set at all': ([*TRAIN, '--config.dataset.name='], ["dataset.name='' is not known"]),
  'data set that is not prepared': (
    ['--config=configs/cifar10.py', TRAIN[1], '--config.dataset.path={directory}'],
    ["'cifar10' is not prepared", '{directory}/cifar10/VERSION', 'tensorflow', 'download_and_prepare'],
  ),
  'folder without path': (FOLDER, ['dataset.name=folder needs dataset.path']),
  'folder that is not there': (
    [*FOLDER, '--config.dataset.path={directory}/none'],
    ['dataset.path={directory}/none', 'no such file or directory'],
  ),
  'folder without images': (
    [*FOLDER, '--config.dataset.path={directory}'],
    ['dataset.path={directory} holds no image', '.png'],
  ),
  'folder with images beside folders': (
    [*FOLDER, '--config.dataset.path={mixed}'],
    ['dataset.path={mixed}', 'in folders (cat/1.png)', 'next to them (2.png)'],
  ),
  'folder with one image': (
    [*FOLDER, '--config.dataset.path={mixed}/cat'],
    ['{mixed}/cat', '1 image'],
  ),
  'zip that is none': (
    [*FOLDER, '--config.dataset.path={zip}'],
    ['dataset.path={zip} cannot be listed'],
  ),
  'archive that is no zip': (
    [*FOLDER, '--config.dataset.path={tar}'],
    ['dataset.path={tar} is an archive of an unsupported kind', 'unpack it', '.zip'],
  ),
  'zip that leads out of itself': (
    [*FOLDER, '--config.dataset.path={hostile}'],
    ['dataset.path={hostile}', "'../1.png', a path outside the archive"],
  ),
  'classes of a flat folder': (
    [*FOLDER, '--config.dataset.path={flat}', '--config.model.conditional=True'],
    ['model.conditional=True', 'no labels'],
  ),
  'no label to drop': (
    [*TRAIN, '--config.dataset.label_dropout=0.1'],
    ['dataset.label_dropout', 'model.conditional=True'],
  ),
  'every label dropped': (
    [*TRAIN, '--config.model.conditional=True', '--config.dataset.label_dropout=1.0'],
    ['dataset.label_dropout=1.0', '[0, 1)'],
  ),
  'unknown filter': (
    [*SHAPES, '--config.dataset.resize=bicubid'],
    ['dataset.resize', 'bicubid', 'area', 'lanczos'],
  ),
  'colours of no image': (
    [*SHAPES, '--config.dataset.channels=4'],
    ['dataset.channels=4', '1 (grey) or 3'],
  ),
  'no colours': ([*SHAPES, '--config.dataset.channels=0'], ['dataset.channels=0', '1 (grey) or 3']),
  'digits in colour': ([*TRAIN, '--config.dataset.channels=3'], ['dataset.channels=3', 'digits']),
  'images of no size': (
    [*SHAPES, '--config.dataset.image_size=0'],
    ['dataset.image_size=0', 'positive'],
  ),
  'unknown split': (
    [*TRAIN, '--config.dataset.split=trane'],
    ["dataset.split='trane'", 'train, test', "did you mean 'train'?"],
  ),
  'unknown split held out': (
    [*TRAIN, '--config.dataset.eval_split=validation'],
    ["dataset.eval_split='validation'", 'train, test'],
  ),
  'split that cannot be read': (
    [*TRAIN, '--config.dataset.split=train[:ten]'],
    ["dataset.split='train[:ten]'", 'train[:90%]'],
  ),
  'split of no image': (
    [*TRAIN, '--config.dataset.split=train[:0]'],
    ["dataset.split='train[:0]' holds no image"],
  ),
  'split of one image': (
    [*TRAIN, '--config.dataset.eval_split=test[:1]'],
    ['dataset.eval_split', '1 image', '2'],
  ),
  'fewer workers than none': (
    [*TRAIN, '--config.dataset.workers=-1'],
    ['dataset.workers=-1', 'zero or more'],
  ),
  'negative memory': (
    [*TRAIN, '--config.dataset.in_memory_gb=-1.0'],
    ['dataset.in_memory_gb=-1.0', 'zero or more'],
  ),
  'copy that is not there': (
    [*TRAIN, '--config.dataset.prepared={directory}/none'],
    ['dataset.prepared={directory}/none', 'no finished copy', '--mode=prepare'],
  ),
  'copy that is not finished': (
    [*TRAIN, '--config.dataset.prepared={begun}'],
    ['dataset.prepared={begun}', 'no finished copy', '--mode=prepare'],
  ),
  'copy of other images': (
    [*SHAPES, '--config.dataset.prepared={copied}', '--config.dataset.image_size=16'],
    [
      'dataset.prepared={copied}',
      'dataset.image_size was 8, is 16',
      'dataset.name was digits, is shapes',
    ],
  ),
  'prepare without config': (['--mode=prepare'], ['--mode=prepare', '--config']),
  'prepare to nowhere': (PREPARE, ['--mode=prepare', 'dataset.prepared']),
  'prepare into something else': (
    [*PREPARE, '--config.dataset.prepared={flat}'],
    ['dataset.prepared={flat}', 'not empty'],
  ),
  'prepare below a file': (
    [*PREPARE, '--config.dataset.prepared={typo}/x'],
    ['dataset.prepared={typo}/x'],
  ),
  'prepare a copy of other images': (
    [*PREPARE, '--config.dataset.prepared={copied}', '--config.dataset.split=train[:9]'],
    ['dataset.prepared={copied}', 'dataset.split was , is train[:9]'],
  ),
  'prepare with fewer workers than none': (
    [*PREPARE, '--config.dataset.prepared={copy}', '--config.dataset.workers=-1'],
    ['dataset.workers=-1', 'zero or more'],
  ),
  'prepare images of no size': (
    [
      *PREPARE,
      '--config.dataset.name=shapes',
      '--config.dataset.prepared={copy}',
      '--config.dataset.image_size=0',
    ],
    ['dataset.image_size=0', 'positive'],
  ),
  'sample without class': (
    [*SAMPLE, '--classes=none'],
    ['--classes=none', 'progressive_0001', 'unconditional'],
  ),
}


def images(root):
  """Folders of images, a copy of the digits, and one that is not finished."""
  from diffusion_distillation import datasets  # not before conftest.py has set jax's flags
  from diffusion_distillation.datasets import preparing

  places = {name: root / name for name in ('mixed', 'flat', 'copied', 'begun', 'copy')}
  for name in ('mixed/cat/1.png', 'mixed/2.png', *(f'flat/{k}.png' for k in range(8))):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8), (40, 80, 120)).save(root / name)
  places['zip'] = root / 'no.zip'
  places['zip'].write_bytes(b'PK, but no zip')
  places['tar'], places['hostile'] = root / 'pictures.tar.gz', root / 'hostile.zip'
  places['tar'].write_bytes(b'as good as any')
  with zipfile.ZipFile(places['hostile'], 'w') as file:
    file.write(places['mixed'] / '2.png', '../1.png')
  settings = datasets.Settings.of(tiny.config(dataset__prepared=str(places['copied'])).dataset)
  preparing.prepare(settings, workers=0)
  shutil.copytree(places['copied'], places['begun'])
  info = json.loads((places['begun'] / 'info.json').read_text())
  (places['begun'] / 'info.json').write_text(json.dumps(info | {'finished': False}))
  return places
