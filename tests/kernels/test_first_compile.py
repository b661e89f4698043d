"""The process that compiles the kernels computes what all later ones do, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import hashlib, torch
    from scvi_ext.functional import fused
    from scvi_ext.kernels.sparse import SparseRows

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(3 * torch.rand(20, 61, generator=generator), generator=generator)
    rows = SparseRows.from_dense(x)
    run, sentence = fused.choose("zinb", "cpu", torch.float32)
    assert run is not None, sentence
    logits, dropout = (torch.randn(20, 61, generator=generator) for _ in range(2))
    outputs = run(rows, True, logits, rows.sum(-1).log(), torch.randn(61, generator=generator), dropout, 1.0, True)
    weight = torch.randn(61, 5, generator=generator).t().requires_grad_()
    product = rows.linear(weight)
    product.sum().backward()
    everything = [*outputs, product.detach(), weight.grad]
    print(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in everything)).hexdigest())
"""


def test_what_is_compiled_is_what_is_kept_on_disk(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    said = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert list(tmp_path.rglob("*.nbc"))
    assert said[0] == said[1]
