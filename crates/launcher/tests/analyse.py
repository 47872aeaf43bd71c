"""Runs PyTorch's analyser of traces: analyse.py SITE-PACKAGES FOLDER.

It is plain Python, but `import torch` loads the compiled part, which needs every library of CUDA. So its packages
are named here without running what is in them.
"""

import sys
import types

site_packages = sys.argv.pop(1)
for name in ("torch", "torch.distributed"):
    package = types.ModuleType(name)
    package.__path__ = [f"{site_packages}/{name.replace('.', '/')}"]
    sys.modules[name] = package

from torch.distributed.flight_recorder.fr_trace import main  # noqa: E402

main()
