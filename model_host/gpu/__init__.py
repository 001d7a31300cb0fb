"""The model on an NVIDIA GPU: small steps as captured CUDA graphs over Triton kernels, longer ones in plain torch.

`kernels` and `plain` hold the same six operations, once in Triton and once in torch; `model` strings them together.
"""
