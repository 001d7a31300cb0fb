"""What has to stand in the environment before torch and Triton are imported, here and in the processes that tests start."""

import os
import tempfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads wait actively, which starves whatever else runs

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# models that tests load are shared with nobody's editor, and end with the last server that uses them
ROOM = tempfile.TemporaryDirectory(prefix="deepseek-lsp-tests-")
os.environ["XDG_RUNTIME_DIR"] = ROOM.name
os.environ["DEEPSEEK_LSP_KEEP_MODEL_S"] = "0"
