"""One thread per process: small tensors gain nothing from more, and busy machines lose a factor of ten by them."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
torch.set_num_threads(1)
