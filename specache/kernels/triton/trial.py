"""A trial kernel: it checks Triton's compilers and launcher, and the driver, on a device."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

WRITTEN = 7


@triton.jit
def trial_kernel(out):  # int32 [1]
    tl.store(out, 7)


def try_launch(device: torch.device) -> None:
    """Launch the smallest kernel. Raises whatever Triton does."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        trial_kernel[(1,)](out)
    if out.item() != WRITTEN:
        raise RuntimeError("a kernel ran and wrote nothing")
