"""What has to stand in the environment before torch and Triton are imported, here and in the processes that tests start."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads wait actively, which starves whatever else runs

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
