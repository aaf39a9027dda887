"""Every key there is, with its meaning. Other configs start from this one and change what differs."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """The defaults; locked, so that a mistyped key is an error."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of initial parameters, batches and noise
  _diffusion(c)
  _training(c)
  _one_step(c)
  _watching(c)
  _scaling(c)
  return c.lock()


def _diffusion(c: ml_collections.ConfigDict) -> None:
  """Data, network, and what it learns."""

  c.dataset = ml_collections.ConfigDict()
  c.dataset.name = 'digits'  # digits, shapes, folder, or a set of tensorflow-datasets such as cifar10
  c.dataset.path = ''  # a folder's directory, .zip or URL; tensorflow-datasets' data_dir, '' for its own
  c.dataset.prepared = ''  # directory of a copy that --mode=prepare writes; '': the set itself is read
  c.dataset.split = ''  # to train on, such as train[:90%]; '': the set's own, see README
  c.dataset.eval_split = ''  # held out, to compare with
  c.dataset.image_size = 8  # pixels a side of the central square, to which images are resized
  c.dataset.channels = config_dict.placeholder(int)  # 1 (grey) or 3; or the set's own (a folder: 3)
  c.dataset.resize = 'area'  # area, bilinear, bicubic or lanczos; all antialiased
  c.dataset.random_flip = False  # mirror images left to right at random
  c.dataset.dequantize = False  # spread pixels evenly over the values that round to them
  c.dataset.label_dropout = 0.0  # probability that a conditional network is not told the class
  c.dataset.in_memory_gb = 4.0  # a set that takes no more is decoded once and kept
  c.dataset.workers = 4  # processes that read a set which is not in memory; 0 for threads

  c.model = ml_collections.ConfigDict()
  c.model.name = 'unet'  # the network, a name in networks.NETWORKS
  c.model.space = 'pixels'  # what x is
  c.model.output = 'v'  # what the network predicts: x, eps, v, both x and eps, or edm's F
  c.model.conditional = False  # on the data set's labels
  c.model.ch = 128  # channels at the finest level
  c.model.emb_ch = 512  # width of the time and class embedding
  c.model.ch_mult = (1, 2, 2)  # channels of each level, as multiples of ch
  c.model.num_res_blocks = 2  # a level
  c.model.attn_resolutions = (8,)  # heights of the levels that have attention
  c.model.num_heads = config_dict.placeholder(int)  # attention heads; or set head_dim; or one head
  c.model.head_dim = config_dict.placeholder(int)  # channels a head
  c.model.num_groups = 32  # of GroupNorm
  c.model.dropout = 0.0  # in base training; rounds and teachers have none
  c.model.time_input = 'inv_cos'  # how the network is told logsnr: inv_cos, linear, sigmoid or edm
  c.model.resblock_resample = True  # down- and upsampling inside residual blocks

  c.student = ml_collections.ConfigDict()  # the students' network, where it is not the base's
  for key, value in c.model.items():
    kind = type(value) if value is not None else int
    c.student[key] = config_dict.placeholder(kind)

  c.schedule = ml_collections.ConfigDict()
  c.schedule.name = (
    'cosine'  # cosine, shifted_cosine (larger images), linear_beta (DDPM) or karras (EDM)
  )
  c.schedule.logsnr_min = -20.0  # at t = 1; of the cosines
  c.schedule.logsnr_max = 20.0  # at t -> 0
  c.schedule.base_size = 64  # shifted_cosine: image size without a shift
  c.schedule.beta_min = 0.1  # linear_beta: at t = 0, per unit of time
  c.schedule.beta_max = 20.0  # linear_beta: at t = 1
  c.schedule.s_min = 0.002  # karras: sigma / alpha at t -> 0
  c.schedule.s_max = 80.0  # karras: at t = 1
  c.schedule.rho = 7.0  # karras: even steps of t are even steps of (sigma / alpha)^(1 / rho)

  c.weighting = 'snr_trunc'  # of the loss: constant, snr, snr_trunc, snr_plus_one or edm

  c.time = ml_collections.ConfigDict()  # the law of t in training
  c.time.num_steps = 0  # base training: t in {1/N, ..., 1}; 0 for continuous time
  c.time.law = 'uniform'  # base training: of t; or lognormal (EDM), of sigma / alpha
  c.time.log_mean = -1.2  # lognormal: of log(sigma / alpha)
  c.time.log_std = 1.2  # lognormal
  c.time.stratified = False  # spread t evenly over the batch: less variance


def _training(c: ml_collections.ConfigDict) -> None:
  """The base, and the rounds."""
  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.clip_norm = 1.0  # global norm that the gradient is clipped to

  c.train = ml_collections.ConfigDict()  # base training
  c.train.num_updates = 500_000
  c.train.batch_size = 128  # over all devices
  c.train.micro_batches = 1  # parts of a batch that go through the network one after the other
  c.train.learning_rate = 2e-4
  c.train.warmup = 1000  # updates until the learning rate is reached
  c.train.decay = 'none'  # of the learning rate over the stage, to 0: none, linear or cosine
  c.train.weight_decay = 0.0  # decoupled, times the learning rate
  c.train.ema_decay = (0.9999,)  # of one or several moving averages; the first is the stage's model

  # Every round of progressive distillation. A tuple has an entry a round and ends with the last
  # round's; its first entry serves all rounds before: (50_000, 100_000) gives only the last 100_000.
  c.distill = ml_collections.ConfigDict()
  c.distill.start_steps = 1024  # the base model's
  c.distill.end_steps = 1  # the last student's; the tuples below are counted from it
  c.distill.factor = (2,)  # teacher steps that a student does in one
  c.distill.from_weights = 'ema'  # of the teacher, to teach and to start from: ema or last
  c.distill.num_updates = (50_000, 100_000, 100_000)
  c.distill.batch_size = 128
  c.distill.micro_batches = 1
  c.distill.learning_rate = (1e-4,)
  c.distill.warmup = 0
  c.distill.decay = 'linear'
  c.distill.weight_decay = 0.0
  c.distill.ema_decay = (0.0,)  # 0: the student's last parameters are its model


def _one_step(c: ml_collections.ConfigDict) -> None:
  """Methods that go to few steps at once. Each is a stage of its name, taught by the base."""
  c.methods = ('progressive',)  # what follows the base: progressive, knowledge, consistency, dmd, dmd2

  c.pairs = (
    ml_collections.ConfigDict()
  )  # (noise, image) of the base, for knowledge and for dmd's regression
  c.pairs.num_pairs = 100_000
  c.pairs.sampler = 'heun'  # deterministic: ddim, euler, heun, rk4 or dpm_solver_2m
  c.pairs.num_steps = 18
  c.pairs.grid = 'uniform'  # how the steps are spaced: uniform, quadratic or karras
  c.pairs.batch_size = 512  # drawn at a time, over all devices

  c.knowledge = _student(num_updates=100_000, learning_rate=1e-4)
  _regression(c.knowledge)

  c.consistency = _student(num_updates=200_000, learning_rate=1e-4)
  _regression(c.consistency)
  c.consistency.weighting = 'constant'  # of the distance, by logsnr: as `weighting`
  c.consistency.start_intervals = 18  # neighbours on the teacher's path are 1 / intervals of t apart
  c.consistency.end_intervals = 18  # at the end of the stage
  c.consistency.solver = 'heun'  # the teacher's step between them: ddim, euler, heun or rk4
  c.consistency.target = (
    'ema'  # what the student must agree with: its first average, or its last weights
  )
  c.consistency.sample_steps = (1, 2, 4)  # step counts that it is measured at

  c.dmd = _matching(num_updates=300_000, learning_rate=5e-5)

  c.dmd2 = _matching(num_updates=500_000, learning_rate=5e-5)
  c.dmd2.regression = 0.0
  c.dmd2.fake_updates = 5
  c.dmd2.gan_generator = 3e-3
  c.dmd2.gan_fake = 1e-2


def _student(num_updates: int, learning_rate: float) -> ml_collections.ConfigDict:
  """What every such section has."""
  c = ml_collections.ConfigDict()
  c.start = (
    'base'  # the stage whose weights the student starts from: base, or a round such as progressive_0004
  )
  c.num_updates = num_updates
  c.batch_size = 128
  c.micro_batches = 1
  c.learning_rate = learning_rate
  c.warmup = 500
  c.decay = 'none'
  c.weight_decay = 0.0
  c.ema_decay = (0.9999,)
  c.clip_norm = 10.0  # in place of optimizer.clip_norm; for each network by itself
  return c


def _regression(c: ml_collections.ConfigDict) -> None:
  c.distance = 'l2'  # between images: l2, pseudo_huber, features (of an extractor.safetensors) or lpips
  c.distance_weights = ''  # features, lpips: the file with their weights


def _matching(num_updates: int, learning_rate: float) -> ml_collections.ConfigDict:
  """DMD and DMD2: the same keys, other values."""
  c = _student(num_updates, learning_rate)
  c.weight_decay = 0.01
  _regression(c)
  c.num_steps = 1  # of the generator
  c.regression = 0.25  # weight of the distance from the stored pairs; 0: there are none
  c.first_t = 0.02  # between first_t and last_t the scores are compared
  c.last_t = 0.98
  c.fake_learning_rate = learning_rate  # of the fake score and the GAN's head
  c.fake_updates = (
    1  # of the fake score (they are what num_updates counts) for each one of the generator
  )
  c.gan_generator = 0.0  # weight of the generator's GAN loss; 0, as gan_fake: no GAN
  c.gan_fake = 0.0  # weight of the critic's
  c.simulated = True  # several steps: inputs from the generator's own earlier steps; or noised data
  return c


def _watching(c: ml_collections.ConfigDict) -> None:
  """What is kept, shown and measured."""
  c.max_skipped = 20  # updates in a row with a non-finite loss or gradient before going back
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 1000  # updates
  c.log = ml_collections.ConfigDict()
  c.log.every = 100  # updates between two lines of metrics.jsonl
  c.log.measured_updates = 3  # of each kind, to estimate the time of a run; 0 for no estimate
  c.log.health_every = 1000  # updates between two looks at a student's samples; 0 for none
  c.log.seconds = 15.0  # between two lines of progress where there is no terminal

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.num_samples = 50_000  # for each row of results.json
  c.evaluation.batch_size = 512  # images drawn at a time, over all devices
  c.evaluation.seed = 1  # of the noise: the same for every row
  c.evaluation.samplers = ('ddim', 'ancestral')  # that the base is measured under
  c.evaluation.grid = 'uniform'  # how the base's steps are spaced: uniform, quadratic or karras
  c.evaluation.max_steps = 1024  # rows with more steps are left out
  c.evaluation.gamma = 0.0  # ancestral: variance between small (0) and large (1)
  c.evaluation.clip_x = True  # clip the denoiser's x to [-1, 1] while sampling


def _scaling(c: ml_collections.ConfigDict) -> None:
  """How it is computed; all of it may change from run to run in one workdir."""
  c.mesh = ml_collections.ConfigDict()  # of all devices, data x fsdp; batches are split over both
  c.mesh.data = -1  # -1: what fsdp leaves
  c.mesh.fsdp = 1  # devices that each network, its averages and its optimizer's state are split over

  c.compute = ml_collections.ConfigDict()
  c.compute.dtype = 'float32'  # of the network's activations; bfloat16: mixed precision
  c.compute.teacher_dtype = 'float32'  # that the frozen teacher is kept in; or bfloat16
  c.compute.remat = False  # compute each block's activations again on the way back: less memory
  c.compute.updates_per_dispatch = 1  # in one program: for small networks on fast devices
  c.compute.cache = (
    ''  # directory of compiled programs; '': in the user's cache directory; none: no cache
  )
