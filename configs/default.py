"""Every key there is, with its meaning. Other configs start from this one and change what differs."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """The defaults; locked, so that a mistyped key is an error."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of initial parameters, batches and noise

  c.dataset = ml_collections.ConfigDict()
  c.dataset.name = 'digits'  # one of datasets.SOURCES
  c.dataset.random_flip = False  # mirror images left to right at random

  c.model = ml_collections.ConfigDict()
  c.model.output = 'v'  # what the network predicts: x, eps or v
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
  c.model.resblock_resample = True  # down- and upsampling inside residual blocks

  c.schedule = ml_collections.ConfigDict()
  c.schedule.name = 'cosine'
  c.schedule.logsnr_min = -20.0
  c.schedule.logsnr_max = 20.0

  c.weighting = 'snr_trunc'  # of the loss: constant, snr, snr_trunc or snr_plus_one

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.clip_norm = 1.0  # global norm that the gradient is clipped to

  c.train = ml_collections.ConfigDict()  # base training
  c.train.num_updates = 500_000
  c.train.batch_size = 128  # over all devices
  c.train.learning_rate = 2e-4
  c.train.warmup = 1000  # updates until the learning rate is reached
  c.train.decay = False  # learning rate linearly to 0 over the stage
  c.train.weight_decay = 0.0
  c.train.ema_decay = 0.9999

  c.distill = ml_collections.ConfigDict()  # every round of progressive distillation
  c.distill.start_steps = 1024  # the base model's; the first student has half as many
  c.distill.end_steps = 1  # the last student's
  c.distill.num_updates = 50_000  # a round
  c.distill.num_updates_last = 100_000  # for the rounds to few steps
  c.distill.last_steps = 2  # what few steps are: so many or fewer
  c.distill.batch_size = 128
  c.distill.learning_rate = 1e-4
  c.distill.warmup = 0
  c.distill.decay = True
  c.distill.weight_decay = 0.0
  c.distill.ema_decay = 0.0  # 0: the student's last parameters are sampled from, and teach

  c.max_skipped = 20  # updates in a row with a non-finite loss or gradient before going back
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 1000  # updates
  c.log = ml_collections.ConfigDict()
  c.log.every = 100  # updates between two lines of metrics.jsonl
  c.log.seconds = 15.0  # between two lines of progress where there is no terminal

  c.evaluation = ml_collections.ConfigDict()
  c.evaluation.num_samples = 50_000  # for each row of results.json
  c.evaluation.batch_size = 512  # images drawn at a time, over all devices
  c.evaluation.seed = 1  # of the noise: the same for every row
  c.evaluation.clip_x = True  # clip the denoiser's x to [-1, 1] while sampling
  return c.lock()
