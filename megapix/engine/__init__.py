"""DeepSpeed's processes, and its ZeRO-2 engine around our network and optimizer. Nothing else imports deepspeed."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported
